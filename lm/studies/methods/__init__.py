"""Compares ways of training: one start, one reward model, one budget of answers, several seeds."""
