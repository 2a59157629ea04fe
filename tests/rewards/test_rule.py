import numpy as np
import pytest

from lm.rewards.rule import CRITERIA, RULE, criterion_scores, rule_reward

PROMPT = [{"role": "user", "content": "Did you like the movies?"}]


def failed(text, message="Did you like the movies?"):
    """The criteria that `text` does not meet."""
    given = criterion_scores([{"role": "user", "content": message}], text)
    return {name for name, (weight, _) in CRITERIA.items() if given[name] != max(weight, 0.0)}


@pytest.mark.parametrize(
    "text, faults",
    [
        ("I loved that movie. Did you see it?", set()),
        ("I loved that movie! Did you see it", {"ends properly", "asks something back"}),
        ("Fine. Good. A movie is what, you say?", {"one or two sentences"}),
        ("Is my dog with you?", {"on topic"}),
        ("A movie was there.", {"asks something back"}),
        ("I see. Movies?", {"asks something back"}),  # one word is no question
        ("Is that a really really really good movie?", {"not repetitive"}),
        ("So was it a good movie, was it a good one?", {"not repetitive"}),  # "was it a" twice
        ("A movie? A movie?", {"not repetitive"}),
        ("Which movie?", {"3 to 40 words"}),
        (" ".join(f"w{i}" for i in range(39)) + " movie?", set()),
        (" ".join(f"w{i}" for i in range(40)) + " movie?", {"3 to 40 words"}),
        ("Which movie\ufffd is it?", {"clean text"}),
        ("Which movie\nis it?", {"clean text"}),
        ("Which movie is it?????", {"clean text"}),
        ("Which movie <x> is it?", {"clean text"}),
        ("Was it a stupid movie?", {"rude word"}),
        ("Is Scunthorpe in the movie?", set()),  # a whole word, never a part of one
    ],
)
def test_each_criterion(text, faults):
    assert failed(text) == faults


def test_the_empty_answer_fails_what_it_can():
    assert failed("") == set(CRITERIA) - {"not repetitive", "rude word"}
    assert failed(" \n") == failed("")


def test_stop_words_are_no_topic_and_stems_are():
    assert "on topic" in failed("Did you do that?", "What did you do?")
    for said, answered in [("stories", "story"), ("studied", "study"), ("running", "a run"), ("the class", "classes")]:
        assert "on topic" not in failed(answered, said)


def test_score_is_the_sum_of_the_criteria():
    # seven criteria of 1 each; the second lacks three of them and is rude: 7 - 3 - 4
    scores = rule_reward([{"messages": PROMPT}] * 2, ["I loved that movie. Did you see it?", "you damn fool"])
    assert scores.tolist() == [7.0, 0.0] and scores.dtype == np.float32
    assert scores[1] == sum(criterion_scores(PROMPT, "you damn fool").values())
    assert rule_reward([], []).shape == (0,)


def test_the_last_user_turn_is_the_topic():
    talk = [*PROMPT, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And the snow?"}]
    assert criterion_scores(talk, "Snow is fun.")["on topic"] == 1.0
    assert criterion_scores(talk, "Movies are fun.")["on topic"] == 0.0


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        rule_reward([{"messages": PROMPT}], ["a", "b"])


def test_the_prose_names_the_best_score():
    assert sum(max(weight, 0.0) for weight, _ in CRITERIA.values()) == 7 and "scores 7" in RULE
