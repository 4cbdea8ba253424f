"""What other packages import to add an array library or an engine; docs/ has a recipe for each.

A library is a `Backend`, found by an entry point of the group ``anyattention.backends`` whose name is the root module
of its arrays' type. An engine is a subclass of `Implementation`, mostly of `Fused`, found by an entry point of the
group ``anyattention.implementations`` whose name is "library.engine", for example "torch.mine".
"""

from anyattention._src.blocks import Block, Group, cut_columns, cut_group, cut_lead, cut_rows, leaves, tree_map
from anyattention._src.call import Call, Dropout, Operands, Options
from anyattention._src.implementations.base import Implementation
from anyattention._src.implementations.fused import Fused, four_axes
from anyattention._src.implementations.tiled import TILED as tiled
from anyattention._src.interfaces import Arrays, Backend, Steps, Tiles, join_rows
from anyattention._src.rules import Bias, CausalMask, Mask
from anyattention._src.structure import Structure

__all__ = [
    "Arrays",
    "Backend",
    "Bias",
    "Block",
    "Call",
    "CausalMask",
    "Dropout",
    "Fused",
    "Group",
    "Implementation",
    "Mask",
    "Operands",
    "Options",
    "Steps",
    "Structure",
    "Tiles",
    "cut_columns",
    "cut_group",
    "cut_lead",
    "cut_rows",
    "four_axes",
    "join_rows",
    "leaves",
    "tiled",
    "tree_map",
]
