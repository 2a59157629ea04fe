"""Scaling laws: a ladder of runs from a FLOP budget, the laws that fit it, a larger run predicted."""
