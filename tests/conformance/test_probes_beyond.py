"""Planted mistakes in what Flax lacks, as people write attention: each is named; right functions are not."""

import numpy as np
import pytest

from anyattention_conformance import probes, suite, targets
from anyattention_conformance.adapters import ADAPTERS
from anyattention_conformance.beyond import attention
from anyattention_conformance.case import BEYOND
from anyattention_conformance.claims import Claims
from anyattention_conformance.variants import VARIANTS

NAMED = {x.name for x in VARIANTS if x.case in probes.BEYOND_CALLS}


class Port:
    """An attention with the heads in second place; subclasses make a mistake."""

    cap_before = "bias"

    def __call__(
        self, query, key, value, bias=0.0, mask=True, *, scale=None, softcap=None, sinks=None, offset=None, window=None
    ):
        group = query.shape[2] // key.shape[2]
        q, k, v = (np.swapaxes(x, 1, 2).astype(np.float64) for x in (query, key, value))
        k, v = (self.repeat(x, group) for x in (k, v))
        logits = q @ np.swapaxes(k, -1, -2)
        logits = self.capped(logits, softcap, "scale")
        logits = self.scaled(logits, q.shape[-1] ** 0.5, scale)
        logits = self.capped(logits, softcap, "bias") + bias
        logits = self.capped(logits, softcap, "mask")
        positions = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])
        offsets = np.asarray(0 if offset is None else offset)[..., None, None, None]
        if window is not None:
            mask = mask & self.inside(*positions, offsets, *window)
        elif offset is not None:
            mask = mask & self.seen(*positions, offsets)
        logits = self.capped(np.where(mask, logits, -1e30), softcap, "softmax")
        column = np.full((*logits.shape[:-1], 1), -np.inf)
        if sinks is not None:
            column[...] = self.sink(sinks, q.shape[-1] ** 0.5)[:, None, None]
        logits = np.concatenate((logits, column), axis=-1)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        output = self.output(weights / weights.sum(axis=-1, keepdims=True), v)
        return np.swapaxes(output, 1, 2).astype(query.dtype)

    def repeat(self, x, group):
        return np.repeat(x, group, axis=1)

    def scaled(self, logits, root, scale):
        return logits / root if scale is None else logits * scale

    def capped(self, logits, cap, before):
        return logits if cap is None or before != self.cap_before else self.cap(logits, cap)

    def cap(self, logits, cap):
        return cap * np.tanh(logits / cap)

    def seen(self, i, j, offset):
        return j <= i + offset

    def inside(self, i, j, offset, left, right):
        return (i + offset - left <= j) & (j <= i + offset + right)

    def sink(self, sinks, root):
        return sinks

    def output(self, weights, value):
        return weights[..., :-1] @ value


class AfterMask(Port):
    """The cap is right beside a bias, and comes last beside a mask."""

    def __call__(self, query, key, value, bias=0.0, mask=None, *, softcap=None):
        self.cap_before = "bias" if mask is None else "softmax"
        return super().__call__(query, key, value, bias, True if mask is None else mask, softcap=softcap)


def port(**mistake):
    """A port whose methods are these functions."""
    return type("Wrong", (Port,), {name: staticmethod(x) if callable(x) else x for name, x in mistake.items()})()


PLANTED = {
    "scale beside the root": port(scaled=lambda x, root, scale: x / root * (1 if scale is None else scale)),
    "scale ignored": port(scaled=lambda x, root, scale: x / root),
    "divided by the scale": port(scaled=lambda x, root, scale: x / (root if scale is None else scale)),
    "cap ignored": port(cap=lambda x, cap: x),
    "cap without division": port(cap=lambda x, cap: cap * np.tanh(x)),
    "cap without product": port(cap=lambda x, cap: np.tanh(x / cap)),
    "capped by clipping": port(cap=lambda x, cap: np.clip(x, -cap, cap)),
    "cap before the scale": port(cap_before="scale"),
    "cap after the bias": port(cap_before="mask"),
    "cap after the mask": AfterMask(),
    "sinks ignored": port(sink=lambda sinks, root: np.full_like(sinks, -np.inf)),
    "sink of zero": port(sink=lambda sinks, root: np.zeros_like(sinks)),
    "sink with a value": port(output=lambda weights, v: weights[..., :-1] @ v + weights[..., -1:] * v[:, :, :1]),
    "sinks scaled": port(sink=lambda sinks, root: sinks / root),
    "groups by turns": port(repeat=lambda x, group: np.tile(x, (1, group, 1, 1))),
    "offset ignored": port(seen=lambda i, j, offset: j <= i),
    "offset off by one": port(seen=lambda i, j, offset: j < i + offset),
    "offset from the end": port(seen=lambda i, j, offset: j <= i + j.size - i.size),
    "offset subtracted": port(seen=lambda i, j, offset: j <= i - offset),
    "offset of one entry": port(seen=lambda i, j, offset: j <= i + offset.reshape(-1)[0]),
    "window one short": port(
        inside=lambda i, j, offset, left, right: (i + offset - left < j) & (j <= i + offset + right)
    ),
    "window open": port(inside=lambda i, j, offset, left, right: i + offset - left <= j),
    "window not moved": port(inside=lambda i, j, offset, left, right: (i - left <= j) & (j <= i + right)),
    "window moved on one side": port(
        inside=lambda i, j, offset, left, right: (i - left <= j) & (j <= i + offset + right)
    ),
}


def names(function, framework="numpy", supports=BEYOND):
    target, answers = targets.make(function, framework), {}
    for case in probes.calls(supports):
        answers.setdefault(case.id, []).append(target.run(case, "float32", False))
    return [x.probe for x in probes.diagnose(answers)]


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_mistake_is_named(name):
    assert names(PLANTED[name]) == [name]


def test_every_mistake_that_is_known_is_planted():
    assert PLANTED.keys() == NAMED


@pytest.mark.parametrize("function", [Port(), attention])
def test_no_other_function_is_told_of_a_mistake(function):
    assert names(function) == []


@pytest.mark.needs("mlx")
@pytest.mark.parametrize("name", ["anyattention-numpy", "anyattention-numpy-tiled", "mlx-fast"])
def test_ours_and_others_are_not(name):
    supports = BEYOND if name.startswith("any") else frozenset({"scale", "sinks", "grouped heads"})
    assert names(targets.load(name).function, ADAPTERS[name].framework, supports) == []


def test_a_mistake_in_flax_and_one_beyond():
    both = port(scaled=lambda x, root, scale: x if scale is None else x * scale, cap=lambda x, cap: x)
    assert names(both) == ["no scale", "cap ignored"]


def test_the_report_tells_the_cause():
    supports = frozenset({"soft cap"})
    runs = [run for run in suite.runs("smoke", supports=supports) if run.case.id == "soft-cap"][:1]
    target = targets.make(PLANTED["cap before the scale"], "numpy")
    report = suite.certify_here(target, runs, claims=Claims(supports=supports))
    (diagnosis,) = report.diagnosis
    assert diagnosis.cause == "It caps the logits before it scales them."
    assert "Scale first, then cap" in diagnosis.mend
