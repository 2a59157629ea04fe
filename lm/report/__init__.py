"""Pages about runs: `run` for one stage, `pipeline` for a chain of stages, `reward_model` for a reward model.

A page about a new kind of run gets a file of its own. What pages share is in runs/html.
"""
