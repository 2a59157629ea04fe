"""An assistant's knowledge: a table of facts, what is said and asked about it, and what it does not know.

`tables` reads a table (ours, world.csv, or a user's own CSV), `phrasings` is the one file of everything that is said,
`documents` tells the table for pretraining, `questions` asks about it for SFT and RL, `abstention` knows an "I don't
know". Sources named facts, quiz, education, unknown_names, sums, instructions, small_talk, dialogues and assistant are
made of it (lm.data.sources, lm.data.conversations); facts:PATH.csv and the like are of a user's own table.
"""
