"""The worker threads of NumPy's tiles: several callers, the limit of BLAS, errors, and a forked process."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl

import anyattention as aa
from anyattention_backends.numpy.threads import _guard
from anyattention_backends.numpy.tiles import NumPyTiles

TIMEOUT = 20.0  # seconds, after which a test fails rather than hang
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
several_workers = pytest.mark.skipif(CPUS < 2, reason="one CPU has one worker")


class Fault(Exception):
    """What tiles are made to raise."""


def arguments(dtype="float32", seed=0, length=520, **options):
    """Eight tiles at the least: one for each head of each batch."""
    random = np.random.default_rng(seed)
    drawn = {name: random.standard_normal((2, length, 4, 8)).astype(dtype) for name in ("query", "key", "value")}
    return drawn | options


def attend(given):
    return aa.dot_product_attention(**given, implementation="tiled")


def limits():
    """The number of threads of each BLAS library that is loaded, as everybody sees it."""
    return {x["filepath"]: x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"}


def held():
    """Whether BLAS is held to one thread: NumPy's, whatever others are loaded."""
    if _guard.limits is None:
        return min(limits().values()) == 1
    return min(_guard.limits.methods[type(library)][1](library) for library in _guard.limits.shared) == 1


@pytest.fixture(autouse=True)
def two_threads():
    """BLAS with two threads before and after, whatever the environment says."""
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = limits()
        assert not held()
        yield
        assert limits() == before


@pytest.fixture
def in_tiles(monkeypatch):
    """Functions by dtype; each tile of the dtype calls the function on its way."""
    hooks, row_sum = {}, NumPyTiles.row_sum

    def hooked(self, x):
        if x.dtype.name in hooks:
            hooks[x.dtype.name]()
        return row_sum(self, x)

    monkeypatch.setattr(NumPyTiles, "row_sum", hooked)
    return hooks


def test_several_callers():
    """Calls at once, of different sizes and options, give what each gives alone."""
    options = [{}, {"is_causal": True}, {"mask": aa.masks.LocalMask(50, 50)}]
    options += [{"bias": np.eye(310, dtype=np.float32)}, {"dropout_rng": aa.random.key(1), "dropout_rate": 0.5}]
    options += [{"mask": aa.masks.LengthMask(np.array([100, 90]))}]
    lengths = (520, 440, 700, 310, 360, 410)
    calls = [arguments(seed=i, length=n, **each) for i, (n, each) in enumerate(zip(lengths, options, strict=True))]
    alone = [attend(call) for call in calls]
    start = threading.Barrier(len(calls))

    def repeat(call):
        start.wait(TIMEOUT)
        return [attend(call) for _ in range(4)]

    with ThreadPoolExecutor(len(calls)) as callers:
        together = list(callers.map(repeat, calls))
    for expected, repeated in zip(alone, together, strict=True):
        for actual in repeated:
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("raising", [None, "float32", "float64"])
@pytest.mark.parametrize("order", [("float32", "float64"), ("float64", "float32")], ids=["first ends", "second ends"])
def test_overlapping_calls(in_tiles, order, raising):
    """BLAS is held from the first call on until the last has ended, by a result or by an error."""
    calls = {dtype: arguments(dtype) for dtype in ("float32", "float64")}
    expected = {dtype: attend(call) for dtype, call in calls.items()}
    before = limits()
    entered, may_go = ({dtype: threading.Event() for dtype in calls} for _ in range(2))

    def wait_in(dtype):
        entered[dtype].set()
        assert may_go[dtype].wait(TIMEOUT)
        if dtype == raising:
            raise Fault(dtype)

    for dtype in calls:
        in_tiles[dtype] = lambda dtype=dtype: wait_in(dtype)
    with ThreadPoolExecutor(2) as callers:
        results = {}
        for dtype, call in calls.items():
            results[dtype] = callers.submit(attend, call)
            assert entered[dtype].wait(TIMEOUT)
            assert held()
        for dtype in order:
            assert held()
            may_go[dtype].set()
            if dtype == raising:
                with pytest.raises(Fault, match=dtype):
                    results[dtype].result(TIMEOUT)
            else:
                np.testing.assert_allclose(results[dtype].result(TIMEOUT), expected[dtype], rtol=1e-6, atol=1e-6)
    assert limits() == before


@pytest.mark.parametrize("limit", [1, pytest.param(2, marks=several_workers)])
def test_limit_of_the_caller(in_tiles, limit):
    """As many workers as BLAS would have threads, and the limit is the same afterwards."""
    call, workers = arguments(), set()
    expected, before = attend(call), limits()
    start = threading.Barrier(limit)  # no worker may take all the tiles before another has begun

    def note():
        if threading.get_ident() not in workers:
            workers.add(threading.get_ident())
            start.wait(TIMEOUT)
        time.sleep(0.01)  # one more worker than allowed would find a tile left

    in_tiles["float32"] = note
    with threadpoolctl.threadpool_limits(limit, user_api="blas"):
        inside = limits()
        actual = attend(call)
        assert limits() == inside
    assert limits() == before
    assert len(workers) == limit
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("entered", ["before", "during"])
@pytest.mark.parametrize("left", ["during", "after"])
def test_limits_of_others(in_tiles, limit, entered, left):
    """What somebody sets around a call, or a part of it, on another thread, is there while it is meant to be."""
    call, before = arguments(), limits()
    inside = dict.fromkeys(before, limit)
    started, may_go = threading.Event(), threading.Event()

    def wait():
        started.set()
        assert may_go.wait(TIMEOUT)

    in_tiles["float32"] = wait
    with ThreadPoolExecutor(1) as caller:
        user = threadpoolctl.threadpool_limits(limit, user_api="blas") if entered == "before" else None
        result = caller.submit(attend, call)
        assert started.wait(TIMEOUT)
        user = user or threadpoolctl.threadpool_limits(limit, user_api="blas")
        assert held()
        assert limits() == inside
        if left == "during":
            user.restore_original_limits()
            assert held()
        may_go.set()
        result.result(TIMEOUT)
        if left == "after":
            assert limits() == inside
            assert held() == (limit == 1)
            user.restore_original_limits()
    assert limits() == before
    assert not held()


def test_limits_of_others_at_any_time():
    call, before = arguments(length=64), limits()
    with ThreadPoolExecutor(1) as caller:
        calls = caller.submit(lambda: [attend(call) for _ in range(150)])
        while not calls.done():
            with threadpoolctl.threadpool_limits(1, user_api="blas"):
                assert set(limits().values()) == {1}
            assert limits() == before
        calls.result()
    assert limits() == before
    assert not held()


@several_workers
def test_libraries_that_count_by_thread(in_tiles, monkeypatch):
    """As MKL does: each thread is held to one while it computes tiles, and no other is touched."""

    class Library(threading.local):
        threads = 4
        get_num_threads = lambda self: self.threads  # noqa: E731

        def set_num_threads(self, threads):
            self.threads = threads

    attend(arguments())
    library, seen = Library(), []
    monkeypatch.setattr(_guard.limits, "local", [library])
    in_tiles["float32"] = lambda: seen.append(library.threads)
    with ThreadPoolExecutor(2) as callers:
        list(callers.map(attend, [arguments()] * 2))
        assert set(callers.map(lambda _: library.threads, range(2))) == {4}
    assert set(seen) == {1}
    assert set(_guard.pool.map(lambda _: library.threads, range(4))) == {4}


EXIT = """
import atexit, sys, threading, time
def call():
    import numpy as np
    import anyattention as aa
    x = np.random.default_rng(0).standard_normal((1, 300, 4, 8), dtype="f4")
    drop = {"dropout_rng": aa.random.key(0), "dropout_rate": 0.1}
    expected = aa.dot_product_attention(x, x, x, implementation="exact", **drop)
    output, pullback = aa.dot_product_attention_vjp(x, x, x, **drop)
    pullback(output)
    print(np.allclose(output, expected, atol=1e-5))
def late():
    threading.main_thread().join()
    time.sleep(0.1)
    call()
if "warm" in sys.argv:
    call()
if "atexit" in sys.argv:
    atexit.register(call)
else:
    threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("warm", [[], ["warm"]], ids=["first call", "later call"])
@pytest.mark.parametrize("when", ["atexit", "late thread"])
def test_while_the_interpreter_exits(when, warm):
    """There are no new threads then, and some modules cannot be imported."""
    command = [sys.executable, "-W", "error", "-c", EXIT, when, *warm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["True"] * (1 + len(warm)), "")


@several_workers
@pytest.mark.parametrize("where", ["caller", "worker"])
def test_error_in_a_tile(in_tiles, where):
    """It reaches the caller, only once no tile is under way, and the next call is right."""
    call, caller, both = arguments(), threading.get_ident(), threading.Barrier(2)
    expected, before = attend(call), limits()
    seen, under_way, unheld = set(), set(), []

    def fail_in_one():
        thread = threading.get_ident()
        under_way.add(thread)
        if thread not in seen:
            seen.add(thread)
            both.wait(TIMEOUT)
            if (thread == caller) == (where == "caller"):
                under_way.remove(thread)
                raise Fault(where)
        time.sleep(0.2)  # the other goes on
        unheld.append(not held())
        under_way.remove(thread)

    in_tiles["float32"] = fail_in_one
    with pytest.raises(Fault, match=where):
        attend(call)
    assert not under_way
    assert not any(unheld)
    assert limits() == before
    in_tiles.clear()
    np.testing.assert_allclose(attend(call), expected, rtol=1e-6, atol=1e-6)
    assert limits() == before


FORK = """
import os, signal, warnings
import numpy as np, threadpoolctl
from anyattention import dot_product_attention

warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads
x = np.random.default_rng(0).standard_normal((2, 520, 4, 8), dtype=np.float32)
attend = lambda: dot_product_attention(x, x, x, implementation="tiled")
limits = lambda: [library["num_threads"] for library in threadpoolctl.threadpool_info()]
with threadpoolctl.threadpool_limits(2):
    expected, before = attend(), limits()
    child = os.fork()
    signal.alarm(20)  # the end of a process that waits for workers that it does not have
    for _ in range(2):
        np.testing.assert_allclose(attend(), expected, rtol=1e-6, atol=1e-6)
        assert limits() == before
    if child:
        status = os.waitpid(child, 0)[1]
        assert not status, f"the child ended with {os.waitstatus_to_exitcode(status)}"
"""


@several_workers
@pytest.mark.skipif(sys.platform != "linux", reason="forking beside threads is unsafe elsewhere")
def test_forked_process():
    """A child has none of its parent's workers, and makes its own."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr[-2000:]
