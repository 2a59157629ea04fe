"""Next-token prediction: on documents (pretrain) and on conversations (sft)."""
