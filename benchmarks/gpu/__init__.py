"""Right first, then fast, on an NVIDIA GPU: ``python -m benchmarks.gpu``."""
