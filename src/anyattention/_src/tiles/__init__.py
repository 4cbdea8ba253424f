"""Attention a tile at a time: blocks, partials, and the passes over them."""
