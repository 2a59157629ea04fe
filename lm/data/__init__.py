"""Real text to rows, and rows to batches: corpora, conversations, rankings. Host-side numpy, no jit."""
