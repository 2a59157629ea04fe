"""Exact-gradient certificates: in a world of a few tokens the mean of every loss's gradient is known."""
