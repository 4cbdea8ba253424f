"""What the pytest plugin collects."""

from anyattention_conformance.testing import AttentionConformance


class TestAttention(AttentionConformance):
    """Every case, for the target of the command line."""
