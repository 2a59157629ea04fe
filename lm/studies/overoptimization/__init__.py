"""Over-optimization: the gold reward of a policy that optimizes a learned proxy of it."""
