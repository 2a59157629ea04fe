"""Unseen prompts, and what policies say to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import enter_small_world, finished, made_dialogues

from lm.core.config import call_with_options
from lm.core.errors import UserError
from lm.data import sources
from lm.data.prompts import prompts_at
from lm.evaluate import policies
from lm.generate.sampler import SamplingParams
from lm.runs.workdir import load_trained_model
from lm.stages.rl.multi_turn import rollout_rows

__all__ = ["finished"]

OPTIONS = dict(turns=3, prompts_per_conversation=2, prompt_length=32, held_out=0.1)


@pytest.fixture(scope="module")
def start(finished):
    return load_trained_model(finished / "sft", backend="cpu")


@pytest.fixture(scope="module")
def asked(start):
    """Prompts of the small world's held-out conversations, by their options."""

    def of(**options):
        with pytest.MonkeyPatch.context() as patch:
            enter_small_world(patch.setattr)
            return call_with_options(policies.held_out_prompts, {**OPTIONS, **options}, start.tokenizer, name="prompts")

    return of


def said(questions) -> set[str]:
    return {repr(context) for context in questions.prompts.examples}


def test_some_of_each_conversation(asked):
    every, few = asked(), asked(conversations=5, prompts_per_conversation=1)
    sizes = np.bincount(every.conversation_ids)
    assert len(sizes) > 40 and sizes.min() >= 1 and sizes.max() == 2
    assert few.conversation_ids.tolist() == [0, 1, 2, 3, 4]
    assert said(few) < said(every) and len(said(every)) == len(every.conversation_ids)
    assert every.prompts.lengths.max() <= 32


def test_settings_are_chosen_on_one_part_and_judged_on_the_other(asked):
    """All that is held out at 0.1 is what is held out at 0.05 already, and the rest."""
    both, judged, tuned = asked(), asked(held_out=0.05), asked(held_out_from=0.05)
    assert said(judged) | said(tuned) == said(both) and not said(judged) & said(tuned)
    with pytest.raises(
        UserError, match="prompts.held_out_from is 0.1; it must be below prompts.held_out, which is 0.1"
    ):
        asked(held_out_from=0.1)


def test_all_are_of_conversations_that_are_held_out(asked):
    turns = {tuple(turns[:3]) for name, turns in made_dialogues() if sources.is_held_out(name, 0.1)}
    for example in asked().prompts.examples:
        prompt = tuple(message["content"] for message in example["messages"])
        assert any(prompt in (whole[:1], whole) for whole in turns)


def test_answers_and_their_kl(finished, start, asked):
    """Of the start itself the KL is 0; of another policy it is the difference of log-probs of what it said."""
    questions = asked(conversations=6, prompts_per_conversation=1)
    ask = policies.policy_answerer(start, SamplingParams(8), rows_at_once=4)
    own = ask(start.params["lm"], questions.prompts, jax.random.key(0))
    assert len(own.texts) == len(own.kl) == 6 and np.abs(own.kl).max() < 1e-4
    assert all(1 <= n <= 8 and (stopped or n == 8) for n, stopped in zip(own.lengths, own.stopped))
    moved = load_trained_model(finished / "ppo", backend="cpu")
    theirs = ask(moved.params["lm"], questions.prompts, jax.random.key(0))

    first, key = prompts_at(questions.prompts, np.arange(4)), jax.random.fold_in(jax.random.key(0), 0)
    sampling = SamplingParams(8, stop=start.tokenizer.stop_ids)
    lm = {policy.path.name: jax.tree.map(jnp.asarray, policy.params["lm"]) for policy in (moved, start)}
    run = jax.jit(functools.partial(rollout_rows, start.model, sampling=sampling))
    tokens, *_ = run(lm["ppo"], first.ids, first.lengths, key)
    here, there = (start.model.token_logprobs(lm[name], tokens) for name in ("ppo", "sft"))
    by_hand = np.sum((here - there) * tokens.weights, axis=1)
    assert np.abs(by_hand).min() > 1e-3
    assert theirs.kl[:4] == pytest.approx(np.asarray(by_hand), abs=1e-4)


def test_an_answer_depends_on_its_place_not_on_what_follows(start, asked):
    questions = asked(conversations=6, prompts_per_conversation=1)
    ask = policies.policy_answerer(start, SamplingParams(6), rows_at_once=4)
    six = ask(start.params["lm"], questions.prompts, jax.random.key(0))
    two = ask(start.params["lm"], prompts_at(questions.prompts, np.arange(2)), jax.random.key(0))
    assert six.texts[:2] == two.texts


def test_each_conversation_counts_once():
    """Prompts 0 and 1 are of one conversation: (1 + 3) / 2 = 2."""
    found = policies.conversation_means(np.array([[1.0, 3.0, 5.0], [0.0, 1.0, 2.0]]), np.array([0, 0, 1]))
    assert found.tolist() == [[2.0, 5.0], [0.5, 2.0]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"turns": 0}, "prompts.turns is 0; it must be at least 1"),
        ({"conversations": -1}, "prompts.conversations is -1; it must be at least 0"),
        ({"prompt_length": 2}, "longer than prompt_length 2.: raise prompt_length"),
    ],
)
def test_bad_options(asked, options, message):
    with pytest.raises(UserError, match=message):
        asked(**options)
