"""What biases by rule are to a tile: terms that are added to its logits, and the gradients of what they are made of.

A bias of distances has one value for each diagonal of a tile, so that a tile takes ``rows + columns - 1`` of them, see
`Tiles.along_diagonals`.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from anyattention._src.blocks import sum_to
from anyattention._src.interfaces import Arrays, Backend, is_floating
from anyattention._src.rules.by_rule import shown
from anyattention._src.rules.lowering import called, joint_shape

Array = Any
# A name, and numbers of operands and parameters, or what is static: ("array", operand),
# ("alibi", rows, columns, slopes, symmetric, range of visible distances),
# ("relative", rows, columns, table, bidirectional, thresholds),
# ("rule", function, rows, columns, operands, heads, axes of heads).
Term = tuple[Any, ...]
Many = Sequence[Array]


def sum_of_terms(
    backend: Backend, terms: Sequence[Term], operands: Many, parameters: Many, dtype: str, unit: float = 1.0
) -> Array:
    """What is added to the logits of a tile, in this dtype and unit, broadcastable to them.

    Operands are those of the tile, ``[lead..., rows or 1, columns or 1]``; parameters have the lead axes alone, slopes
    as ``[lead..., 1, 1]``, and tables as ``[lead..., num_buckets, 1]``.
    """
    cast, xp = backend.arrays.cast, backend.xp

    def in_unit(x: Array) -> Array:
        return x if unit == 1.0 else x * unit

    def term_of(term: Term) -> Array:
        name, *numbers = term
        if name == "array":
            return in_unit(cast(operands[numbers[0]], dtype))
        if name == "rule":
            return in_unit(_of_rule(backend, term, operands, dtype))
        rows, columns = operands[numbers[0]], operands[numbers[1]]
        parameter = in_unit(cast(parameters[numbers[2]], dtype))
        if 0 in (rows.shape[-2], columns.shape[-1]):  # there are no diagonals
            return parameter[..., :1, :] * cast(columns - rows, dtype)
        if name == "alibi" and backend.tiles.fuses:
            return _linear(backend.arrays, columns - rows, numbers[3], dtype) * parameter
        values = _times(xp, name, _basis(backend.arrays, term, operands, dtype), parameter)
        return backend.tiles.along_diagonals(values, rows.shape[-2], columns.shape[-1])

    return reduce(add, map(term_of, terms))


def bound_of_terms(backend: Backend, terms: Sequence[Term], operands: Many, parameters: Many) -> Array | None:
    """What no visible bias exceeds, ``[lead..., 1, 1]``; None where to find it would take as long as the logits."""
    xp, found = backend.xp, None

    def real(x: Array) -> Array:  # PyTorch has no absolute of bool, and that of -128 is no int8
        return x if is_floating(backend.arrays, x) else backend.arrays.cast(x, "float32")

    for name, *numbers in terms:
        if name == "array" and 1 in operands[numbers[0]].shape[-2:]:
            most = xp.max(xp.abs(real(operands[numbers[0]])), axis=(-2, -1), keepdims=True)
        elif name == "relative":
            most = xp.max(xp.abs(real(parameters[numbers[2]])), axis=(-2, -1), keepdims=True)
        elif name == "alibi" and numbers[-1] is not None:
            slopes, symmetric, (first, last) = real(parameters[numbers[2]]), *numbers[3:]
            ends = (-max(-first, last), 0) if symmetric else (first, last)
            most = xp.maximum(slopes * ends[0], slopes * ends[1])
        else:
            return None
        found = most if found is None else found + most
    return found


def gradients_of_terms(
    backend: Backend, terms: Sequence[Term], operands: Many, dlogits: Array, dtype: str
) -> tuple[dict[int, Array], dict[int, Array]]:
    """Those of operands, and of parameters, by their numbers, from that of the logits of a tile; not yet summed over
    the axes along which these are broadcast. Of the arrays of functions there are none where the library has none.
    """
    xp, of_operands, of_parameters = backend.xp, {}, {}
    for term in terms:
        name, *numbers = term
        if name == "array":
            of_operands[numbers[0]] = dlogits
        elif name == "rule":
            of_operands |= _gradients_of_rule(backend, term, operands, dlogits, dtype)
        else:
            basis, sums = _basis(backend.arrays, term, operands, dtype), sums_of_diagonals(xp, dlogits)
            product = xp.where(basis, sums, 0.0) if name == "relative" else sums * basis
            of_parameters[numbers[2]] = xp.sum(product, axis=-1, keepdims=True)
    return of_operands, of_parameters


def operands_with_gradients(backend: Backend, terms: Sequence[Term], operands: Many) -> set[int]:
    """The numbers of the operands that `gradients_of_terms` has gradients of."""
    dense = [term[1] for term in terms if term[0] == "array"]
    of_functions = [n for term in terms if term[0] == "rule" and backend.vjp is not None for n in term[4]]
    return {n for n in (*dense, *of_functions) if is_floating(backend.arrays, operands[n])}


def thresholds(buckets: int, max_distance: int) -> tuple[int, ...]:
    """From which distance on each bucket but the first is taken, in one direction.

    Half of them hold a distance each; the others end at ``half * (max_distance / half) ** (m / rest)``, as integers
    tell without rounding.
    """
    half, rest = buckets // 2, buckets - buckets // 2
    found, distance = list(range(1, half + 1)), half
    for m in range(1, rest):
        most = max_distance
        while distance < most:
            middle = (distance + most) // 2
            if middle**rest * half**m < max_distance**m * half**rest:
                distance = middle + 1
            else:
                most = middle
        found.append(min(distance, 2**31 - 1))  # no distance is longer than 32 bits can tell
    return tuple(found)


vars(thresholds)["_dynamo_marked_constant"] = True  # numbers beyond 64 bits, which torch.compile does not take


def sums_of_diagonals(xp: Any, x: Array) -> Array:
    """``[..., 1, rows + columns - 1]``: what `Tiles.along_diagonals` spreads, summed."""
    *lead, rows, columns = x.shape
    if rows == 1:
        return x
    flat = xp.reshape(xp.concat((x, _zeros(xp, x, rows - 2)), axis=-1), (*lead, 1, rows * (rows + columns - 2)))
    flat = xp.concat((_zeros(xp, flat, rows - 1), flat, _zeros(xp, flat, 1)), axis=-1)
    return xp.sum(xp.reshape(flat, (*lead, rows, rows + columns - 1)), axis=-2, keepdims=True)


def _zeros(xp: Any, x: Array, size: int) -> Array:
    return xp.broadcast_to(xp.zeros_like(x[..., :1]), (*x.shape[:-1], size))


def _basis(arrays: Arrays, term: Term, operands: Many, dtype: str) -> Array:
    """What the parameters of a bias of distances are multiplied by, for each diagonal: numbers ``[..., 1, diagonals]``;
    of a table which bucket it is, ``[..., num_buckets, diagonals]``.
    """
    xp, (name, rows, columns, _, *how) = arrays.xp, term
    rows, columns = operands[rows], operands[columns]
    count = xp.arange(rows.shape[-2] + columns.shape[-1] - 1, dtype=xp.int32, **arrays.beside(rows))
    distances = columns[..., :1] - rows[..., -1:, :] + count
    if name == "alibi":
        return _linear(arrays, distances, how[0], dtype)
    bidirectional, first = how  # the distances from which on each bucket is taken
    ends = xp.asarray(first, dtype=xp.int32, **arrays.beside(rows))[:, None]
    size = xp.abs(distances) if bidirectional else -distances
    buckets = xp.sum(arrays.cast(size >= ends, "int32"), axis=-2, keepdims=True)
    one_way = len(first) + 1
    if bidirectional:
        buckets = buckets + arrays.cast(distances > 0, "int32") * one_way
    all_buckets = xp.arange(one_way * (2 if bidirectional else 1), dtype=xp.int32, **arrays.beside(rows))
    return buckets == all_buckets[:, None]


def _linear(arrays: Arrays, distances: Array, symmetric: bool, dtype: str) -> Array:
    """What a slope is multiplied by."""
    return arrays.cast(-arrays.xp.abs(distances) if symmetric else distances, dtype)


def _times(xp: Any, name: str, basis: Array, parameter: Array) -> Array:
    """The value of each diagonal, ``[..., 1, diagonals]``."""
    if name == "alibi":
        return basis * parameter
    return xp.sum(xp.where(basis, parameter, 0.0), axis=-2, keepdims=True)


def _of_rule(backend: Backend, term: Term, operands: Many, dtype: str) -> Array:
    """What the function of a rule makes of a tile.

    The function makes it of all heads. A tile may have some of them, grouped ones in two axes.
    """
    _, function, rows, columns, numbers, heads, head_axes = term
    arrays, xp = backend.arrays, backend.xp
    given = [operands[n] for n in (rows, columns, *numbers)]
    given = [arrays.cast(x, dtype) if is_floating(arrays, x) else x for x in given]
    if heads is None:
        return arrays.cast(numbers_of(arrays, function, given), dtype)
    which = operands[heads]
    axes = min(head_axes, which.ndim - 2)  # a loop over lead axes takes them away from the first
    others = which.ndim - 2 - axes
    if axes == 2:
        given = [x[..., 0, :, :] for x in given]
    found = arrays.cast(numbers_of(arrays, function, given, None), dtype)
    found = xp.reshape(found, ((1,) * (others + 3 - found.ndim) + tuple(found.shape)))
    found = xp.take(found, xp.reshape(which, (-1,)), axis=-3)
    return xp.reshape(found, (*found.shape[:-3], *which.shape[others:-2], *found.shape[-2:]))


def numbers_of(arrays: Arrays, function: Any, given: Many, heads: int | None = 1) -> Array:
    """What a function makes of positions and arrays: of one head for all, or of so many; None is any number."""
    whole = None
    if heads != 1:
        *batch, _, rows, columns = joint_shape(given, rank=3)
        whole = [*batch, heads, rows, columns]
    found = called(arrays, function, given, whole)
    if not (name := arrays.dtype_name(found)).startswith(("float", "bfloat", "int", "uint")):
        raise TypeError(f"the function {shown(function)} of a bias must return real numbers, got {name}")
    return found


def _gradients_of_rule(backend: Backend, term: Term, operands: Many, dlogits: Array, dtype: str) -> dict[int, Array]:
    """The gradients of the arrays of a rule."""
    numbers = [n for n in term[4] if is_floating(backend.arrays, operands[n])]
    if backend.vjp is None or not numbers:
        return {}

    def function(*arrays: Array) -> Array:
        varying = dict(zip(numbers, arrays, strict=True))
        return _of_rule(backend, term, [varying.get(n, x) for n, x in enumerate(operands)], dtype)

    output, pullback = backend.vjp(function, *(backend.arrays.cast(operands[n], dtype) for n in numbers))
    return dict(zip(numbers, pullback(sum_to(backend.xp, dlogits, output.shape)), strict=True))
