"""Weights that others trained or will read: what their files call things, and what we do."""
