"""Scores of trained models with standard errors: `lm evaluate`, `lm recall`, `lm quantization`.

`models` is `lm evaluate`, and `measurements` what it measures; `policies` asks models the same unseen prompts, `recall`
asks which facts they know. A new kind of score gets a file of its own.
"""
