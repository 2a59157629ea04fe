"""Sampling: prefill, decode, stop; many requests at once; beams and drafts.

`sampler.sample` is the pure function, `sampler.SamplingParams` how to sample, `answers.batch_answerer` many prompts to
many texts, `streaming` one answer token by token. `engine.Engine` serves requests that come and go: each has settings
of its own, and all that are there decode in one batch (`decode_programs` on a `paged_cache`). A new way of decoding
gets a file of its own.
"""
