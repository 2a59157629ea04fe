"""Real people's ratings as rankings: what is compared with what, and that no rater stands on both sides."""

import hashlib

import pytest
from runs import EXPERIMENTS, finished, small

from lm.core.config import load_config
from lm.data import ratings, sources
from lm.data.preferences import ranking_from_record
from lm.report import reward_model
from lm.stages.reward_model import ranking_batches
from lm.train import loop

__all__ = ["finished", "small"]


@pytest.fixture(scope="module")
def found():
    return ratings.chitchat_rankings()


def test_every_ranking_is_one_that_stage_reward_reads(found):
    assert len(found) > 900
    for ranking in found:
        assert ranking_from_record(ranking._asdict()) == ranking
        assert 2 <= len(ranking.responses) <= ratings.MAX_CONVERSATIONS


def test_ranks_follow_the_sum_of_three_ratings(found):
    for ranking in found:
        sums = [sum(scores) for scores in zip(*ranking.axes.values(), strict=True)]
        assert ranking.ranking == [31 - total for total in sums]
        assert all(3 <= total <= 30 for total in sums)


def test_no_conversation_twice_and_only_rated_ones_with_a_reply(found):
    dataset = sources.chitchat_dataset().values()
    texts = {
        "\n".join(f"- {text}" for _, text in sources.speaker_turns(conversation))
        for conversation in dataset
        if "ratings" in conversation and len(sources.speaker_turns(conversation)) > 1
    }
    responses = [text for ranking in found for text in ranking.responses]
    assert set(responses) <= texts and 3500 < len(responses) <= 3705
    assert len(set(responses)) > 0.99 * len(responses)  # a few people typed the same


def test_a_ranking_compares_one_opener_and_one_bucket_of_raters(found):
    first = {}
    for conversation in sources.chitchat_dataset().values():
        turns = sources.speaker_turns(conversation)
        if "ratings" in conversation and len(turns) > 1:
            first["\n".join(f"- {text}" for _, text in turns), conversation["prompt"]] = turns[0][0]
    for ranking in found[::50]:
        for text in ranking.responses:
            sender = first[text, ranking.prompt[0]["content"]]
            bucket = int.from_bytes(hashlib.sha256(sender.encode()).digest()[:8], "big") % ratings.RATER_BUCKETS
            assert ranking.name == f"chitchat/raters/{bucket}"


def test_raters_are_on_one_side(found):
    seen, unseen, _ = ranking_batches.split_rankings("chitchat", 0.2)
    assert not {ranking.name for ranking in seen} & {ranking.name for ranking in unseen}
    assert len(unseen) > 100


def test_the_config_trains_a_few_steps(finished, small, tmp_path):
    """Stage listwise on real ratings with four heads, as experiments/ratings.py:tiny has it."""
    config = load_config(f"{EXPERIMENTS / 'ratings.py'}:tiny", [f"init_from={finished / 'pretrain'}"])
    summary = loop.train_stage(config, tmp_path / "ratings")
    assert summary["steps"] == 8 and summary["stage"] == "listwise" and summary["about"]["prompts"] == 64
    before, after = summary["before"], summary["held_out"]
    for axis in ("", "/witty", "/interesting", "/upbeat"):
        assert before[f"accuracy{axis}"] == 0.5 != after[f"accuracy{axis}"]  # each head has moved
    told = reward_model.measure_reward_model(tmp_path / "ratings")
    assert list(told["axes"]) == ["overall", "interesting", "upbeat", "witty"]
