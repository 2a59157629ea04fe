"""Exact-gradient certificates: in a world of a few tokens, the mean gradient of every loss is known."""
