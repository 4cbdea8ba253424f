"""The framework of a function: by what it shows, and said; where nothing shows it, it has to be named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import anyattention
from anyattention_conformance import targets
from anyattention_conformance.adapters import jax_nn
from anyattention_conformance.inference import UnclearError, infer
from anyattention_conformance.targets import TargetError


def by_annotation(query: torch.Tensor, key, value):
    return np.sqrt(query)


def by_annotation_as_text(query: "jax.Array | None", key, value):
    return query


def by_code(query, key, value):
    return jnp.exp(query) + np.sqrt(2)


def by_an_import(query, key, value):
    import torch.nn.functional as functional

    return functional.softmax(query, -1)


def helper(x):
    return torch.exp(x)


def by_a_helper(query, key, value):
    return helper(query)


def by_methods(query, key, value):
    return query.masked_fill(key, 0.0).softmax(-1)


def by_methods_beside_numpy(query, key, value):
    return (query @ key.transpose(-1, -2) / np.sqrt(query.shape[-1])).softmax(-1) @ value


def of_numpy(query, key, value):
    return np.exp(query).astype(query.dtype) + query.dtype.type(0)


class Module(torch.nn.Module):
    def forward(self, query, key, value):
        return query


class Layer:
    def __call__(self, query, key, value):
        return jnp.exp(query)


@pytest.mark.parametrize(
    ("function", "name", "why"),
    [
        (by_annotation, "torch", "its annotations name torch"),
        (by_annotation_as_text, "jax", "its annotations name jax"),
        (by_code, "jax", "it uses jax"),
        (by_an_import, "torch", "it uses torch"),
        (by_a_helper, "torch", "it uses torch"),
        (by_methods, "torch", "only those of torch have .masked_fill and .softmax"),
        (by_methods_beside_numpy, "torch", "only those of torch have .softmax"),
        (of_numpy, "numpy", "it uses numpy"),
        (Module(), "torch", "its class is from torch"),
        (Module().forward, "torch", "its class is from torch"),
        (Layer(), "jax", "it uses jax"),
        (functools.partial(by_code), "jax", "it uses jax"),
        (jax.jit(of_numpy), "jax", ""),
        (torch.nn.functional.scaled_dot_product_attention, "torch", "it is from torch"),
        (jax_nn.attention, "jax", "it uses jax"),
    ],
)
def test_what_is_inferred_and_why(function, name, why):
    found, said = infer(function)
    assert found == name
    assert why in said


def nothing(query, key, value):
    return query


def both(query: "torch.Tensor", key: "jax.Array", value):
    return torch.exp(query) + jnp.exp(key)


@pytest.mark.needs("jax", "torch")  # both of which this file imports
@pytest.mark.parametrize("function", [nothing, both, anyattention.dot_product_attention])
def test_what_is_unclear_has_to_be_named(function):
    with pytest.raises(UnclearError):
        infer(function)
    with pytest.raises(TargetError, match=r"cannot be seen which arrays .* takes .*: pass --framework .* numpy, jax"):
        targets.make(function)
    assert targets.make(function, "torch").inferred == ""


def test_what_was_inferred_is_said():
    target = targets.make(by_code)
    assert target.about["framework"] == "jax"
    assert target.about["inferred"] == "it uses jax"
