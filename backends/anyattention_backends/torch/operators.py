"""What compilers of PyTorch get as one operator each: dropout bits, and tiled, which takes tensors and a text.

The text is the call's options and what the block is made of: an option that is added is in it without a word here.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from anyattention._src import threefry
from anyattention._src.blocks import Block, Pairs, leaves
from anyattention._src.tiles.passes import backward, forward
from anyattention._src.tiles.tiling import Tiling, tiling
from anyattention.extend import Backend, Dropout, Options
from anyattention_backends.torch import compat

Many = Sequence[Tensor]
Numbers = Sequence[float]
#: That of PyTorch; set by the package, which makes it from what stands on these operators.
backend: Backend = None  # type: ignore[assignment]
_OPTIONS = tuple(field.name for field in fields(Options))
# A number in the text stands in a list beside it, since to a compiler it may be a symbol.
_NUMBER = "number"


@torch.library.custom_op("anyattention::keep", mutates_args=())  # type: ignore[untyped-decorator]
def keep(key: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    """The dropout mask of this key: True with probability `p`."""
    import array_api_compat.torch as xp

    return threefry.keep(xp, key, p, tuple(shape))


@keep.register_fake  # type: ignore[untyped-decorator]
def _(key: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    return key.new_empty(shape, dtype=torch.bool)


def beside(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that our own code has made or was given, where it can meet `like`."""
    if x.ndim == 0 and x.device != like.device:  # a scalar, which PyTorch lets meet any device
        x = x.to(like.device)
    return x


def without_autocast(like: Tensor, function: Callable[..., Any], /, *args: Any) -> Any:
    """``function(*args)`` for tensors such as `like`: autocast would compute the products in 16 bits."""
    if like.is_cpu and not torch.is_autocast_enabled("cpu"):
        return function(*args)
    device = like.device.type
    if not compat.has_autocast(device) or not torch.is_autocast_enabled(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


def as_returned(x: Tensor, block: Block) -> Tensor:
    """Rows of a block, of the same shape, but in memory as callers get them: rows before heads, grouped or not."""
    axis = _before_heads(block)
    return x.movedim(-2, axis).contiguous().movedim(axis, -2)


def _before_heads(block: Block) -> int:
    return -3 if block.rows[0].shape[-3] == block.columns[0].shape[-3] else -4


def leading(arrays: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """Tensors with the mapped axis first, of size 1 for those that are not mapped."""
    return [x[None] if dim is None else x.movedim(dim, 0) for x, dim in zip(arrays, dims, strict=True)]


def tiled(how: Tiling, block: Block) -> tuple[Tensor, ...]:
    numbers: list[float] = []
    options = tuple([(name, getattr(how.options, name)) for name in _OPTIONS])
    bias, sinks, mask, counts = block.pairs[:4]
    has_counts = None if counts is None else tuple(x is not None for x in counts)
    present = len(bias), sinks is not None, len(mask), has_counts, len(block.parameters), block.shown is not None
    text = _write((options, how.dtype, how.expression, how.terms, present), numbers)
    output, base, total = _tiled(leaves(block), numbers, text)
    return output, base.detach(), total


def _write(x: Any, numbers: list[float]) -> str:
    """``repr`` of nested tuples, as compilers can trace it."""
    if isinstance(x, tuple):
        return "(" + "".join([_write(part, numbers) + "," for part in x]) + ")"
    if x is None or isinstance(x, bool | int | str):
        return "'" + x + "'" if isinstance(x, str) else str(x)
    if isinstance(x, Enum):  # a precision of JAX's
        return "'" + x.name + "'"
    numbers.append(float(x))
    return "('" + _NUMBER + "', " + str(len(numbers) - 1) + ")"


def _read(arrays: Many, numbers: Numbers, text: str) -> tuple[Tiling, Block]:
    def number(x: Any) -> Any:
        if not isinstance(x, tuple):
            return x
        return numbers[x[1]] if x[:1] == (_NUMBER,) else tuple(map(number, x))

    named, dtype, expression, terms, (biases, has_sinks, masks, has_counts, parameters, has_shown) = ast.literal_eval(
        text
    )
    options = {name: number(value) for name, value in named}
    if options["dropout"] is not None:
        options["dropout"] = Dropout(*options["dropout"])
    query, key, value, *rest = arrays
    each = iter(rest)
    bias, sinks = tuple([next(each) for _ in range(biases)]), next(each) if has_sinks else None
    mask = tuple([next(each) for _ in range(masks)])
    counts = None if has_counts is None else tuple([next(each) if here else None for here in has_counts])
    of_heads, shown = tuple([next(each) for _ in range(parameters)]), next(each) if has_shown else None
    block = Block((query,), (key, value), Pairs(bias, sinks, mask, counts), of_heads, shown=shown)
    return tiling(backend, Options(**options), dtype, expression, terms, block), block


def _differentiated(arrays: Many, text: str) -> list[int]:
    """The numbers of those that have a gradient, in its order."""
    *_, terms, (biases, has_sinks, masks, has_counts, parameters, _) = ast.literal_eval(text)
    dense = {3 + term[1] for term in terms if term[0] == "array"}
    first = 3 + biases + has_sinks + masks + sum(has_counts or ())
    numbers = [0, 1, 2, *sorted(dense), *range(first, first + parameters), *([3 + biases] if has_sinks else [])]
    return [n for n in numbers if arrays[n].is_floating_point()]


@torch.library.custom_op("anyattention::attend_by_tiles", mutates_args=())  # type: ignore[untyped-decorator]
def _tiled(arrays: Many, numbers: Numbers, text: str) -> list[Tensor]:
    how, block = _read(arrays, numbers, text)
    output, base, total = without_autocast(arrays[0], forward, how, block)
    return [as_returned(output, block), base, total]


@torch.library.custom_op("anyattention::attend_by_tiles_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _tiled_backward(arrays: Many, results: Many, of: Many, numbers: Numbers, text: str) -> list[Tensor]:
    how, block = _read(arrays, numbers, text)
    gradients = without_autocast(of[0], backward, how, block, *results, *of)
    return [x.clone() for x in leaves(gradients)]


@_tiled.register_fake  # type: ignore[untyped-decorator]
def _(arrays: Many, numbers: Numbers, text: str) -> list[Tensor]:
    query, key, value = arrays[:3]
    output, *rest = [query.new_empty((*query.shape[:-1], size)) for size in (value.shape[-1], 1, 1)]
    return [as_returned(output, Block((query,), (key, value), Pairs())), *rest]


@_tiled_backward.register_fake  # type: ignore[untyped-decorator]
def _(arrays: Many, results: Many, of: Many, numbers: Numbers, text: str) -> list[Tensor]:
    return [arrays[n].new_empty(arrays[n].shape, dtype=of[0].dtype) for n in _differentiated(arrays, text)]


@_tiled.register_vmap  # type: ignore[untyped-decorator]
def _(info: Any, in_dims: Any, arrays: Many, numbers: Numbers, text: str) -> Any:
    return _tiled(leading(arrays, in_dims[0]), numbers, text), [0, 0, 0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    arrays, *ctx.rest = inputs
    ctx.save_for_backward(*arrays, *output)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[list[Tensor | None], list[None] | None, None]:
    *arrays, output, base, total = ctx.saved_tensors
    partial = dict(ast.literal_eval(ctx.rest[1])[0])["partial"]
    of = [gradients[0], gradients[2]] if partial else gradients[:1]
    found = _tiled_backward(arrays, [output, base, total], of, *ctx.rest)
    by_number = dict(zip(_differentiated(arrays, ctx.rest[1]), found, strict=True))
    answer = [by_number[n].to(x.dtype) if n in by_number else None for n, x in enumerate(arrays)]
    of_numbers: Any = None if ctx.rest[0] else []  # to PyTorch a list of numbers is a leaf, but an empty one is a list
    return answer, of_numbers, None


_tiled.register_autograd(_backward, setup_context=_setup)
