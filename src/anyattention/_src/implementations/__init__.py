"""What computes attention: a file for each implementation."""
