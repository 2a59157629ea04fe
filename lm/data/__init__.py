"""Text, conversations and preferences to batches; batch i depends on the seed and i alone.

`sources` reads corpora, `conversations` and `preferences` the other two kinds, `packing` turns them into rows and
`batches` orders the rows; `annotations` keeps what people said, `tasks` makes items with one right answer. `inspect`
reads a batch back, `batch_checks` asserts what must be true of it, `origins` says where its rows are from. A new source
goes to the file of its kind.
"""
