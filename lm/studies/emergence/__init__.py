"""Emergence: a ladder of models scored on small tasks, by all-or-nothing metrics and by smooth ones."""
