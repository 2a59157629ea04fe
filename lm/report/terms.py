"""What the terms on our pages mean, for readers who meet them for the first time: shown when the mouse rests on one."""

from collections.abc import Mapping

TERMS: Mapping[str, str] = {
    "raw": "The pretrained model: it has read text and predicts what comes next. Asked in plain text, first line only.",
    "sft": "Supervised fine-tuning: the raw model, trained further on questions with their answers.",
    "ppo": "Proximal policy optimization: the SFT model answers, rewards say what the answers are worth, and it learns "
    "to give more of the better ones (reinforcement learning).",
    "95 % interval": "Were the measurement repeated with other prompts, 95 of 100 such intervals would hold the truth.",
    "bits per byte": "How badly a model predicts text: the size of the text if it was compressed with the model. Lower "
    "is better; 8 is no compression.",
    "nats": "A unit of surprise: -log of the probability given to what came. 0.69 is a coin flip.",
    "KL": "How far a policy has moved from the model it started from, in nats an answer.",
    "held out": "Kept back: no stage was trained on it.",
    "reward model": "A copy of the SFT model that gives an answer a number, trained on which of two answers the rater "
    "preferred.",
    "rater": "What ranks answers in a person's place: a published rule that can be checked by reading.",
    "judge": "A second rule from which nothing is ever learned. Where a reward rises and the judge's score falls, the "
    "policy exploits the reward.",
    "over-optimization": "A policy learns to please its reward in ways that nobody wants. The run then stops, and the "
    "policy that the judge liked best is the result.",
    "MFU": "Model FLOPs utilization: the speed of learning over what the machine could do at best.",
    "FLOPs": "Floating-point operations.",
    "facts": "Questions about the facts of the table (capitals, currencies, elements), in phrasings that were never "
    "trained.",
    "facts_never_asked": "Facts that pretraining told, about countries and elements about which no question was "
    "trained: the gap between knowing and saying.",
    "unknown_names": "Questions about names that somebody made up. Right is to say that one does not know.",
    "sums": "Additions and subtractions that were never trained. Right is the number and no other.",
    "instructions": "Say it in capitals, spell, repeat, answer in one word: right to the letter.",
    "small_talk": "Greetings, likes and dislikes: whole sentences, on topic or polite, not a question only. Half a "
    "point for such beside the topic.",
    "all": "The mean over the skills, each counted alike; what was never asked about is left out.",
    "distinct": "Of answers to a hundred prompts of all skills, how many differ. A policy that says one thing to "
    "everybody has 1.",
}
