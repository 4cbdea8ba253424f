"""The private parts; `anyattention` and `anyattention.extend` have the public names."""
