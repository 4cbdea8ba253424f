"""PyTorch: autocast is kept out, float32 softmax is PyTorch's own, and guests in bfloat16 find a way in."""

import array_api_compat.torch as xp
import torch

from anyattention.extend import Backend
from anyattention_backends.torch import compat, dtensors, operators, ranks
from anyattention_backends.torch.arrays import TorchArrays
from anyattention_backends.torch.flex import Flex
from anyattention_backends.torch.sdpa import SDPA
from anyattention_backends.torch.steps import TorchSteps
from anyattention_backends.torch.tiles import TorchTiles

backend = Backend(xp, TorchArrays, TorchSteps, TorchTiles)
backend.engines, backend.symbolic, backend.vjp = (SDPA(), Flex()), compat.is_symbol, torch.func.vjp
backend.axis, backend.localized = ranks.axis_of, dtensors.localized
operators.backend = backend
