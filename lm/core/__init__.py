"""Arrays, means, errors, configs and meshes: what every other room builds on.

`types.TrainState` and `types.Tokens` travel through every stage; `metrics.Mean` is the one way anything is averaged;
`errors.UserError` is what a user can mend. Imports nothing of lm. A new pytree that several rooms share goes to types.
"""
