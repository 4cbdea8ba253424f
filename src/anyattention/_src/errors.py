"""The one exception class of its own that the package raises."""


class ShapeError(ValueError, AssertionError, IndexError):
    """Shapes that do not fit together.

    Flax raises a bare AssertionError, an IndexError (fewer than three axes) or a ValueError, by case; code
    that catches any of them catches this.
    """
