"""A sequence over the devices of a mesh: numbers, what travels, memory, derivatives, and what is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("jax_mesh_program.py")
pytestmark = pytest.mark.slow


def run(name, given=None, devices=4, quickly=True):
    """What a function of the program finds, on so many devices; XLA compiles faster where programs are small."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" if quickly else ""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", PROGRAM, name, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


RING = (
    *("none", "causal", "window", "window to the left", "rows without keys", "lengths", "lengths of both", "segments"),
    *("segments, causal", "either", "not", "rule", "dense mask", "row of a mask", "bias", "bias, causal"),
    *("row of a bias", "row of a bias, causal", "column of a bias", "number as a bias", "slopes", "table"),
    *("grouped heads", "scale and cap", "sinks", "sinks of rows", "dropout", "dropout of each head"),
    *("dropout, causal", "dropout, rows without keys", "dropout, bias", "hidden NaN", "bfloat16", "float16"),
    "more keys",
)
ZIGZAG = ("causal", "rows without keys", "segments, causal", "row of a mask", "bias, causal", "row of a bias, causal")
FEW = ("none", "causal", "segments", "row of a bias", "bias, causal", "sinks of rows", "dropout of each head")
PLACES = {
    "ring": [("ring", name) for name in RING[:18]],
    "ring, too": [("ring", name) for name in RING[18:]],
    "gather": [("gather", name) for name in (*FEW, "grouped heads", "hidden NaN", "bfloat16", "rows without keys")],
    "reduce": [("reduce", name) for name in (*FEW, "table", "slopes", "hidden NaN", "bfloat16", "rows without keys")],
    "by rule": [("line", name) for name in ("one query", "three queries", "causal")],
    "batch": [("batch", name) for name in ("none", "segments, causal", "bias, causal", "dropout of each head")],
    "heads": [("heads", name) for name in ("bias, causal", "dropout of each head", "grouped heads")],
    "explicit": [("explicit", name) for name in ("none", "dropout, causal", "segments", "bias, causal")],
    "inside": [
        *(("inside", name) for name in ("none", "segments, causal", "bias, causal", "row of a bias", "slopes")),
        *(("inside", name) for name in ("dropout, causal", "sinks", "grouped heads", "hidden NaN", "number as a bias")),
    ],
    "inside, other ways": [
        *(("inside, gather", name) for name in ("causal", "row of a bias", "dropout of each head")),
        *(("inside of both", name) for name in ("segments, causal", "none", "dropout")),
    ],
}


@pytest.mark.parametrize("place", PLACES)
def test_numbers(place):
    """Output and all gradients are those of one device, and lie where query, key and value lie."""
    found = run("cases", PLACES[place])
    assert len(found) == len(PLACES[place])
    assert not {name: x["wrong"] for name, x in found.items() if x["wrong"]}
    if place in ("ring", "ring, too", "batch", "heads", "explicit"):
        assert all(len(set(x["spec"])) == 1 and "seq" in x["spec"][0] for x in found.values()), found
    if place == "ring":
        assert [name for name in RING[:18] if found[f"ring: {name}"]["exchange"] == "zigzag ring"] == [*ZIGZAG]
    if place == "by rule":
        assert [x["exchange"] for x in found.values()] == ["reduce", "reduce", "gather"]


def test_what_travels():
    """The ring's programs have few permutes, and no other collective, as many on eight devices as on four."""
    asked = [(512 * n, n, name, "ring") for name in ("none", "lengths of one", "causal") for n in (4, 8)]
    found = run("compiled", asked, devices=8)
    for most, four, eight in zip(((2, 8), (3, 10), (15, 40)), found[::2], found[1::2], strict=True):
        for count, kind in zip(most, ("forward", "gradient"), strict=True):
            assert four[kind]["collectives"] == eight[kind]["collectives"]
            assert [*four[kind]["collectives"]] == ["collective-permute"]
            assert four[kind]["collectives"]["collective-permute"] <= count


def test_memory():
    """That of a device depends on its part of the sequence alone; MiB of temporary arrays, as XLA plans them."""
    asked = [(16384, 4), (32768, 8), (131072, 8), (262144, 16)]
    found = run("compiled", [(*one, "none", "ring") for one in asked], devices=16, quickly=False)
    small, same, large, as_large = (x["gradient"]["temporary"] for x in found)
    assert same == pytest.approx(small, rel=0.01)
    assert small <= 60
    assert as_large == pytest.approx(large, rel=0.01)
    assert large <= 200
    assert [round(x["gradient"]["results"]) for x in found] == [6, 6, 24, 24]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32")])
def test_keys_travel_in_their_dtype(dtype, kind):
    found = run("travelling", dtype)
    assert found == [f"2x4x16x16x{kind}"] * 2


def test_derivatives():
    """Of a ring one, in reverse mode, that may be mapped; gather and reduce have all of them."""
    found = run("modes")
    advice = "wrap the call in config(exchange='gather'), which has all derivatives, in memory for all keys"
    assert found.pop("forward_mode, ring") == f"the ring of sequence_axis has no forward-mode derivative: {advice}"
    assert found.pop("second, ring") == f"the ring of sequence_axis has no second derivative: {advice}"
    assert len(found) == 10
    assert {name: x for name, x in found.items() if not float(x) < 1e-5} == {}


def test_decode():
    """Each step adds up over the devices, in a loop that XLA compiles; no device gets the keys of another."""
    found = run("decode")
    assert found["error"] < 1e-6
    assert [*found["collectives"]] == ["all-reduce"]
    assert found["collectives"]["all-reduce"] <= 3


def test_dropout_bits():
    found = run("bits")
    assert len(found) == 18
    assert all(found.values()), found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_beside_that_of_flax(dtype):
    """C3: at most twice Flax's own."""
    assert max(run("error_of_flax", dtype).values()) <= 2.0


def test_two_processes():
    """Each has two of the devices of a ring."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    program = PROGRAM.with_name("jax_processes_program.py")
    both = [
        subprocess.Popen(
            [sys.executable, program, address, str(n)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        for process in both:
            found, said = process.communicate(timeout=60)
            assert not process.returncode, said[-2000:]
            count, error = found.split()[-2:]  # after what gloo says
            assert count == "8"
            assert float(error) < 2e-5
    finally:
        for process in both:
            process.kill()


def test_refusals():
    divides = "does not divide by the 4 devices of mesh axis 'seq': pad to 128 and hide the rest with masks.LengthMask"
    expected = {
        "no mesh": "ValueError: there is no mesh axis 'seq': the mesh has none: call it within `with jax.set_mesh(mesh",
        "no such axis": "ValueError: there is no mesh axis 'context': the mesh has seq",
        "no name": "TypeError: sequence_axis=3: for JAX's arrays it is the name of an axis of the mesh",
        "queries": f"ValueError: q_length 126 {divides}",
        "keys": f"ValueError: kv_length 126 {divides}",
        "columns": "ShapeError: bias has 32 columns, but kv_length of the whole is 128",
        "columns of parts": "ShapeError: bias has 32 columns, but kv_length of the whole is 128 (4 parts of 32)",
        "rows of parts": "ShapeError: mask has 128 rows, but this device has 32 queries",
        "parts of one": "ValueError: q_length 4 is one for each device of mesh axis 'seq': a ring needs two or more. ",
        "exact": "NotImplementedError: implementation='exact' cannot serve this call: it gives no row",
        "fused": "NotImplementedError: implementation='fused' cannot serve this call: ",
        "dropout of parts": "NotImplementedError: dropout of each head, of parts along mesh axis 'data' too: ",
        "another axis": "ValueError: the length of query is sharded over data, not over mesh axis 'seq'",
        "numpy": "TypeError: sequence_axis='seq': arrays of numpy are on one device. ",
        "unknown exchange": "ValueError: exchange='all' is unknown: pass one of ring, gather, reduce",
    }
    found = run("refusals")
    assert {name: text for name, text in found.items() if not text.startswith(expected[name])} == {}
    assert found.keys() == expected.keys()
