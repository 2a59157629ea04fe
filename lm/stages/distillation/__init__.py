"""A student learns a teacher's whole distribution: on given replies (distill), on its own (gkd)."""
