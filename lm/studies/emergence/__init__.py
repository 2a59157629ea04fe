"""Emergence: a ladder of models scored on small tasks, by metrics that are all or nothing and by smooth ones."""
