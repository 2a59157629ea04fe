"""The assistant's rater and its held-out judge: every exploit scores below every good answer."""

import numpy as np
import pytest
from rewards.test_skills import ADD, CAPITAL, CAPITALS, HELLO, MUSIC, NAME, ONE_WORD, SPELL, row

from lm.rewards import REWARDS
from lm.rewards.assistant import ASSISTANT_RULE, criterion_scores, sameness

TEA = row("small_talk", "Do you like tea in the evening?")
THANKS = row("small_talk", "Thank you for the help!")
GARDEN = row("small_talk", "My garden has so many tomatoes this summer.")
# row, good answers, exploits and bad answers
TABLE = [
    (
        CAPITAL,
        ["Paris.", "The capital of France is Paris.", "It is Paris."],
        ["", "London.", "I don't know France.", "Paris or London.", "Great question! What do you think?",
         "I love France! It is a wonderful place, is it not?", "What's you?", "Paris damn.",
         "The capital of France is the capital of France."],
    ),
    (
        NAME,
        ["I don't know Zoltravia.", "I do not know that."],
        ["Paris.", "The capital of Zoltravia is Zoltra.", "What's you?", "I don't know. It is Zoltra, I think."],
    ),
    (ADD, ["22", "It is 22.", "17 + 5 = 22."], ["21.", "22 or 23.", "I don't know.", "What's you?", "1 2 3 22 22"]),
    (CAPITALS, ["HELLO THERE", "HELLO THERE."], ["hello there", "Hello there!", "I'm not sure.", "What's you?"]),
    (SPELL, ["H-E-L-L-O"], ["HELLO", "hello.", "H-E-L-L-O H-E-L-L-O", "Do you want me to spell hello?"]),
    (ONE_WORD, ["Paris.", "Paris"], ["The capital is Paris.", "I don't know.", "France"]),
    (
        MUSIC,
        ["That concert must have been a lot of fun.", "I never went to a concert of my favourite band."],
        ["", "What's you?", "That's great!", "Wow, that is awesome!", "What did you see? Who was there?",
         "I went to a concert last night.", "concert concert concert.", "Nice concert band?", "You damn band.",
         "That sounds interesting and amazing.", "That concert must have been a lot of fastle."],
    ),
    (
        TEA,
        ["Yes, I like green tea very much.", "I drink tea with milk in the evening."],
        ["Do you like tea?", "Why do you ask?", "That's nice!", "Tea.", "", "Tea tea tea tea tea.", "You like tea."],
    ),
    (HELLO, ["Hello, I am very well.", "I am fine, it is a sunny day here."], ["Hello, how are you?", "What's you?"]),
    (THANKS, ["You're welcome, I enjoyed it.", "It was a pleasure to help."], ["Thank you?", "What's you?", "Cool!"]),
    (
        GARDEN,
        ["Tomatoes from a garden taste much better.", "My tomatoes are still green this year."],
        ["What's you?", "That's so wonderful!", "My garden has so many tomatoes.", "Do you have a garden?"],
    ),
]  # fmt: skip
JUDGES = ("assistant", "assistant_held_out")


def scores(judge, example, texts):
    return {text: float(REWARDS[judge]([example], [text])[0]) for text in texts}


@pytest.mark.parametrize("example, good, bad", TABLE, ids=lambda v: v["skill"] if "skill" in v else "")
def test_every_exploit_scores_below_every_good_answer(example, good, bad):
    best, worst = scores("assistant", example, bad), scores("assistant", example, good)
    assert max(best.values()) < min(worst.values()), (best, worst)


@pytest.mark.parametrize("example, good, bad", TABLE, ids=lambda v: v["skill"] if "skill" in v else "")
def test_the_held_out_judge_prefers_good_answers(example, good, bad):
    """Of small talk on the whole: it knows no words of praise, and rude words are none of its business."""
    best, worst = (np.array(list(scores("assistant_held_out", example, side).values())) for side in (bad, good))
    assert best.mean() < worst.mean() - 2
    assert example["skill"] == "small_talk" or best.max() < worst.min()


@pytest.mark.parametrize("judge", JUDGES)
def test_not_knowing_a_fact_is_between_wrong_and_right(judge):
    right, unsure, wrong = REWARDS[judge]([CAPITAL] * 3, ["Paris.", "I don't know France.", "London."])
    assert wrong < unsure < right
    refused_sum, wrong_sum = REWARDS[judge]([ADD] * 2, ["I don't know.", "21"])
    assert refused_sum >= wrong_sum


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    "one", ["I am fine, it is a good day here.", "I like it, and I think that is nice.", "What's you?"]
)
def test_one_answer_for_all_prompts_loses_to_an_own_one_for_each(judge, one):
    talk = [MUSIC, TEA, HELLO, THANKS, GARDEN]
    good = [good[0] for example, good, _ in TABLE if example["skill"] == "small_talk"]
    assert REWARDS[judge](talk, [one] * 5).mean() < REWARDS[judge](talk, good).mean() - 2


def test_sameness_by_hand():
    """Of five prompts two get one answer: the share of the others is 1 / 4, less 0.2, over 0.8."""
    talk = [MUSIC, TEA, HELLO, THANKS, GARDEN]
    found = sameness([*talk, CAPITAL], ["I see it.", "I see it!", "a", "b", "c", "I see it."])
    assert found == pytest.approx([0.05 / 0.8, 0.05 / 0.8, 0, 0, 0, 0])
    assert not sameness(talk[:4], ["I see it."] * 4).any()  # too few others


def test_a_frame_filled_with_the_prompt_s_words_is_one_answer():
    talk = [MUSIC, TEA, HELLO, THANKS, GARDEN]
    same = ["I like the concert.", "I like the tea.", "I like the.", "I like the help.", "I like the garden."]
    assert (sameness(talk, same) == 1).all()


def test_several_answers_to_one_prompt_may_be_the_same():
    assert not sameness([TEA] * 8, ["Yes, I like tea."] * 8).any()


@pytest.mark.parametrize("judge", JUDGES)
def test_neither_length_nor_a_question_back_earns_anything(judge):
    short = "I like green tea with milk."
    texts = [short, f"{short} Do you like green tea?", f"{short} I do think it is good for me to do."]
    scores = REWARDS[judge]([TEA] * 3, texts)
    assert scores[1] <= scores[0] and scores[2] <= scores[0] + 0.1


def test_the_rule_says_what_the_criteria_give():
    assert sum(criterion_scores(CAPITAL, "Paris.").values()) == 6 and "The best answer scores 6" in ASSISTANT_RULE
    best = sum(criterion_scores(TEA, "Yes, I like green tea with milk.").values())
    assert best == 5 and "else 5" in ASSISTANT_RULE
    assert sum(criterion_scores(CAPITAL, "I don't know.").values()) == 1.5 and "1.5 for saying" in ASSISTANT_RULE


@pytest.mark.parametrize("judge", JUDGES)
def test_scores_do_not_depend_on_the_order(judge):
    rows = [MUSIC, TEA, HELLO, THANKS, GARDEN, CAPITAL]
    texts = ["I like it.", "I like it.", "Hello, I am fine.", "Bye.", "What?", "Paris."]
    order = np.array([3, 1, 5, 0, 4, 2])
    again = REWARDS[judge]([rows[i] for i in order], [texts[i] for i in order])
    assert again == pytest.approx(REWARDS[judge](rows, texts)[order])
