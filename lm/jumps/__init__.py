"""A ladder of runs scored on small tasks: what rises with compute, how steeply, and by which metric."""
