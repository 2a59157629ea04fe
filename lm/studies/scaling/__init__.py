"""Scaling laws: a ladder of runs from a FLOP budget, laws that fit it, and the prediction of a larger run."""
