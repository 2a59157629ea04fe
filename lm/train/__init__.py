"""The one loop that trains every stage: `lm train`.

`loop.train_stage` runs a config in a workdir. `setup` builds model, data and mesh. `warm_start` loads what a run takes
from other workdirs (parameters, tokenizer, reward model, teacher). `resume` says what a checkpoint holds. A new method
is a stage and changes nothing here. `inspect` is `lm inspect`: it checks a batch as the loop gets it; `batch_view`
shows the batch and `batch_statistics` draws many.
"""
