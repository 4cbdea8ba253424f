"""The libraries that deviate from the agnostic default, a module each; every override states its reason."""
