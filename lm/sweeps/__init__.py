"""Sweeps: what is tried, the study that remembers it, the processes that run it."""
