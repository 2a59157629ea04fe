"""Stages in order, from text to an assistant: `lm pipeline`."""
