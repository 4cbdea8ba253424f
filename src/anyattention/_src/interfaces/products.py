"""The products of attention, as matrix products: the standard has no einsum."""

Axes = tuple[int, ...] | None

# Each with the axes (counted from the end) that make it a matrix product:
# left [..., rows, summed], right [..., summed, columns], then the axes of that product in the order of the result;
# None where they stand in order already. `g` counts the query heads that share a key head; keys and values have one.
QUERY_KEY, WEIGHTS_VALUE = "...qhd,...khd->...hqk", "...hqk,...khd->...qhd"
GROUPED_QUERY_KEY, GROUPED_WEIGHTS_VALUE = "...qhgd,...khgd->...hgqk", "...hgqk,...khgd->...qhgd"
PRODUCTS: dict[str, tuple[Axes, Axes, Axes]] = {
    QUERY_KEY: ((-2, -3, -1), (-2, -1, -3), None),
    WEIGHTS_VALUE: (None, (-2, -3, -1), (-2, -3, -1)),
    GROUPED_QUERY_KEY: ((-3, -2, -4, -1), (-3, -2, -1, -4), None),
    GROUPED_WEIGHTS_VALUE: (None, (-3, -2, -4, -1), (-2, -4, -3, -1)),
}
