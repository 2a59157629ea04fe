"""Ways of training compared: one start, one reward model, one budget of answers, several seeds."""
