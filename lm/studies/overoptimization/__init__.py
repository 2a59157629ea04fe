"""Over-optimization: what the gold reward does while a policy climbs a learned proxy of it."""
