"""Hugging Face's models with our attention in place of their own, padding included: the same numbers and gradients."""

import pytest
import torch

import anyattention as aa

transformers = pytest.importorskip("transformers")
masking = pytest.importorskip("transformers.masking_utils")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0)),
    "llama": (transformers.LlamaModel, transformers.LlamaConfig(**SIZES, num_key_value_heads=2)),
}


@pytest.fixture(params=["exact", "tiled", "fused"])
def implementation(request):
    """Registers our attention, which gets masks as these models make them: a bias of zeros and the dtype's minimum."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        arrays = [x.transpose(1, 2) for x in (query, key, value)]
        calls.append(attention_mask.min().item())
        output = aa.dot_product_attention(*arrays, bias=attention_mask, implementation=request.param)
        return output, None

    transformers.AttentionInterface.register("ours", attention)
    transformers.AttentionMaskInterface.register("ours", masking.eager_mask)
    yield request.param
    assert set(calls) == {torch.finfo(torch.float32).min}


@pytest.mark.parametrize("name", MODELS)
def test_padding(implementation, name):
    """Left padding, under causality too, and a whole sequence of it: rows whose biases are all at the minimum."""
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(config).eval()
    ids, shown = torch.randint(0, 50, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    shown[0, :10] = 0
    shown[2] = 0
    answers = []
    for attention in ("eager", "ours"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=shown).last_hidden_state
        (output**2 * torch.linspace(0, 1, 64)).sum().backward()
        answers.append([output.detach(), *(x.grad for x in model.parameters() if x.grad is not None)])
    torch.testing.assert_close(answers[1][0], answers[0][0], rtol=1e-5, atol=1e-5)
    largest = max(float(x.abs().max()) for x in answers[0][1:])
    assert len(answers[0]) > 15
    for actual, expected in zip(answers[1][1:], answers[0][1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6 * largest)
