"""The one loop that trains every stage: `lm train`.

`loop.train_stage` runs a config in a workdir, `setup` puts model, data and mesh together, `warm_start` takes what other
workdirs bring (parameters, tokenizer, reward model, teacher). A new method is no change here: it is a stage. `inspect`
is `lm inspect`: a batch as the loop gets it, checked; `batch_view` shows it and `batch_statistics` draws many.
"""
