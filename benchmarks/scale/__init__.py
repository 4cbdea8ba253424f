"""Attention past one device and past memory, measured: ``python -m benchmarks.scale``."""
