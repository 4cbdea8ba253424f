"""Models of Transformers that are switched to ours by name: what they compute with their own eager attention.

Tiny models with random weights, large enough that attention is sharp: a wrong scale, window or sink shows.
"""

import functools
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import masking_utils

import anyattention as aa
from anyattention.integrations import _huggingface_attention as attention
from anyattention.integrations import huggingface
from anyattention.integrations._huggingface_masks import RuleMask
from anyattention.masks import Mask

pytestmark = pytest.mark.needs("torch", "transformers")

SIZES = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOW = {**GROUPED, "head_dim": 12, "sliding_window": 7}
GEMMA = {**WINDOW, "query_pre_attn_scalar": 5, "layer_types": ["sliding_attention", "full_attention"]}
SEQUENCES = {
    **{"vocab_size": 50, "d_model": 48, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_target_positions": 600},
    **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
MODELS = {
    "Llama": ("ForCausalLM", {**GROUPED, "head_dim": 12}),
    "Qwen2": ("ForCausalLM", {**GROUPED, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "Mistral": ("ForCausalLM", WINDOW),
    "Gemma2": ("ForCausalLM", {**GEMMA, "attn_logit_softcapping": 1.5}),
    "Gemma3": ("ForCausalLM", GEMMA),
    "GptOss": ("ForCausalLM", {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2}),
    "GPT2": (
        "LMHeadModel",
        {"vocab_size": 50, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 600}
        | {"scale_attn_by_inverse_layer_idx": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
    ),
    "Bart": ("ForConditionalGeneration", {**SEQUENCES, "max_position_embeddings": 600, "forced_eos_token_id": None}),
    "Bert": ("Model", {**SIZES, "max_position_embeddings": 600}),
    "ModernBert": ("Model", {**SIZES, **TOKENS, "local_attention": 8, "global_attn_every_n_layers": 2}),
    "ViT": (
        "Model",
        {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 46, "patch_size": 2},
    ),
    "Whisper": ("ForConditionalGeneration", {**SEQUENCES, "num_mel_bins": 8, "max_source_positions": 520}),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
OTHERS = {  # that add columns to masks, that choose keys by index, whose layers do not say whether they are causal
    "DeepseekV4": (
        "ForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 5,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "moe_intermediate_size": 9,
        }
        | {"n_routed_experts": 2, "num_experts_per_tok": 1, "index_n_heads": 2, "index_head_dim": 8}
        | {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"]}
        | {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    ),
    "DeepseekV32": (
        "ForCausalLM",
        {**GROUPED, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 9, "n_routed_experts": 2, "n_group": 1}
        | {"topk_group": 1, "num_experts_per_tok": 1, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 5},
    ),
    "Splinter": ("Model", SIZES),
}
DECODERS = ("Llama", "Qwen2", "Mistral", "Gemma2", "Gemma3", "GptOss", "GPT2")


@pytest.fixture(scope="module", autouse=True)
def registered():
    for implementation in (None, "exact", "tiled"):
        huggingface.register(name(implementation), implementation)


@pytest.fixture
def ran(monkeypatch):
    """Which implementation served each call, by what `explain` says of its arguments."""
    plans = []

    def told(*args, **kwargs):
        plans.append(aa.explain(*args, **kwargs).implementation)
        return aa.dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "dot_product_attention", told)
    return plans


def name(implementation):
    return "anyattention" if implementation is None else f"anyattention-{implementation}"


@functools.cache
def model(kind, **more):
    """A model with weights of which logits of attention are some units apart."""
    head, config = (MODELS | OTHERS)[kind]
    torch.manual_seed(0)
    made = getattr(transformers, kind + head)(
        getattr(transformers, CONFIGS.get(kind, f"{kind}Config"))(**config | more)
    ).eval()
    for key, x in made.named_parameters():
        if x.ndim > 1:
            torch.nn.init.normal_(x, std=x.shape[-1] ** -0.5)
        elif "sinks" in key:
            torch.nn.init.normal_(x)
    return made


def given(kind, length, padded):
    """Inputs, with padding on the left, or where a model has no causality on the right."""
    torch.manual_seed(1)
    ids, shown = torch.randint(3, 50, (2, length)), torch.ones(2, length, dtype=torch.long)
    if kind == "ViT":
        return {"pixel_values": torch.randn(1, 3, 46, 46)}
    if kind == "Whisper":
        return {"input_features": torch.randn(1, 8, 1040), "decoder_input_ids": ids[:1]}
    if padded:
        shown[0, : length // 4] = 0
    inputs = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = shown if kind in DECODERS else shown.flip(1)
    if kind in ("T5", "Bart"):
        inputs["decoder_input_ids"] = ids.flip(0)[:, : length - 5]
    return inputs


def computed(made, implementation, inputs, seen=None, program=None):
    """The output, and the gradients by all parameters of the sum of its squares over what is not padding."""
    made.set_attn_implementation(implementation)
    made.zero_grad()
    found = (made if program is None else program)(**inputs)
    output = found.logits if hasattr(found, "logits") else found.last_hidden_state
    kept = output if seen is None else output * seen[..., None]
    (kept**2 * torch.linspace(0, 1, output.shape[-1])).sum().backward()
    return output.detach(), {key: x.grad.clone() for key, x in made.named_parameters() if x.grad is not None}


def assert_alike(found, expected):
    """Within 3e-6 of the largest output, and 3e-5 of the largest gradient of each parameter.

    A bias of keys has no gradient but rounding, so that each is measured by a thousandth of the largest at least.
    """
    (output, gradients), (right, theirs) = found, expected
    assert float((output - right).abs().max()) <= 3e-6 * float(right.abs().max())
    assert set(gradients) == set(theirs)
    assert len(theirs) > 10
    least = 1e-3 * max(float(x.abs().max()) for x in theirs.values())
    for key, x in theirs.items():
        assert float((gradients[key] - x).abs().max()) <= 3e-5 * max(float(x.abs().max()), least), key


@pytest.mark.parametrize(("implementation", "length"), [("exact", 24), ("tiled", 24), (None, 520)])
@pytest.mark.parametrize(
    ("kind", "padded"),
    [(kind, padded) for kind in MODELS for padded in (False, True) if not padded or kind not in ("ViT", "Whisper")],
)
def test_as_eager(kind, implementation, length, padded, ran):
    """Outputs and gradients; at lengths where None leaves exact for each call, windows of 7 among them."""
    inputs = given(kind, length, padded)
    seen = inputs.get("attention_mask") if "decoder_input_ids" not in inputs else None
    expected = computed(model(kind), "eager", inputs, seen)
    assert not ran
    assert_alike(computed(model(kind), name(implementation), inputs, seen), expected)
    assert len(ran) == {"T5": 6, "Bart": 6, "Whisper": 6}.get(kind, 2)
    assert set(ran) <= ({"fused", "tiled"} if implementation is None else {implementation})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_do_not_hand_on_the_mask(kind, padded, ran):
    inputs, made = given(kind, 24, padded), model(kind)
    seen = inputs.get("attention_mask")
    expected = computed(made, "eager", inputs, seen)
    assert_alike(computed(made, "anyattention", inputs, seen), expected)
    assert len(ran) == 2


def test_fully_masked_rows():
    """Padding on the left, and a whole sequence of it: the mean of all values, as eager, and finite gradients."""
    inputs = given("Mistral", 24, True)
    inputs["attention_mask"][1] = 0
    made = model("Mistral")
    expected = computed(made, "eager", inputs)
    for implementation in (None, "exact", "tiled"):
        output, gradients = computed(made, name(implementation), inputs)
        torch.testing.assert_close(output, expected[0], atol=1e-5, rtol=0)
        assert all(bool(x.isfinite().all()) for x in gradients.values())


# --- generation ---


def generated(made, implementation, inputs, **how):
    """The tokens, and the logits of which each was chosen."""
    made.set_attn_implementation(implementation)
    found = made.generate(
        **inputs,
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **how,
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, {}) for kind in DECODERS),
        *((kind, {"num_beams": 3}) for kind in ("Llama", "Gemma3", "GptOss", "GPT2", "T5", "Bart", "Whisper")),
        *((kind, {"cache_implementation": "static"}) for kind in ("Llama", "Gemma2", "Mistral", "T5")),
        ("Qwen2", {"use_cache": False}),
        ("Llama", {"cache_implementation": "static", "num_beams": 3}),
    ],
    ids=str,
)
def test_generation(kind, how, ran):
    """The same tokens from prompts that are padded on the left, and longer than a window."""
    inputs = given(kind, 16, True)
    inputs.pop("decoder_input_ids", None)
    made = model(kind)
    expected, scores = generated(made, "eager", inputs, **how)
    assert not ran
    found, ours = generated(made, "anyattention", inputs, **how)
    assert torch.equal(found, expected)
    torch.testing.assert_close(ours, scores, rtol=0, atol=1e-5 * float(scores.abs().max()))
    assert len(ran) >= 24


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_what_models_do_with_a_mask(dtype):
    """Slices, as Gemma 4 takes those of the last logits, more columns, as DeepSeek V4 adds, other dtypes.

    Boolean for models that run with Transformers' sdpa. Others may rely on numbers, as DeepSeek V4 does.
    """
    shown = given("Llama", 16, True)["attention_mask"].bool()
    asked = {"batch_size": 2, "q_length": 16, "kv_length": 16, "attention_mask": shown, "dtype": dtype}
    make = transformers.AttentionMaskInterface()["anyattention"]
    mask = make(**asked, config=model("Llama" if dtype == torch.bool else "GptOss").config)
    dense = masking_utils.sdpa_mask(**asked) if dtype == torch.bool else masking_utils.eager_mask(**asked)
    assert type(mask) is RuleMask
    assert (mask.shape, mask.dtype, mask.ndim, mask.device) == (dense.shape, dtype, 4, dense.device)
    assert torch.equal(mask[:, :, -3:], dense[:, :, -3:])
    assert torch.equal(torch.cat([mask, torch.zeros(2, 1, 16, 2, dtype=dtype)], -1)[..., :16], dense)
    assert mask.detach().visible is mask.visible  # as a checkpoint does that gets it as an argument
    assert torch.equal(mask.detach().to(torch.float64), dense.to(torch.float64))
    query, key, value = arrays(length=16)
    found = attend(query[:, :, -3:], key, value, mask[:, :, -3:])[0]
    torch.testing.assert_close(found, attend(query, key, value, mask)[0][:, -3:], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found, formula(query, key, value, mask.visible.to_array(16, 16))[0][:, -3:], atol=3e-6, rtol=0
    )


# --- training ---


def trained(made, implementation, seed=0):
    """Bits of the output and of all gradients of a step in training."""
    inputs = given(type(made).__name__.partition("For")[0], 24, True)
    made.train()
    try:
        torch.manual_seed(seed)
        return computed(made, implementation, inputs)
    finally:
        made.eval()


def equal(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(x, other[1][key]) for key, x in one[1].items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["Llama", "T5", "GptOss"])
def test_gradient_checkpointing(kind, rate, reentrant):
    """A layer that is computed again drops the same weights. The position biases of T5 add up in another order."""
    made = model(kind, **({"dropout_rate": rate} if kind == "T5" else {"attention_dropout": rate}))
    expected = trained(made, "anyattention")
    made.activation_checkpointing_enable({"use_reentrant": reentrant})
    try:
        found = trained(made, "anyattention")
    finally:
        made.activation_checkpointing_disable()
    assert_alike(found, expected)
    assert kind == "T5" or equal(found, expected)
    assert equal(trained(made, "anyattention"), expected)  # of the same seed
    assert equal(trained(made, "anyattention", seed=1), expected) == (rate == 0.0)


def arrays(heads=4, kv_heads=2, length=9):
    torch.manual_seed(2)
    return [torch.randn(2, n, length, 6) for n in (heads, kv_heads, kv_heads)]


def attend(*args, training=False, **kwargs):
    """A call as layers make it, of what Transformers has under our name."""
    layer = torch.nn.Module().train(training)
    return transformers.AttentionInterface()["anyattention"](layer, *args, **{"is_causal": False, **kwargs})


@pytest.mark.parametrize("rate", [0.25, 0.6])
def test_dropout_is_flax_of_the_key_that_was_drawn(rate):
    """The formula, with the bits of the key that PyTorch's generator gives next; twice with one seed the same."""
    query, key, value = arrays(kv_heads=4)
    mask = torch.rand(2, 1, 9, 9) < 0.7
    torch.manual_seed(5)
    first, second = (torch.randint(2**32, (2,), dtype=torch.int64) for _ in range(2))
    torch.manual_seed(5)
    found = [attend(query, key, value, mask, dropout=rate, training=True)[0] for _ in range(2)]
    torch.manual_seed(5)
    again = attend(query, key, value, mask, dropout=rate, training=True)[0]
    logits = torch.where(mask, query @ key.mT * 6**-0.5, torch.finfo(torch.float32).min)
    for output, drawn in zip(found, (first, second), strict=True):
        keep = torch.asarray(aa.random.bernoulli(drawn, 1.0 - rate, (2, 4, 9, 9)))
        expected = (logits.softmax(-1) * keep / (1.0 - rate)) @ value
        torch.testing.assert_close(output, expected.transpose(1, 2), atol=2e-6, rtol=1e-5)
        assert abs(float(keep.float().mean()) - (1 - rate)) < 0.08
        assert len({x.numpy().tobytes() for x in keep.flatten(0, 1)}) == 8  # each head and entry has bits of its own
    assert torch.equal(again, found[0])
    assert not torch.equal(*found)


def test_no_dropout_in_evaluation():
    """Some models pass their rate there, too; eager asks the layer."""
    before = torch.get_rng_state()
    query, key, value = arrays()
    before = torch.get_rng_state()
    assert torch.equal(*(attend(query, key, value, None, dropout=rate)[0] for rate in (0.5, 0.0)))
    assert torch.equal(torch.get_rng_state(), before)


# --- keywords ---


def formula(query, key, value, mask=None, scaling=6**-0.5, softcap=None, sinks=None, bias=0.0):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1).double() for x in (key, value))
    logits = query.double() @ key.mT * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits + bias
    logits = logits if mask is None else torch.where(mask, logits, torch.finfo(torch.float32).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1).double()], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).float(), weights.float()


BIAS, MASK = torch.linspace(-2, 2, 4 * 81).reshape(1, 4, 9, 9), torch.ones(9, 9, dtype=torch.bool).tril()
LOW = torch.where(MASK, 0.0, torch.finfo(torch.float32).min)
ROWS, COLUMNS = torch.arange(9)[:, None], torch.arange(9)
CHOSEN = (ROWS + torch.tensor([0, 2, 5])) % 9 * torch.ones(2, 1, 1, dtype=torch.int64)
VISIBLE = (torch.tensor([0, 4, 7])[:, None, None] == (ROWS - COLUMNS) % 9).any(0)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
KEYWORDS = {
    "nothing": ({}, {}),
    "scaling of one": ({"scaling": 1.0}, {"scaling": 1.0}),
    "scaling": ({"scaling": 0.3}, {"scaling": 0.3}),
    "scaling in a tensor": ({"scaling": torch.tensor(0.3)}, {"scaling": 0.3}),
    "soft cap": ({"softcap": 0.8}, {"softcap": 0.8}),
    "sinks": ({"s_aux": SINKS}, {"sinks": SINKS[:, None, None]}),
    "sinks of each query": ({"sinks": BIAS[..., :1]}, {"sinks": BIAS[..., :1]}),
    "causal": ({"is_causal": True}, {"mask": MASK}),
    "boolean mask": ({"attention_mask": MASK}, {"mask": MASK}),
    "a mask goes before causality": ({"attention_mask": MASK.T, "is_causal": True}, {"mask": MASK.T}),
    "floating mask": ({"attention_mask": LOW}, {"mask": MASK}),
    "position bias": ({"position_bias": BIAS}, {"bias": BIAS}),
    "position bias, causal": ({"position_bias": BIAS, "is_causal": True}, {"bias": BIAS, "mask": MASK}),
    "position bias, boolean mask": ({"position_bias": BIAS, "attention_mask": MASK}, {"bias": BIAS, "mask": MASK}),
    "position bias, floating mask": ({"position_bias": BIAS, "attention_mask": LOW}, {"bias": BIAS, "mask": MASK}),
    "window": ({"sliding_window": 3}, {"mask": (ROWS - COLUMNS).abs() < 3}),
    "window, causal": ({"sliding_window": 3, "is_causal": True}, {"mask": MASK & (ROWS - COLUMNS < 3)}),
    "wide window": ({"sliding_window": 9}, {}),
    "the mask has the window": ({"sliding_window": 3, "attention_mask": MASK}, {"mask": MASK}),
    "keys by index": ({"indices": CHOSEN}, {"mask": VISIBLE}),
    "keys by index, of a mask": ({"indices": CHOSEN, "attention_mask": LOW}, {"mask": VISIBLE & MASK}),
    "keys by index, causal": ({"indices": CHOSEN, "is_causal": True}, {"mask": VISIBLE & MASK}),
    "what models pass on": ({"position_ids": ROWS, "use_cache": True, "head_mask": None, "new": False}, {}),
}


@pytest.mark.parametrize("keywords", KEYWORDS)
def test_keywords(keywords):
    """Each against the formula in float64, with grouped heads."""
    given, meant = KEYWORDS[keywords]
    query, key, value = arrays()
    found, weights = attend(query, key, value, **{"attention_mask": None, **given})
    torch.testing.assert_close(found, formula(query, key, value, **meant)[0], atol=3e-6, rtol=0)
    assert weights is None
    assert found.is_contiguous()


def test_a_layer_says_whether_it_is_causal():
    """What is passed, else the layer's attribute, else it is not: a layer of Splinter says nothing."""
    query, key, value = arrays()
    layer, interface = torch.nn.Module(), transformers.AttentionInterface()["anyattention"]
    causal, full = formula(query, key, value, MASK)[0], formula(query, key, value)[0]
    torch.testing.assert_close(interface(layer, query, key, value, None)[0], full, atol=3e-6, rtol=0)
    layer.is_causal = True
    torch.testing.assert_close(interface(layer, query, key, value, None)[0], causal, atol=3e-6, rtol=0)
    found = interface(layer, query, key, value, None, is_causal=False)[0]
    torch.testing.assert_close(found, full, atol=3e-6, rtol=0)
    last = interface(layer, query[:, :, 8:], key, value, None)[0]  # one query follows a cache
    torch.testing.assert_close(last, full[:, 8:], atol=3e-6, rtol=0)


def test_gradients_of_a_scale_and_of_one_query_for_all_entries():
    query, key, value = arrays()
    scaling = torch.tensor(0.3, requires_grad=True)
    found = attend(query[:1], key, value, None, scaling=scaling)[0]
    torch.testing.assert_close(found, formula(query[:1], key, value, scaling=0.3)[0], atol=3e-6, rtol=0)
    found.sum().backward()
    ours, scaling.grad = scaling.grad, None
    formula(query[:1], key, value, scaling=scaling)[0].sum().backward()
    torch.testing.assert_close(ours, scaling.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"relative_bias": torch.ones(4)}, r"relative_bias, a tensor of shape \(4,\).*not known"),
        ({"tables": [torch.ones(4)]}, "tables, list"),
        ({"alibi": True}, "alibi, bool True"),
        ({"window_size": 3}, "window_size, int 3"),
        ({"cu_seq_lens_q": torch.ones(4)}, "cu_seq_lens_q.*position_ids"),
        ({"block_indices": torch.ones(4)}, "block_indices.*kernels for blocks of keys"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else "",
)
def test_what_is_not_known_is_refused(given, message):
    with pytest.raises(NotImplementedError, match=message):
        attend(*arrays(), None, **given)


def test_bad_masks_and_windows():
    query, key, value = arrays()
    with pytest.raises(TypeError, match=r"attention_mask must be boolean.*int64"):
        attend(query, key, value, torch.ones(2, 1, 9, 9, dtype=torch.int64))
    with pytest.raises(
        NotImplementedError, match="sliding_window=3 without an attention_mask, for 5 queries and 9 keys"
    ):
        attend(query[:, :, 4:], key, value, None, sliding_window=3)
    with pytest.raises(aa.ShapeError, match=r"mask \(2, 1, 9, 8\)"):
        attend(query, key, value, torch.ones(2, 1, 9, 8, dtype=torch.bool))
    with pytest.raises(aa.ShapeError, match="sinks"):
        attend(query, key, value, None, s_aux=torch.ones(3))


def test_weights_that_are_asked_for():
    """Those of eager, of the mask and after dropout; the output is as without."""
    inputs, made = given("GptOss", 24, True), model("GptOss")
    made.set_attn_implementation("eager")
    expected = made(**inputs, output_attentions=True)
    made.set_attn_implementation("anyattention")
    found = made(**inputs, output_attentions=True)
    assert len(found.attentions) == 2
    for x, y in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    assert torch.equal(found.logits, made(**inputs).logits)
    query, key, value = arrays(kv_heads=4)
    output, weights = attend(query, key, value, None, dropout=0.5, training=True, output_attentions=True)
    torch.testing.assert_close(weights @ value, output.transpose(1, 2), atol=2e-6, rtol=0)


def test_16_bits():
    """No further from the model in float32 than eager is, up to the noise of roundings: a seventh in 52 runs."""
    inputs, made = given("Gemma2", 24, True), model("Gemma2")
    seen = inputs["attention_mask"][..., None]
    truth = computed(made, "eager", inputs)[0] * seen

    @torch.no_grad()
    def error(implementation):
        made.set_attn_implementation(implementation)
        return float((made(**inputs).logits.float() * seen - truth).abs().mean())

    made.to(torch.bfloat16)
    try:
        eager, *ours = map(error, ("eager", "anyattention", name("tiled")))
    finally:
        made.to(torch.float32)
    assert 0 < max(ours) <= 1.15 * eager


def test_every_call_of_the_models_is_known():
    """Of all models of the installed Transformers: keywords of the calls, and those that eager functions read."""
    known = {*inspect.signature(attention.attend).parameters, *attention._HARMLESS, *attention._REFUSED}
    calls, read = [], set()
    for path in (Path(transformers.__file__).parent / "models").rglob("modeling_*.py"):
        if "attention_interface(" not in (text := path.read_text()):
            continue
        for call in re.findall(r"= attention_interface\((.*?)\n +\)", text, flags=re.DOTALL):
            calls.append(set(re.findall(r"^ *(\w+)=", call, flags=re.MULTILINE)))
        for line in re.findall(r"def \w*eager_attention_forward\((.*?)\*\*", text, flags=re.DOTALL):
            read |= set(re.findall(r"(\w+):", line))
    assert len(calls) > 400
    assert set().union(*calls) <= known
    assert read <= known | {"query_states", "key_states", "value_states"}
    assert sum("scaling" in call for call in calls) > 400


# --- masks ---

MASK_WINDOW = masking_utils.sliding_window_causal_mask_function(3)
ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]])
restarted = torch.cat([torch.arange(n) for n in (3, 4, 2, 5, 4)]).reshape(2, 9)
padding = torch.arange(9) >= torch.tensor([[4], [0]])
PACKED = masking_utils.packed_sequence_mask_function(ids)
MASK_FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "full": masking_utils.bidirectional_mask_function,
    "window": MASK_WINDOW,
    "wide window": masking_utils.sliding_window_causal_mask_function(30),
    "two-sided window": masking_utils.sliding_window_bidirectional_mask_function(2),
    "packed": masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, restarted), PACKED
    ),
    "packed window": masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(MASK_WINDOW, restarted), PACKED
    ),
}
PLACES = {
    "whole": {"q_length": 9, "kv_length": 9},
    "chunk": {"q_length": 3, "kv_length": 9, "q_offset": 6},
    "two queries": {"q_length": 2, "kv_length": 9, "q_offset": 7},
    "one query": {"q_length": 1, "kv_length": 9, "q_offset": 8},
    "cache of a window": {"q_length": 1, "kv_length": 3, "q_offset": 8, "kv_offset": 6},
    "empty cache": {"q_length": 4, "kv_length": 9},
}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    ("rule", "place"),  # Transformers packs without a cache only
    [(rule, place) for rule in MASK_FUNCTIONS for place in PLACES if "packed" not in rule or place == "whole"],
)
def test_rules_are_the_masks_of_transformers(rule, place, padded):
    """Element by element those that it gives to its sdpa; by rule, of no more numbers than there are keys."""
    asked = {
        **{"batch_size": 2, "mask_function": MASK_FUNCTIONS[rule], "attention_mask": padding if padded else None},
        **PLACES[place],
    }
    expected = masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False)
    mask = transformers.AttentionMaskInterface()["anyattention"](**asked, dtype=torch.float32, config=None)
    found = mask.visible
    if found is None:
        assert bool(expected.all())
    else:
        elements = sum(x.numel() for x in found.arrays()) if isinstance(found, Mask) else found.numel()
        assert elements <= 6 * 9
        dense = found.to_array(*expected.shape[-2:]) if isinstance(found, Mask) else found
        assert np.array_equal(np.broadcast_to(dense.tolist(), expected.shape), expected.numpy())
    assert torch.equal(mask + 0.0, masking_utils.eager_mask(**asked))  # what a model does with it sees all elements


def test_masks_without_a_rule():
    """Of a user's own function, of positions that another function would have to know, of chunks: boolean arrays."""
    chunks = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
    either = masking_utils.or_masks(masking_utils.causal_mask_function, MASK_WINDOW)
    alone = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, restarted)
    make = transformers.AttentionMaskInterface()["anyattention"]
    for function in (chunks, either, alone, lambda b, h, i, j: (i + j) % 2 == 0):
        asked = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function, "attention_mask": padding}
        asked["use_vmap"] = function is either  # as for what users join to a mask
        mask = make(**asked)
        assert torch.equal(mask.visible, masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False))
        assert torch.equal(mask + 0.0, masking_utils.eager_mask(**asked))
    for place in ({"q_offset": 2}, {"q_offset": 2, "kv_offset": 2}):  # ids are of the whole
        asked = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": PACKED, **place}
        assert torch.equal(make(**asked).visible, masking_utils.sdpa_mask(**asked, allow_is_causal_skip=False))


@pytest.mark.parametrize(("kind", "dtype"), [("Mistral", torch.bool), ("GptOss", torch.float32)])
def test_masks_of_a_static_cache(kind, dtype):
    """Ordinary tensors, since the model may be compiled; boolean for models that take those, as sdpa's have to."""
    make = transformers.AttentionMaskInterface()["anyattention"]
    found = make(1, 3, 9, q_offset=torch.tensor(4), config=model(kind).config)
    assert type(found) is torch.Tensor
    assert found.dtype == dtype
    assert (found if dtype == torch.bool else found == 0)[0, 0].sum(-1).tolist() == [5, 6, 7]


def test_no_mask_where_nothing_is_hidden():
    """None for models without causality, as Transformers allows; never for causal ones, which may be cut afterwards."""
    make = transformers.AttentionMaskInterface()["anyattention"]
    full = {"mask_function": masking_utils.bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    assert make(2, 9, 9, **full) is None
    assert make(2, 9, 9, attention_mask=torch.ones(2, 9, dtype=torch.bool), **full) is None
    assert make(2, 9, 9, attention_mask=padding, **full) is not None
    assert make(2, 9, 9, allow_is_causal_skip=True) is not None


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2", "Bert", "ModernBert"])
def test_models_hand_rules_to_attention(kind, monkeypatch):
    """Nothing between the mask function and attention makes the mask dense, in training either."""
    made, inputs = model(kind), given(kind, 24, True)
    monkeypatch.setattr(RuleMask, "dense", lambda self: pytest.fail("the mask became dense"))
    computed(made, "anyattention", inputs)
    made.train()
    computed(made, "anyattention", inputs)
    made.eval()


def test_packed_sequences():
    """Positions that start again keep sequences apart, as with eager, by rule."""
    made = model("Mistral")
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(3, 50, (2, 9)), "position_ids": restarted, "use_cache": False}
    expected = computed(made, "eager", inputs)
    assert_alike(computed(made, "anyattention", inputs), expected)
    assert not torch.allclose(computed(made, "eager", {"input_ids": inputs["input_ids"]})[0], expected[0], atol=1e-2)


# --- programs ---


def test_compiled():
    """In one graph, as with sdpa, forward and backward, with a mask."""
    made, inputs = model("Mistral", num_hidden_layers=1), given("Mistral", 24, True)
    seen = inputs["attention_mask"]
    expected = computed(made, "eager", inputs, seen)
    program = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert_alike(computed(made, "anyattention", inputs | {"use_cache": False}, seen, program), expected)


def test_compiled_dropout():
    """The generator draws the same keys in a program, and the program drops what it does outside of one."""
    made, (ids, *_) = model("Llama", num_hidden_layers=1, attention_dropout=0.3), given("Llama", 24, False).values()
    made.set_attn_implementation("anyattention")
    program = torch.compile(made.train(), backend="aot_eager", fullgraph=True)

    def output(function, seed):
        torch.manual_seed(seed)
        return function(ids, use_cache=False).logits

    try:
        expected = output(made, 0)
        torch.testing.assert_close(output(program, 0), expected, atol=1e-5, rtol=0)
        assert not torch.allclose(output(program, 1), expected, atol=1e-2)
    finally:
        made.eval()


# --- names and versions ---


def test_names():
    huggingface.register("ours", "tiled")
    huggingface.register("ours", "exact")  # the last counts
    assert transformers.AttentionInterface()["ours"].keywords == {"implementation": "exact"}
    for taken in ("sdpa", "eager", "flash_attention_2", "my-flash", "paged|eager", "flex_attention", "a/b", "", None):
        with pytest.raises(ValueError, match="pass a name without flash, sdpa"):
            huggingface.register(taken)
    with pytest.raises(ValueError, match="implementation='flash' is unknown"):
        huggingface.register("other", "flash")
    assert "other" not in transformers.AttentionInterface()
    transformers.AttentionInterface.register("theirs", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="'theirs' is registered with Transformers by somebody else"):
        huggingface.register("theirs")
    del (
        transformers.AttentionInterface._global_mapping["theirs"],
        transformers.AttentionInterface._global_mapping["ours"],
    )
    del transformers.AttentionMaskInterface._global_mapping["ours"]


def test_versions(monkeypatch):
    package = sys.modules["transformers"]
    monkeypatch.setattr(package, "__version__", "5.9.1")
    with pytest.raises(ImportError, match=r"transformers 5.9.1 is too old: .* 5.20 .*anyattention\[huggingface\]"):
        huggingface.register()
    monkeypatch.setattr(package, "__version__", "6.0.0.dev0")
    huggingface.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers is not installed, but the integration needs"):
        huggingface.register()
