"""Pages about runs: `run` for one stage, `pipeline` for a chain of stages, `reward_model` for a learned taste.

A page about a new kind of run gets a file of its own; what pages share lies in runs/html.
"""
