"""The pages for those who come from another attention: what their tables say, measured here or by the kit."""

import inspect
import re
import runpy
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from anyattention import dot_product_attention, explain, masks

DOCS = Path(__file__).parents[2] / "docs"
CORNERS = runpy.run_path(str(DOCS / "corners.py"))
PAGES = {
    "jax-nn": ("jax-nn",),
    "sdpa": ("torch-sdpa",),
    "flex-attention": ("torch-flex",),
    "keras": ("keras-jax", "keras-numpy", "keras-torch"),
    "flax-nnx": ("flax-nnx",),
}
# What a page says in a few words, and the words of the kit that it follows from.
WORDS = {
    "mean of all values": "as Flax",
    "mean of all values, but not in float16": "hiding a key adds -45850",
    "as Flax": "as Flax",
    "NaN": "as Flax",
    "does not show": "as Flax",
    "zero": "the weights are zero",
    "float32": "other bits, a smaller error",
    "the softmax is in float32": "the softmax is in float32",
    "becomes float32": "returned in float32",
    "rounded": "the bias is rounded",
    "the output is NaN": "so a NaN there stays",
    "an error": "there must be a key|does not take|Error",
    "computed, unchecked": "lengths are not checked",
    "the dtype of the query": "the dtype of the query",
    "its logit is -2.4e38 in every dtype": r"a hidden logit is -2\.38",
    "yes": "as Flax|computed",
}


def linked():
    """Every cell of a page in a row that leads to a corner: page, attention, corner, words."""
    for page, names in PAGES.items():
        rows = re.findall(
            r"^\| .*?who-does-what\.md#([\w-]+)\).*? \| (.*) \|$", (DOCS / f"coming-from/{page}.md").read_text(), re.M
        )
        for corner, cells in rows:
            for name, words in zip(names, cells.split(" | "), strict=False):
                yield pytest.param(name, corner, words, id=f"{name}-{corner}")


@pytest.mark.parametrize(("name", "corner", "words"), list(linked()))
def test_what_a_page_says_of_a_corner_follows_from_the_kit(name, corner, words):
    if corner in CORNERS["QUESTIONS"]:
        found = CORNERS["PEERS"]["answers"][name][CORNERS["QUESTIONS"][corner]]
    else:
        asked = CORNERS["CORNERS"][corner]
        found = CORNERS["cell"](name, asked, asked.columns[0][1])
    expected = "as Flax" if (corner, words) == ("no-keys", "zero") else WORDS[words]
    assert re.search(expected, found), found


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


QUERY, KEY, VALUE = arrays((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4))
TORCH = [torch.tensor(x).transpose(1, 2) for x in (QUERY, KEY, VALUE)]


def test_jax_nn_takes_no_batch_or_one():
    assert jax.nn.dot_product_attention(QUERY[0], KEY[0], VALUE[0]).shape == QUERY[0].shape
    with pytest.raises(ValueError, match="unpack"):
        jax.nn.dot_product_attention(QUERY[None], KEY[None], VALUE[None])


@pytest.mark.parametrize(
    "changed",
    [{"value": arrays((2, 5, 2, 6))[0]}, {"query": QUERY.astype(np.float16)}, {"mask": np.ones((3, 5), np.float32)}],
    ids=["depth of values", "mixed dtypes", "mask of numbers"],
)
def test_jax_nn_refuses(changed):
    with pytest.raises(ValueError, match=r"should be|must be|bool"):
        jax.nn.dot_product_attention(**({"query": QUERY, "key": KEY, "value": VALUE} | changed))
    assert dot_product_attention(**({"query": QUERY, "key": KEY, "value": VALUE} | changed)).shape[:3] == (2, 3, 2)


def test_padded_queries():
    theirs = jax.nn.dot_product_attention(
        QUERY, KEY, VALUE, query_seq_lengths=jnp.asarray([2, 3]), key_value_seq_lengths=jnp.asarray([4, 5])
    )
    ours = dot_product_attention(QUERY, KEY, VALUE, mask=masks.LengthMask([4, 5], [2, 3]))
    assert not np.asarray(theirs)[0, 2].any()
    np.testing.assert_allclose(ours[0, 2], VALUE[0].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(ours[0, :2], theirs[0, :2], atol=1e-6)


@pytest.mark.parametrize("name", ["return_residual", "return_lse", "return_aux", "flash_attention", "promote_dtype"])
def test_what_is_missing_here(name):
    assert name not in inspect.signature(dot_product_attention).parameters


def test_sdpa_broadcasts_batches():
    query, key, value = TORCH
    assert sdpa(query, key[:1], value[:1]).shape == query.shape
    with pytest.raises(AssertionError, match="batch"):
        dot_product_attention(QUERY, KEY[:1], VALUE[:1])


def test_sdpa_with_a_mask_and_a_causal_flag():
    mask = torch.tensor([[True, False, True, True, True]])
    both = dot_product_attention(QUERY, KEY, VALUE, mask=mask.numpy(), is_causal=True)
    np.testing.assert_allclose(sdpa(*TORCH, attn_mask=mask, is_causal=True).transpose(1, 2), both, atol=1e-6)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(RuntimeError, match="is_causal"):
        sdpa(*TORCH, attn_mask=mask, is_causal=True)


def test_sdpa_drops_in_evaluation():
    with torch.inference_mode():
        assert not torch.equal(sdpa(*TORCH, dropout_p=0.5), sdpa(*TORCH))
    assert np.array_equal(
        dot_product_attention(QUERY, KEY, VALUE, dropout_rate=0.5, deterministic=True),
        dot_product_attention(QUERY, KEY, VALUE),
    )


def second_derivative(function, query, key, value):
    query = query.clone().requires_grad_()
    (first,) = torch.autograd.grad((function(query, key, value) ** 2).sum(), query, create_graph=True)
    return torch.autograd.grad((first**2).sum(), query)[0]


def test_second_derivatives_of_sdpa():
    with sdpa_kernel(SDPBackend.MATH):
        expected = second_derivative(sdpa, *TORCH)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="not implemented"):
        second_derivative(sdpa, *TORCH)
    found = second_derivative(dot_product_attention, *(torch.tensor(x) for x in (QUERY, KEY, VALUE)))
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-4, rtol=1e-4)


def test_on_pytorch_none_runs_sdpa():
    x = torch.ones(1, 256, 2, 16)
    assert explain(x, x, x).implementation == "fused"


def test_flex_attention_has_no_gradients_on_cpu():
    query, key, value = TORCH
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(query.clone().requires_grad_(), key, value)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_caps_as_a_function_of_the_score():
    theirs = flex_attention(*TORCH, lambda score, *at: 0.5 * torch.tanh(score / 0.5))
    ours = dot_product_attention(QUERY, KEY, VALUE, logits_soft_cap=0.5)
    np.testing.assert_allclose(theirs.transpose(1, 2), ours, atol=1e-6)


def test_flex_attention_takes_four_axes():
    with pytest.raises(NotImplementedError, match="4D"):
        flex_attention(*(x[0] for x in TORCH))


NAMES = {
    jax.nn.dot_product_attention: "scale query_seq_lengths key_value_seq_lengths local_window_size return_residual",
    flex_attention: "score_mod block_mask scale enable_gqa return_lse return_aux",
    nnx.dot_product_attention: "precision module promote_dtype is_causal dropout_rate",
}


@pytest.mark.parametrize("function", NAMES, ids=lambda x: x.__module__.partition(".")[0])
def test_the_names_of_arguments(function):
    assert set(NAMES[function].split()) <= set(inspect.signature(function).parameters)


def test_nnx_is_two_functions():
    """Values of another depth show which: jax.nn refuses them. So does precision, which jax.nn does not take."""
    value, key = arrays((2, 5, 2, 6))[0], jax.random.key(0)
    with pytest.raises(ValueError, match="value shape"):
        nnx.dot_product_attention(QUERY, KEY, value)
    theirs = nnx.dot_product_attention(QUERY, KEY, value, dropout_rate=0.5, dropout_rng=key)
    ours = dot_product_attention(*map(jnp.asarray, (QUERY, KEY, value)), dropout_rate=0.5, dropout_rng=key)
    assert np.array_equal(ours, theirs)
    program = str(
        jax.make_jaxpr(lambda q, k, v: nnx.dot_product_attention(q, k, v, precision="highest"))(QUERY, KEY, VALUE)
    )
    assert "HIGHEST" not in program


def test_nnx_computes_at_any_rate():
    """Up to Flax 0.12.8; later it refuses as we do."""
    key, call = jax.random.key(0), partial(nnx.dot_product_attention, QUERY, KEY, VALUE, dropout_rate=2.0)
    if tuple(map(int, flax.__version__.split(".")[:3])) <= (0, 12, 8):
        assert call(dropout_rng=key).shape == QUERY.shape
    else:
        with pytest.raises(ValueError, match="rate"):
            call(dropout_rng=key)
    with pytest.raises(ValueError, match="rate"):
        dot_product_attention(QUERY, KEY, VALUE, dropout_rate=2.0, dropout_rng=key)


def test_nnx_refuses_more_axes_in_a_mask():
    mask = np.ones((2, 1, 1, 3, 5), bool)
    with pytest.raises(ValueError, match="ndim"):
        nnx.dot_product_attention(QUERY, KEY, VALUE, mask=mask)
    assert dot_product_attention(QUERY, KEY, VALUE, mask=mask).shape == (2, *QUERY.shape)
