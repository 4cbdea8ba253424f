"""How fast, in how much memory, beside what people use: ``python -m benchmarks``."""
