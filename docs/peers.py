"""What other attentions do with arguments that ``flax.linen`` lacks, measured.

``python docs/peers.py`` writes peers.json. The kit compares with ``flax.linen``, which has neither a causal flag nor
grouped heads, and whose dropout most others lack. Each peer is called here by its own names. Keras has one backend in a
process, so each group of peers has a process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = Any
RECORD = Path(__file__).with_name("peers.json")
GROUPS = ("keras-jax", "keras-numpy", "keras-torch", "others")
CAUSAL = {"is_causal": True}
PACKAGES = ("flax", "jax", "keras", "mlx", "torch", "transformers")


@dataclass(frozen=True)
class Peer:
    """An attention that takes and returns NumPy's ``[batch, length, heads, depth]``, and its own names of options.

    An option is what its call takes beside query, key and value; None where the peer has no such argument.
    """

    call: Callable[..., Array]
    causal: dict[str, Any] | None = None
    grouped: dict[str, Any] = field(default_factory=dict)
    dropout: dict[str, Any] | None = None
    mask: str | None = "mask"


def random(*shape: int) -> Array:
    """Normal draws in float32."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def causal(peer: Peer) -> str:
    """Where the diagonal lies when 3 queries meet 5 keys."""
    if peer.causal is None:
        return "no argument"
    seen = peer.call(np.zeros((1, 3, 2, 5), np.float32), random(1, 5, 2, 5), one_hot(1, 5), **peer.causal)[0, :, 0] > 0
    aligned = {"top-left": np.tri(3, 5, dtype=bool), "bottom-right": np.tri(3, 5, 2, dtype=bool)}
    return next((name for name, mask in aligned.items() if (seen == mask).all()), "other")


def grouped(peer: Peer) -> str:
    """What becomes of 4 query heads beside 2 key heads."""
    query, key = random(1, 3, 4, 8), random(1, 5, 2, 8)
    outcomes = []
    for options in ({}, peer.grouped) if peer.grouped else ({},):
        try:
            found = peer.call(query, key, key, **options)
        except Exception as error:
            outcomes.append(type(error).__name__)
            continue
        repeated = peer.call(query, key.repeat(2, axis=2), key.repeat(2, axis=2))
        computes = "computed" if np.abs(found - repeated).max() < 1e-5 else "computed in another order of heads"
        asked = ", ".join(f"{name}={value}" for name, value in options.items())
        outcomes.append(f"{computes} with `{asked}`" if asked else computes)
    return ", ".join(outcomes)


def dropout(peer: Peer) -> str:
    """Whose mask drops weights at a rate of 0.5, and whether it is Flax's."""
    if peer.dropout is None:
        return "no argument"
    from anyattention import dot_product_attention
    from anyattention import random as keys

    query, key, value = np.zeros((2, 8, 2, 8), np.float32), np.zeros((2, 8, 2, 8), np.float32), one_hot(2, 8)
    kept = peer.call(query, key, value, **peer.dropout) > 0
    first = np.broadcast_to(kept[:1, :, :1], kept.shape)
    shared = (kept == first).all()
    apart = len({x.tobytes() for x in np.moveaxis(kept, 2, 1).reshape(4, -1)}) == 4
    flax = dot_product_attention(query, key, value, dropout_rate=0.5, dropout_rng=keys.key(0)) > 0
    words = "one mask for all" if shared else "a mask for each batch entry and head" if apart else "other"
    return f"{words}, Flax's bits" if (kept == flax).all() else words


def float_mask(peer: Peer) -> str:
    """What a mask of zeros and ones in float32 means."""
    if peer.mask is None:
        return "no argument"
    query, key, mask = random(1, 3, 2, 8), random(1, 5, 2, 8), np.tri(3, 5, 2)[None, None]
    mask[0, 0, 1, 0] = 0
    try:
        found = peer.call(query, key, key, **{peer.mask: mask.astype(np.float32)})
    except Exception as error:
        return type(error).__name__
    from anyattention import dot_product_attention

    meanings = {"truthy is visible": {"mask": mask}, "added to the logits": {"bias": mask.astype(np.float32)}}
    for name, options in meanings.items():
        if np.abs(found - dot_product_attention(query, key, key, **options)).max() < 1e-5:
            return name
    return "other"


def one_hot(batch: int, length: int) -> Array:
    """Values whose output is the weights, for two heads."""
    return np.broadcast_to(np.eye(length, dtype=np.float32)[:, None], (batch, length, 2, length)).copy()


def not_finite(name: str) -> dict[str, dict[str, str]]:
    """Where an adapter of the kit is finite and Flax is not, or the reverse, in each case about such numbers.

    The kit accepts both where the truth is finite, so its verdict does not tell.
    """
    from anyattention_conformance.adapters import ADAPTERS
    from anyattention_conformance.cases import CASES
    from anyattention_conformance.claims import QUANTITIES
    from anyattention_conformance.oracles import Golden
    from anyattention_conformance.targets import load

    target, found = load(name, ADAPTERS[name].framework), {}
    for case in (case for case in CASES if case.group == "infinities" or case.id == "overflow-to-infinity"):
        flax, outcome = Golden().answer(case, case.dtypes[0]), target.run(case, case.dtypes[0], case.gradients)
        if outcome.kind != "answer":
            continue
        pairs = {"output": (outcome.output, flax.output)}
        for of, gradient in (outcome.gradients or {}).items():
            pairs[QUANTITIES[of]] = (gradient, flax.gradients[of])
        words = {quantity: _not_finite(*pair) for quantity, pair in pairs.items()}
        found[case.id] = {quantity: x for quantity, x in words.items() if x}
    return {case: x for case, x in found.items() if x}


def _not_finite(actual: Array, flax: Array) -> str:
    ours, theirs = (~np.isfinite(x.astype(np.float32)) for x in (actual, flax))
    if (ours == theirs).all():
        return ""
    if (ours & ~theirs).any():
        return "not finite where Flax is" if not (theirs & ~ours).any() else "not finite in other places than Flax"
    return "finite" if not ours.any() else "finite in more places than Flax"


QUESTIONS = {"causal": causal, "grouped heads": grouped, "dropout": dropout, "float mask": float_mask}


def through(function: Any, put: Any, get: Any, heads_first: bool = False) -> Callable[..., Array]:
    """A function of another library, for NumPy's arrays; `heads_first` if its are ``[batch, heads, length, depth]``."""

    def moved(x: Array) -> Array:
        return x.swapaxes(1, 2) if heads_first else x

    def call(*arrays: Array, **options: Any) -> Array:
        options = {name: put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        return moved(get(function(*(put(moved(x)) for x in arrays), **options)))

    return call


def keras(backend: str) -> dict[str, Peer]:
    """Keras on one of its backends."""
    os.environ["KERAS_BACKEND"] = backend
    from keras import ops

    call = through(ops.dot_product_attention, ops.convert_to_tensor, ops.convert_to_numpy)
    return {f"keras-{backend}": Peer(call, CAUSAL)}


def others() -> dict[str, Peer]:
    """All that can share a process."""
    import jax
    import mlx.core as mx
    import torch
    from flax import linen, nnx
    from torch.nn.attention.flex_attention import flex_attention
    from transformers import AttentionInterface
    from transformers.models.t5.modeling_t5 import eager_attention_forward

    from anyattention import dot_product_attention

    def on_jax(function: Any) -> Callable[..., Array]:
        return through(function, jax.numpy.asarray, np.asarray)

    def on_torch(function: Any) -> Callable[..., Array]:
        return through(function, torch.tensor, np.asarray, heads_first=True)

    def scaled(query: Array, *arrays: Array, **options: Any) -> Array:
        return mx.fast.scaled_dot_product_attention(query, *arrays, scale=query.shape[-1] ** -0.5, **options)

    def layer(function: Any) -> Callable[..., Array]:
        def call(query: Array, key: Array, value: Array, mask: Array = None, **options: Any) -> Array:
            groups = query.shape[1] // key.shape[1]
            module = SimpleNamespace(is_causal=False, num_key_value_groups=groups, training=True)
            return function(module, query, key, value, mask, **options)[0].transpose(1, 2)

        return on_torch(call)

    torch.manual_seed(0)
    flax = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    gqa, sdpa = {"enable_gqa": True}, torch.nn.functional.scaled_dot_product_attention
    ours = {
        "numpy": dot_product_attention,
        "jax": on_jax(dot_product_attention),
        "torch": through(dot_product_attention, torch.tensor, np.asarray),
    }
    return {
        "flax-linen": Peer(on_jax(linen.dot_product_attention), dropout=flax),
        "flax-nnx": Peer(on_jax(nnx.dot_product_attention), CAUSAL, dropout=flax),
        "jax-nn": Peer(on_jax(jax.nn.dot_product_attention), CAUSAL),
        "mlx-fast": Peer(through(scaled, mx.array, np.asarray, heads_first=True), {"mask": "causal"}),
        "torch-sdpa": Peer(on_torch(sdpa), CAUSAL, gqa, {"dropout_p": 0.5}, "attn_mask"),
        "torch-flex": Peer(on_torch(flex_attention), grouped=gqa, mask=None),
        "huggingface-eager": Peer(layer(eager_attention_forward), dropout={"dropout": 0.5}),
        "huggingface-sdpa": Peer(layer(AttentionInterface()["sdpa"]), CAUSAL, dropout={"dropout": 0.5}),
        **{f"anyattention-{library}": Peer(function, CAUSAL, dropout=flax) for library, function in ours.items()},
    }


def answers(group: str) -> dict[str, Any]:
    """What a group of peers does, measured in this process."""
    from anyattention_conformance.adapters import ADAPTERS

    peers = others() if group == "others" else keras(group.removeprefix("keras-"))
    adapters = [name for name in ADAPTERS if not name.startswith("keras")] if group == "others" else [group]
    return {
        "answers": {name: {question: ask(x) for question, ask in QUESTIONS.items()} for name, x in peers.items()},
        "not finite": {name: not_finite(name) for name in adapters},
    }


def measured(group: str) -> dict[str, Any]:
    """What a group of peers does, measured in a process of its own."""
    done = subprocess.run([sys.executable, __file__, group], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.stdout.write(json.dumps(answers(sys.argv[1])) + "\n")
    else:
        record: dict[str, Any] = {"date": date.today().isoformat(), "versions": {}, "answers": {}, "not finite": {}}
        for package in PACKAGES:
            record["versions"][package] = version(package)
        for each in GROUPS:
            for kind, found in measured(each).items():
                record[kind] |= found
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
