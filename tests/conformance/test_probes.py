"""Planted mistakes, written as people write attention: each is named, with its mend; right functions are not."""

import math

import numpy as np
import pytest
import torch

import anyattention
from anyattention_conformance import probes, targets
from anyattention_conformance.adapters import ADAPTERS
from anyattention_conformance.reference import attention

LOW = -1e30


def softmax(x, axis=-1):
    x = np.exp(x - x.max(axis=axis, keepdims=True))
    return x / x.sum(axis=axis, keepdims=True)


def bhqk(query, key):
    return np.einsum("bqhd,bkhd->bhqk", query, key)


def of(weights, value):
    return np.einsum("bhqk,bkhd->bqhd", weights, value).astype(value.dtype)


def root(query):
    return math.sqrt(query.shape[-1])


def masked(logits, mask):
    return logits if mask is None else np.where(mask, logits, LOW)


def right(query, key, value, bias=None, mask=None):
    logits = bhqk(query, key) / root(query) + (0 if bias is None else bias)
    return of(softmax(masked(logits, mask)), value)


def no_scale(query, key, value):
    return of(softmax(bhqk(query, key)), value)


def scaled_twice(query, key, value):
    query = query / root(query)
    return of(softmax(bhqk(query, key) / root(query)), value)


def times_the_root(query, key, value):
    return of(softmax(bhqk(query, key) * root(query)), value)


def scaled_by_the_model(query, key, value):
    return of(softmax(bhqk(query, key) / math.sqrt(query.shape[-1] * query.shape[-2])), value)


def over_queries(query, key, value):
    return of(softmax(bhqk(query, key) / root(query), axis=2), value)


def over_heads(query, key, value):
    return of(softmax(bhqk(query, key) / root(query), axis=1), value)


def over_the_batch(query, key, value):
    return of(softmax(bhqk(query, key) / root(query), axis=0), value)


def always_causal(query, key, value, mask=None):
    seen = np.tril(np.ones((query.shape[1], key.shape[1]), bool))
    return right(query, key, value, mask=seen if mask is None else seen & mask)


def causal_at_the_wrong_end(query, key, value):
    seen = np.tril(np.ones((key.shape[1], key.shape[1]), bool))[-query.shape[1] :]
    return right(query, key, value, mask=seen)


def heads_first(query, key, value):
    weights = np.einsum("bhqd,bhkd->bhqk", query, key) / root(query)
    return np.einsum("bhqk,bhkd->bhqd", softmax(weights), value)


def heads_first_without_a_scale(query, key, value):
    weights = np.einsum("bhqd,bhkd->bhqk", query, key)
    return np.einsum("bhqk,bhkd->bhqd", softmax(weights), value)


def length_first(query, key, value):
    return right(*(np.swapaxes(x, 0, 1) for x in (query, key, value))).swapaxes(0, 1)


def reshaped_in(query, key, value):
    batch, _, heads, depth = query.shape
    split = (x.reshape(batch, heads, -1, depth) for x in (query, key, value))
    query, key, value = split
    weights = softmax(query @ key.swapaxes(-1, -2) / root(query))
    return (weights @ value).transpose(0, 2, 1, 3)


def reshaped_out(query, key, value):
    split = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    shape = query.shape
    query, key, value = split
    return (softmax(query @ key.swapaxes(-1, -2) / root(query)) @ value).reshape(shape)


def reshaped_both_ways(query, key, value):
    shape = query.shape
    split = (x.reshape(shape[0], shape[2], -1, shape[3]) for x in (query, key, value))
    query, key, value = split
    return (softmax(query @ key.swapaxes(-1, -2) / root(query)) @ value).reshape(shape)


def values_before_keys(query, key, value):
    return right(query, value, key)


def keys_before_queries(query, key, value):
    return right(key, query, value)


def inverted(query, key, value, mask=None):
    return right(query, key, value, mask=None if mask is None else np.logical_not(mask))


def added(query, key, value, mask=None):
    return right(query, key, value, bias=mask)


def unscaled_and_inverted(query, key, value, mask=None):
    return of(softmax(masked(bhqk(query, key), None if mask is None else ~mask.astype(bool))), value)


def floats_added(query, key, value, mask=None):
    if mask is not None and mask.dtype != bool:
        return right(query, key, value, bias=mask)
    return right(query, key, value, mask=mask)


def floats_inverted(query, key, value, mask=None):
    if mask is not None and mask.dtype != bool:
        mask = mask == 0
    return right(query, key, value, mask=mask)


def ignored(query, key, value, mask=None):
    return right(query, key, value)


def multiplied(query, key, value, mask=None):
    return of(softmax(bhqk(query, key) / root(query) * (1 if mask is None else mask)), value)


def hidden_afterwards(query, key, value, mask=None):
    return of(softmax(bhqk(query, key) / root(query)) * (1 if mask is None else mask), value)


def bias_before_scale(query, key, value, bias=None):
    return of(softmax((bhqk(query, key) + (0 if bias is None else bias)) / root(query)), value)


def no_bias(query, key, value, bias=None):
    return right(query, key, value)


def bias_subtracted(query, key, value, bias=None):
    return right(query, key, value, None if bias is None else -bias)


def bias_multiplied(query, key, value, bias=None):
    return of(softmax(bhqk(query, key) / root(query) * (1 if bias is None else bias)), value)


def bias_afterwards(query, key, value, bias=None):
    return of(softmax(bhqk(query, key) / root(query)) + (0 if bias is None else bias), value)


def bias_hides(query, key, value, bias=None):
    return right(query, key, value, mask=None if bias is None else bias != 0)


def causal_from_the_end(query, key, value, is_causal=False):
    return causal_at_the_wrong_end(query, key, value) if is_causal else right(query, key, value)


def never_causal(query, key, value, is_causal=False):
    return right(query, key, value)


def dropped(query, key, value, seed=None, rate=0.5):
    weights = softmax(bhqk(query, key) / root(query))
    kept = np.random.default_rng(seed).random(weights.shape) >= rate
    return of(weights * kept / (1 - rate), value)


def dropped_with_a_seed(query, key, value):
    return dropped(query, key, value, seed=3)


def other_names(q, k, v, attn_mask=None):
    return right(q, k, v, mask=attn_mask)


PLANTED = {
    "no scale": no_scale,
    "scaled twice": scaled_twice,
    "multiplied by the root": times_the_root,
    "scaled by all heads": scaled_by_the_model,
    "softmax over queries": over_queries,
    "softmax over heads": over_heads,
    "softmax over the batch": over_the_batch,
    "always causal": always_causal,
    "always causal, from the end": causal_at_the_wrong_end,
    "heads first": heads_first,
    "length first": length_first,
    "heads mixed on the way in": reshaped_in,
    "heads mixed on the way out": reshaped_out,
    "heads mixed": reshaped_both_ways,
    "key and value swapped": values_before_keys,
    "query and key swapped": keys_before_queries,
    "mask inverted": inverted,
    "mask added": added,
    "float mask added": floats_added,
    "float mask inverted": floats_inverted,
    "mask ignored": ignored,
    "mask multiplied": multiplied,
    "mask after the softmax": hidden_afterwards,
    "bias before the scale": bias_before_scale,
    "bias ignored": no_bias,
    "bias subtracted": bias_subtracted,
    "bias multiplied": bias_multiplied,
    "bias after the softmax": bias_afterwards,
    "bias taken for a mask": bias_hides,
    "causal from the end": causal_from_the_end,
    "is_causal ignored": never_causal,
    "random": dropped,
    "always drops": dropped_with_a_seed,
    "parameter names": other_names,
}


def diagnosed(function, framework="numpy"):
    target, answers = targets.make(function, framework), {}
    for case in probes.CALLS:
        answers.setdefault(case.id, []).append(target.run(case, "float32", False))
    return probes.diagnose(answers)


def names(function, framework="numpy"):
    return [x.probe for x in diagnosed(function, framework)]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named(name):
    assert names(PLANTED[name]) == [name]


def test_every_mistake_that_is_known_is_planted():
    of_flax = {x.name for x in probes.VARIANTS if x.case in probes.CALLS}
    assert of_flax | {"random", "always drops", "parameter names"} == PLANTED.keys()


def test_two_mistakes_are_both_named():
    assert names(unscaled_and_inverted) == ["no scale", "mask inverted"]
    assert names(heads_first_without_a_scale) == ["heads first", "no scale"]


def always_causal_from_the_end(query, key, value, is_causal=False):
    return causal_at_the_wrong_end(query, key, value)


def nothing_finite(query, key, value):
    return right(query, key, value) * np.float32(np.inf)


def test_more_mistakes_than_one_case_shows():
    assert names(always_causal_from_the_end) == ["always causal, from the end"]
    assert names(nothing_finite) == []


def causal_if_asked(query, key, value, is_causal=False):
    seen = np.tril(np.ones((query.shape[1], key.shape[1]), bool))
    return right(query, key, value, mask=seen if is_causal else None)


def wrong_in_no_known_way(query, key, value, bias=None, mask=None):
    return right(query, key, value, bias, mask) * np.float32(1.01)


def close(query, key, value, bias=None, mask=None):
    """A rounding error of 16 bits is no mistake."""
    return right(query.astype(np.float16), key.astype(np.float16), value, bias, mask).astype(query.dtype)


@pytest.mark.parametrize("function", [right, causal_if_asked, attention, wrong_in_no_known_way, close])
def test_no_other_function_is_told_of_a_mistake(function):
    assert names(function) == []


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_ours_is_not(framework):
    assert names(anyattention.dot_product_attention, framework) == []


@pytest.mark.needs("torch", "mlx", "transformers")
@pytest.mark.parametrize("name", ["torch-sdpa", "huggingface-sdpa", "huggingface-eager", "mlx-fast"])
def test_attentions_of_other_libraries_are_not(name):
    target = targets.load(name)
    assert names(target.function, ADAPTERS[name].framework) == []


def test_pytorchs_sdpa_as_it_is():
    """The layout of another library, and its names."""
    found = diagnosed(torch.nn.functional.scaled_dot_product_attention, "torch")
    assert "heads first" in [x.probe for x in found]
    assert "swapaxes(-2, -3)" in found[0].mend


def test_a_module_in_training():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
            return (torch.nn.functional.dropout(weights, 0.5, self.training) @ value).transpose(1, 2)

    module = Attention()
    assert names(module, "torch") == ["random"]
    assert names(module.eval(), "torch") == []


def test_other_names_are_told_with_a_wrapper():
    (found,) = diagnosed(other_names)
    assert "no parameter mask, but attn_mask" in found.cause
    wrapper = found.mend.partition("lambda ")[2].partition(". Flax")[0].replace("attention(query", "other_names(query")
    assert names(eval(f"lambda {wrapper}", globals())) == []
