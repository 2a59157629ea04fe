"""Scores of trained models with standard errors: `lm evaluate`, `lm quantization`.

`policies` asks models the same unseen prompts. A new kind of score gets a file of its own.
"""
