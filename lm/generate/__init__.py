"""Sampling: prefill, decode, stop; many requests at once; beams and drafts.

`sampler.sample` is the pure function, `sampler.SamplingParams` how to sample, `answers.batch_answerer` many prompts to
many texts, `streaming` one answer token by token. A new way of decoding gets a file of its own.
"""
