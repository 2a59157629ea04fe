"""Losses per token, pair or ranking, not yet reduced, and how rewards become advantages.

Each function is one formula with its paper: `policy`, `preference`, `ranking`, `distillation`, `advantages`. Arrays in,
arrays out: no model, no parameters. A new loss goes beside its like, with a case worked by hand in tests/losses.
"""
