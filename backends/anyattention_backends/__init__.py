"""The libraries that deviate from the agnostic default, a folder each; every override states its reason."""
