"""Other people's models in, and ours out: Hugging Face folders, GGUF files, packages that carry weights.

`convert` is the command `lm convert`; `folder` and `gguf` read files, `names` and `config_map` translate between their
names and ours. A new architecture is an entry in `config_map.FAMILIES` and its tensors in `names`.
"""
