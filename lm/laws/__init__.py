"""Scaling laws: how a loss falls with parameters and tokens, fitted to a table of runs, with intervals."""
