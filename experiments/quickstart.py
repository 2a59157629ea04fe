"""An assistant that knows its facts, from random matrices on two CPU cores: the chain of all stages.

Method: tokenizer, pretraining, SFT, ranking, reward model, PPO, evaluation, report; a stage's own config lies beside
this file under its name, and here is what the assistant's differs in.
Command: python -m lm pipeline --config=experiments/quickstart.py
Pretraining gives knowledge (928 facts, told in many phrasings, among code, books and conversations), SFT the form of an
answer; what is told, asked and answered is one file, lm/data/facts/phrasings.py.
Expect: quickstart.md.
Change first: the table, as in --config=experiments/quickstart.py:mine.csv --workdir=runs/mine (columns entity,
relation, value, or the entity and a column of each relation).
"""

from ml_collections import ConfigDict

from lm.core.config import sibling_config

STAGES = ("tokenizer", "pretrain", "sft", "rank", "reward", "ppo", "evaluate")
# What is read, and its share of the rows. A fact of the table is told 40 times in `facts` and asked 12 times in `quiz`.
CORPUS = {
    "facts": 0.20,  # encyclopedia
    "quiz": 0.15,  # education: questions and answers in plain text
    "education": 0.47,  # sums, spelling, capitals, copying, small talk, comparing, sorting
    "chitchat": 0.07,  # forum
    "stdlib": 0.05,  # code and documentation
    "wikipedia": 0.03,  # encyclopedia
    "shakespeare": 0.03,  # book
}
TINY_CORPUS = {"facts": 0.5, "quiz": 0.2, "education": 0.3}
CONVERSATIONS = {
    "facts": 0.26,
    "unknown_names": 0.16,
    "sums": 0.06,
    "instructions": 0.32,
    "small_talk": 0.12,
    "dialogues": 0.08,
}
# What a table of the user's replaces.
OF_TABLE = ("facts", "practice", "quiz", "unknown_names", "instructions", "dialogues", "assistant")
# What is ranked, and what RL asks: single exchanges, whose right answers are known but in small talk.
PROMPTS = {"facts": 0.08, "practice": 0.26, "unknown_names": 0.2, "sums": 0.2, "instructions": 0.2, "small_talk": 0.06}
# RL asks most about names that SFT never asked about and names that are none: it is to learn when it knows.
ASKED_BY_RL = {
    "facts": 0.06,
    "practice": 0.28,
    "unknown_names": 0.22,
    "sums": 0.14,
    "instructions": 0.24,
    "small_talk": 0.06,
}


def mixture(weights: dict[str, float], table: str) -> tuple[dict, ...]:
    """The sources with their weights; those that are made of a table, of the one at this path."""
    names = {name: f"{name}:{table}" if table and name in OF_TABLE else name for name in weights}
    return tuple({"source": names[name], "weight": weight} for name, weight in weights.items())


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "tiny", which runs every stage for a few steps, or your own table, as in quickstart.py:mine.csv."""
    table = arg if arg.endswith(".csv") else ""
    assert table or arg in ("", "tiny"), "choose nothing or tiny, or name a table, as in quickstart.py:mine.csv"
    tiny = arg == "tiny"
    config = ConfigDict({"root": "runs/quickstart", "stages": STAGES})
    root = config.get_ref("root")
    for name in STAGES:
        config[name] = sibling_config(__file__, name).get_config("tiny" if tiny else "").unlock()

    config.tokenizer.data.max_bytes = 3_000_000  # by the weights of the mixture
    if not tiny:
        config.tokenizer.data.vocab_size = 1024  # short pieces: what has to spell and copy sees more of the letters
    corpus, conversations = mixture(TINY_CORPUS if tiny else CORPUS, table), mixture(CONVERSATIONS, table)
    with config.ignore_type():  # a mixture in the place of one name
        config.tokenizer.data.corpus = config.pretrain.data.corpus = config.evaluate.evaluate.corpus = corpus
        config.sft.data.sources = conversations
        config.rank.rank.sources = config.evaluate.evaluate.sources = mixture(PROMPTS, table)
        config.ppo.data.sources = mixture(ASKED_BY_RL, table)
        config.ppo.data.rewards = "skills=3.0,model=0.2"  # right answers where they can be checked, and taste
    config.pretrain.data.held_out_bytes = 20_000 if tiny else 60_000
    config.pretrain.optimizer.name = "muon"
    config.pretrain.optimizer.learning_rate = 1e-2
    config.pretrain.train.steps = 8 if tiny else 1100
    config.pretrain.tokenizer = root + "/tokenizer"
    config.sft.optimizer.name = "muon"
    config.sft.optimizer.learning_rate = 1e-3  # twice as much drives out what was never asked
    config.sft.marker_embedding = "\n"  # so the form of a chat need not be learned from nothing (quickstart.md)
    config.sft.train.steps = 8 if tiny else 320
    config.sft.init_from = root + "/pretrain"
    config.rank.init_from = root + "/sft"
    config.reward.init_from = root + "/sft"
    config.reward.data.rankings = root + "/rank/rankings.jsonl"
    config.ppo.init_from = root + "/sft"
    config.ppo.data.reward_model = root + "/reward"
    config.rank.rank.update({"rater": "assistant", "responses": 4})
    config.rank.rank.update({"prompts": 96 if tiny else 640, "held_out_prompts": 64 if tiny else 128})
    for data in (config.rank.rank, config.ppo.data):
        data.update({"prompt_length": 32 if tiny else 40, "max_new": 16 if tiny else 24})
    config.reward.data.update({"length": 64 if tiny else 72, "prompts_per_batch": 8 if tiny else 16})
    config.reward.train.steps = 8 if tiny else 60
    config.ppo.data.update({"rater": "assistant_held_out"})
    if not tiny:
        config.ppo.data.update({"rollouts": 256, "held_out_rollouts": 512})
    config.ppo.stage.update({"beta": 0.2, "value_coefficient": 0.05})  # more moves the trunk away from the answers
    # Small steps on large batches: 8 updates of 2e-4 on 128 answers undid what SFT had taught (quickstart.md).
    config.ppo.stage.update({"minibatch_count": 1, "lam": 1.0})
    config.ppo.optimizer.learning_rate = 1e-4
    config.ppo.train.steps = 4 if tiny else 40
    config.ppo.train.update({"evaluate_every": 2 if tiny else 10, "watched_rating": "score/assistant_held_out"})
    config.evaluate.evaluate.update({"rater": "assistant", "judge": "assistant_held_out"})
    config.evaluate.evaluate.update({"temperature": 0.0, "max_new": 24, "prompts": 32 if tiny else 900})
    config.evaluate.evaluate.recall_facts = 32 if tiny else 1000
    config.evaluate.evaluate.table = table
    config.evaluate.models = ConfigDict({"raw": root + "/pretrain", "sft": root + "/sft", "ppo": root + "/ppo"})
    return config.lock()
