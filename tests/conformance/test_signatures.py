"""Targets of every signature: a right one conforms, and none is told that it does not take what it takes."""

import functools

import pytest

import anyattention
from anyattention_conformance import Claims, Golden, beyond, suite, targets
from anyattention_conformance.reference import attention
from anyattention_conformance.targets import TargetError

GOLDEN = Golden()
REST = frozenset({"dropout", "force_fp32_for_softmax", "dtype"})  # what these functions do not take


def certify(function, only=("mask", "bias"), framework="numpy", unsupported=REST):
    claims = Claims(unsupported=frozenset(unsupported))
    chosen = suite.runs("full", only=only, dtypes=["float32"])
    chosen = [run._replace(gradients=False) for run in chosen if not run.case.id[-1].isdigit()]
    return suite.certify_here(targets.make(function, framework), chosen, claims=claims, oracle=GOLDEN)


def plain(query, key, value, bias=None, mask=None):
    return attention(query, key, value, bias, mask)


def decorated(function):
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def wrapped(function):
    return functools.wraps(function)(decorated(function))


def keywords(query, key, value, **kwargs):
    return plain(query, key, value, **kwargs)


def keywords_alone(**kwargs):
    return plain(**kwargs)


def other_names(q, k, v, **kwargs):
    return plain(q, k, v, **kwargs)


def without_names(*arrays, bias=None, mask=None):
    return plain(*arrays, bias, mask)


def unpacks(*args, **kwargs):
    query, key, value = args
    return plain(query, key, value, **kwargs)


def by_place(query, key, value, /, bias=None, mask=None):
    return plain(query, key, value, bias, mask)


def all_by_place(query, key, value, bias=None, mask=None, /):
    return plain(query, key, value, bias, mask)


def others_by_place(q, k, v, bias=None, mask=None, /):
    return plain(q, k, v, bias, mask)


def values_first(values, K, q, bias=None, mask=None):
    return plain(q, K, values, bias, mask)


def by_name(*, query, key, value, bias=None, mask=None):
    return plain(query, key, value, bias, mask)


def another_order(bias, mask, value, key, query, /):
    return plain(query, key, value, bias, mask)


def value_first(value, key, query, bias=None, mask=None):
    return plain(query, key, value, bias, mask)


@functools.wraps(lambda query, key, value: None)
def takes_more_than_it_shows(query, key, value, bias=None, mask=None):
    return plain(query, key, value, bias, mask)


@functools.wraps(lambda query, key, value: None)
def takes_more_and_passes_on(*args, mask=None, **kwargs):
    return plain(*args, mask=mask, **kwargs)


class Instance:
    def __call__(self, query, key, value, bias=None, mask=None):
        return plain(query, key, value, bias, mask)

    def method(self, query, key, value, bias=None, mask=None):
        return plain(query, key, value, bias, mask)

    @classmethod
    def of_the_class(cls, query, key, value, /, **kwargs):
        return plain(query, key, value, **kwargs)

    @staticmethod
    def static(query, key, value, bias=None, mask=None):
        return plain(query, key, value, bias, mask)


class NoSignature(Instance):
    """As functions in C are."""

    __signature__ = "none"


class Layer:
    """As the layers of PyTorch and Keras are."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


class ByPlace(Layer):
    def forward(self, value, key, query, bias=None, mask=None, /):
        return plain(query, key, value, bias, mask)


class ValuesFirst(Layer):
    def call(self, v, k, q, bias=None, mask=None):
        return plain(q, k, v, bias, mask)

    forward = call


class ByName(Layer):
    def forward(self, *, query, key, value, bias=None, mask=None):
        return plain(query, key, value, bias, mask)


RIGHT = {
    "decorated": decorated(plain),
    "wrapped": wrapped(plain),
    "twice": wrapped(decorated(plain)),
    "keywords": keywords,
    "keywords_alone": keywords_alone,
    "keywords, decorated": decorated(keywords_alone),
    "other_names": other_names,
    "other names, decorated": decorated(other_names),
    "other names, wrapped": wrapped(other_names),
    "without_names": without_names,
    "unpacks": unpacks,
    "by_place": by_place,
    "by place, decorated": decorated(by_place),
    "all_by_place": all_by_place,
    "all by place, wrapped": wrapped(all_by_place),
    "others_by_place": others_by_place,
    "values_first": values_first,
    "values first, wrapped": wrapped(values_first),
    "layer, values first": ValuesFirst(),
    "by_name": by_name,
    "by name, decorated": decorated(by_name),
    "value_first": value_first,
    "value first, decorated": decorated(value_first),
    "takes_more_than_it_shows": takes_more_than_it_shows,
    "takes_more_and_passes_on": takes_more_and_passes_on,
    "instance": Instance(),
    "method": Instance().method,
    "decorated method": decorated(Instance().method),
    "of_the_class": Instance.of_the_class,
    "static": Instance.static,
    "no signature": NoSignature(),
    "a method of C": plain.__call__,
    "layer by place": ByPlace(),
    "layer by name": ByName(),
    "partial": functools.partial(plain, mask=None),
    "partial by name": functools.partial(by_name, bias=None),
    "partial of a layer": functools.partial(ByPlace()),
    "partial of a decorated one": functools.partial(decorated(plain), mask=None),
    "partialmethod": functools.partial(Instance.method, Instance(), bias=None),
    "lambda": lambda query, key, value, **rest: plain(query, key, value, **rest),
    "singledispatch": functools.singledispatch(plain),
}


@pytest.mark.parametrize("function", RIGHT.values(), ids=RIGHT)
def test_a_right_one_conforms(function):
    report = certify(function, ("mask", "bias", "errors"))
    assert report.conforms, report.failures or report.problems
    assert {x.verdict for x in report.results} == {"conforms"}
    assert len(report.results) > 10


@pytest.mark.parametrize("function", RIGHT.values(), ids=RIGHT)
def test_what_it_takes_cannot_be_declared_away(function):
    report = certify(function, unsupported=REST | {"mask"})
    assert [x.partition(" (")[0] for x in report.problems] == ["declared, but did not occur: mask"]
    assert report.compared


def unmasked(query, key, value):
    return plain(query, key, value)


def another_name(query, key, value, attn_mask=None):
    return plain(query, key, value, mask=attn_mask)


@functools.wraps(plain)
def takes_less_than_it_shows(query, key, value):
    return plain(query, key, value)


LESS = {
    "unmasked": unmasked,
    "decorated": decorated(unmasked),
    "wrapped": wrapped(unmasked),
    "partial": functools.partial(decorated(unmasked)),
    "another name": another_name,
    "another name, decorated": decorated(another_name),
    "takes_less_than_it_shows": takes_less_than_it_shows,
}


@pytest.mark.parametrize("function", LESS.values(), ids=LESS)
def test_what_it_does_not_take_is_said_and_may_be_declared(function):
    only = ("plain", "mask", "errors")
    report = certify(function, only, unsupported={"bias"})
    assert all(x.message.startswith("takes no mask") for x in report.failures)
    assert {x.group for x in report.failures} == {"mask", "errors"}
    report = certify(function, only, unsupported={"bias", "mask"})
    assert report.conforms, report.problems
    assert {x.verdict for x in report.results if "does-not-fit" in x.case} == {"unsupported"}


@pytest.mark.parametrize("change", [lambda x: x, decorated, wrapped])
def test_a_mask_that_is_swallowed_shows_as_wrong_numbers(change):
    def swallows(query, key, value, **ignored):
        return plain(query, key, value)

    for unsupported in ({"bias"}, {"bias", "mask"}):
        report = certify(change(swallows), ("plain", "mask"), unsupported=unsupported)
        assert {x.case for x in report.failures if x.ratio and x.ratio > 1} >= {"mask", "mask-keys"}
        assert not [x for x in report.failures if "takes no" in x.message]


def test_an_error_within_is_not_about_its_arguments():
    def calls_another_with_a_mask(query, key, value, mask=None):
        return unmasked(query, key, value, **({} if mask is None else {"mask": mask}))

    report = certify(calls_another_with_a_mask, ("plain", "mask"), unsupported={"bias"})
    assert "TypeError: unmasked() got an unexpected keyword argument 'mask'" in {x.message for x in report.failures}


def test_what_takes_names_is_not_called_by_place_where_it_refuses():
    def checks_what_has_a_name(*args, **kwargs):
        return args[0] if args else plain(**kwargs)

    assert certify(checks_what_has_a_name, ("plain", "errors")).conforms


def test_gradients_have_a_signature_of_their_own():
    def function(query, key, value, bias=None, mask=None, /):
        return plain(query, key, value, bias, mask)

    def by_place(q, k, v, bias=None, mask=None, /):
        return attention.vjp(query=q, key=k, value=v, bias=bias, mask=mask)

    for vjp in (attention.vjp, by_place):
        function.vjp = vjp
        (run,) = suite.runs("full", only=["mask-and-bias"], dtypes=["float32"])
        outcome = targets.make(function, "numpy").run(*run)
        assert outcome.gradients.keys() == {"query", "key", "value", "bias"}, outcome


def test_a_place_that_cannot_be_seen_is_said():
    """Whether a mask comes fourth or fifth is not to be guessed."""
    for unsupported in (REST, REST | {"bias", "mask"}):
        report = certify(decorated(all_by_place), ("plain", "mask"), unsupported=unsupported)
        assert {x.group for x in report.failures} == {"mask"}
        assert all("show its signature, as functools.wraps does" in x.message for x in report.failures)


async def asynchronous(query, key, value):
    return plain(query, key, value)


class Asynchronous:
    __call__ = staticmethod(asynchronous)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, "int, which cannot be called"),
        (Instance, "is a class: name a function, or an instance"),
        (asynchronous, "is asynchronous: name a function that returns the output"),
        (Asynchronous(), "is asynchronous"),
    ],
)
def test_what_is_no_function_is_said(target, message):
    with pytest.raises(TargetError, match=message):
        targets.make(target, "numpy")


def test_modules_and_compiled_functions_conform():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

    class Module(torch.nn.Module):
        def forward(self, value, key, query, bias=None, mask=None):
            return anyattention.dot_product_attention(query, key, value, bias, mask)

    class WithoutNames(Module):
        def forward(self, *args, **kwargs):
            return anyattention.dot_product_attention(*args, **kwargs)

    class WithoutMask(Module):
        def forward(self, query, key, value):
            return anyattention.dot_product_attention(query, key, value)

    for module in (Module(), WithoutNames(), torch.compile(Module(), backend="eager")):
        report = certify(module, ("mask", "mask-and-bias"), "torch")
        assert report.conforms, report.failures
        report = certify(module, ("mask",), "torch", unsupported=REST | {"mask"})
        assert [x.partition(" (")[0] for x in report.problems] == ["declared, but did not occur: mask"]
    report = certify(WithoutMask(), ("plain", "mask"), "torch", unsupported={"bias"})
    assert {x.message[:13] for x in report.failures} == {"takes no mask"}
    for function in (Module().forward, decorated(anyattention.dot_product_attention)):
        report = certify(jax.jit(function), ("mask-and-bias", "batches-differ"), "jax")
        assert {x.verdict for x in report.results} == {"conforms"}, report.failures


# --- what Flax lacks ---


def certify_beyond(function, supports, *only, framework="numpy"):
    """The report on outputs in float32 of cases that a word is asked for alone."""
    chosen = suite.runs("full", only=only, dtypes=["float32"], supports=supports)
    chosen = [run._replace(gradients=False) for run in chosen if not run.case.needs & {"mask", "bias", "dropout"}]
    claims = Claims(supports=frozenset(supports), unsupported=frozenset())
    assert chosen
    return suite.certify_here(targets.make(function, framework), chosen, claims=claims, oracle=GOLDEN)


@pytest.mark.parametrize("name", ["scale", "scaling", "softmax_scale", "sm_scale"])
def test_parameters_for_what_flax_lacks_have_many_names(name):
    code = f"def function(query, key, value, *, {name}=None): return call(query, key, value, scale={name})"
    made = {"call": beyond.attention}
    exec(code, made)
    assert certify_beyond(made["function"], ["scale"], "scale*").conforms
    assert targets.make(made["function"], "numpy").signature.offers == ["scale"]


def test_each_is_given_by_its_own_name():
    def function(q, k, v, *, softcap=None, s_aux=None, **rest):
        return beyond.attention(q, k, v, logits_soft_cap=softcap, sinks=s_aux, **rest)

    words = ["soft cap", "sinks", "scale", "grouped heads"]
    assert certify_beyond(function, words, "soft-cap*", "sinks*", "grouped-*").conforms
    by_place = certify_beyond(lambda q, k, v, scale, /: beyond.attention(q, k, v, scale=scale), ["scale"], "scale")
    assert by_place.conforms


def test_an_offset_goes_to_what_takes_one_and_into_the_mask_of_others():
    seen = []

    def takes(query, key, value, mask=None, causal_offset=None):
        seen.append((mask is None, causal_offset))
        return beyond.attention(query, key, value, mask=mask, offset=causal_offset)

    def masks(query, key, value, mask=None):
        seen.append((mask is None, None))
        return plain(query, key, value, mask=mask)

    def takes_neither(query, key, value):
        return plain(query, key, value)

    assert certify_beyond(takes, ["offsets"], "offset", "offset-of-each-entry").conforms
    assert [x[0] for x in seen[-2:]] == [True, True]
    assert (seen[-2][1], seen[-1][1].tolist()) == (1, [0, 3])
    assert certify_beyond(masks, ["offsets", "window"], "offset", "offset-of-each-entry", "window*").conforms
    assert seen[-1] == (False, None)
    (failure,) = certify_beyond(takes_neither, ["offsets"], "offset").failures
    assert failure.message == "takes no offset, which it is declared to support"


def test_gradients_of_sinks_come_from_a_fifth_place():
    def function(query, key, value, learnable_sink=None):
        return beyond.attention(query, key, value, sinks=learnable_sink)

    function.vjp = beyond.attention.vjp
    runs = suite.runs("full", only=["sinks"], dtypes=["float32"], supports=["sinks"])
    run = next(run for run in runs if run.case.id == "sinks")
    assert targets.make(function, "numpy").run(*run).gradients.keys() == {"query", "key", "value", "sinks"}
