"""JAX's private names that the project needs, each with the versions it was seen on."""


def has_cudnn() -> bool:
    """Whether JAX finds cuDNN: what JAX itself asks (0.10.2, 0.11.2)."""
    from jax._src.lib import cuda_versions

    return cuda_versions is not None


def lacks_forward_mode(error: TypeError) -> bool:
    """Whether a custom derivative met forward mode: JAX has no class for it, but a sentence (0.5.0 to 0.12.0)."""
    return "forward-mode" in str(error)


def is_ambiguous(error: Exception) -> bool:
    """Whether explicit shardings leave open how a result lies: JAX's class has no public name (0.10.2)."""
    return type(error).__name__ == "ShardingTypeError"
