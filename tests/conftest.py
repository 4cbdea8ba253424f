"""The libraries under test, and how to take arrays to and from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Library:
    """A library, with arrays to it from NumPy and back."""

    name: str
    array_type: type
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]

    def put_all(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: self.put(x) if isinstance(x, np.ndarray) and name != "dropout_rng" else x
            for name, x in arguments.items()
        }


def _to_torch(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.tensor(x.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(x)


def _from_torch(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.float().numpy().astype(ml_dtypes.bfloat16)
    return x.detach().numpy()


NUMPY = Library("numpy", np.ndarray, lambda x: x, lambda x: x)
JAX = Library("jax", jnp.ndarray, jnp.asarray, np.asarray)
TORCH = Library("torch", torch.Tensor, _to_torch, _from_torch)


@pytest.fixture(params=[NUMPY, JAX, TORCH], ids=lambda library: library.name)
def library(request: pytest.FixtureRequest) -> Library:
    return request.param
