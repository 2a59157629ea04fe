"""Optimizers by name, and `Update`: every way of training is one of these over a `TrainState`.

`update.gradient` makes one from a loss; `combinators` wrap it (references, annotations, minibatches, several losses);
`optimizers.make_optimizer` builds the optax optimizer; `ema` averages weights. A new optimizer goes to optimizers.
"""
