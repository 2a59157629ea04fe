"""What rows keep: one layout and one rule of truncation for every stage, nothing that cannot teach, and no leaks."""

import functools
import json
import re

import jax
import numpy as np
import pytest
import tokenizers

from lm import model as models, tokenizer as tk
from lm.core.config import call_with_options
from lm.core.errors import UserError
from lm.data import conversations, preferences as records, sources, truncation
from lm.data.conversations import CONVERSATION_SOURCES, Conversation, conversation_with_answer
from lm.stages import REWARD_MODEL_STAGES, ROLLOUT_STAGES, STAGES
from lm.stages.context import StageContext
from lm.stages.reward_model import ranking_batches
from lm.tokenizer import TokenizedExample
from lm.tokenizer.huggingface import tokenizer_from_parts
from tests.tokenizer.test_huggingface import CHATML, SPECIAL, TEXTS, bytewise

__all__ = ["bytewise"]

POLICIES = ("dpo", "ipo", "kto", "orpo", "simpo")  # learn from verdicts
PREFERENCES = (*REWARD_MODEL_STAGES, *POLICIES)
SUPERVISED = ("sft", "distill")
SAMPLING = (*ROLLOUT_STAGES, "gkd")
TRIMS = CHATML.replace("message['content']", "message['content'] | trim")
LAST_ONLY = (  # earlier answers lose their words, as those of models that think lose their thoughts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last or m.role == 'user' %}{{ m.content | trim }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = [{"role": "user", "content": " the cat? "}]
LATER = [*ASKED, {"role": "assistant", "content": "the dog."}, {"role": "user", "content": "a bird"}]
LONG = [{"role": "user", "content": "the cat sees the dog " * 20}]


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer(bytewise):
    """name -> one of ours, or one of others with a template."""
    ours = tk.train_tokenizer(TEXTS, vocab_size=310)
    borrowed = functools.partial(
        tokenizer_from_parts, named_tokens={"eos_token": SPECIAL[0]}, special_tokens=SPECIAL, stop_ids=(0,)
    )
    pieces = {
        "sentencepiece_model": ours.proto,
        "special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"],
        "stop_ids": (3,),
    }
    theirs = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + (
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return {
        "own": ours,
        "chatml": borrowed(tokenizer_json=bytewise, chat_template=CHATML),
        "trims": borrowed(tokenizer_json=bytewise, chat_template=TRIMS),
        "last only": borrowed(tokenizer_json=bytewise, chat_template=LAST_ONLY),
        "sentencepiece": tokenizer_from_parts(chat_template=theirs, named_tokens={"eos_token": "<|eos|>"}, **pieces),
    }


@pytest.fixture(scope="module")
def context(tokenizer):
    """name of a tokenizer -> what a program lends a stage."""
    shape = models.ModelConfig(
        vocab_size=310, layers=1, width=16, heads=2, kv_heads=2, head_size=8, hidden=16, context=512, query_blocks=1
    )
    worth = lambda paths, pessimism, longest: lambda examples, texts: np.zeros(len(texts), np.float32)
    return lambda name: StageContext(models.make_model(shape.for_backend("cpu")), tokenizer[name], 0, jax.jit, worth)


def verdict(name, prompt, responses, ranking=(1, 2)):
    return records.Ranking(name, prompt, list(responses), list(ranking), "me", "2024-05-01T12:00:00+00:00")


@pytest.fixture
def rankings(tmp_path):
    def of(verdicts):
        path = tmp_path / "rankings.jsonl"
        path.unlink(missing_ok=True)
        records.append_rankings(path, verdicts)
        return str(path)

    return of


def many(responses, prompt=LONG, count=30):
    """Verdicts on prompts that all differ, in their first word."""
    return [verdict(f"n{i}", turns(f"{i} {prompt[0]['content']}"), responses) for i in range(count)]


# The rule


def example(*ids):
    return TokenizedExample(np.array(ids, np.int32), np.array([i >= 50 for i in ids], np.float32))


@pytest.mark.parametrize(
    "cut, tokens, kept",
    [
        ("nothing", 7, [2, 11, 12, 13, 50, 51, 52]),
        ("nothing", 6, None),
        ("prompt", 6, [2, 12, 13, 50, 51, 52]),  # the prompt's end, behind the token that opens a document
        ("prompt", 5, [2, 13, 50, 51, 52]),
        ("prompt", 4, None),  # no token of the prompt would be left
        ("answer", 5, [2, 13, 50, 51, 52]),
        ("answer", 4, [2, 13, 50, 52]),  # half of the row for each; the last token stays
        ("answer", 2, [2, 52]),
        ("answer", 1, [52]),
    ],
)
def test_a_longer_row_keeps_the_end_of_the_prompt_and_the_answer(cut, tokens, kept):
    found = truncation.truncated_rows([example(2, 11, 12, 13, 50, 51, 52)], tokens, cut=cut, start=(2,), trained=False)
    [row] = found.rows
    assert (row and row.ids.tolist()) == kept
    assert found.counts["skipped"] == (kept is None)
    if kept is not None:
        assert row.weights.tolist() == [float(i >= 50) for i in kept]
        assert found.counts.get("shortened", 0) == (len(kept) < 7)


def test_a_row_without_a_trained_target_is_left_out_and_counted():
    """The first token is never a target."""
    given = [example(2, 50), example(2, 9), example(50, 9)]
    assert truncation.truncated_rows(given, 5).counts == {"skipped": 0, "untrained": 2}
    assert truncation.truncated_rows(given, 5).kept == given[:1]
    assert truncation.truncated_rows(given, 5, trained=False).kept == given


# One layout


@pytest.mark.parametrize("name", ["own", "chatml", "trims", "last only", "sentencepiece"])
@pytest.mark.parametrize("prompt", [ASKED, LATER], ids=["first turn", "later turn"])
@pytest.mark.parametrize("text", ["yes", "yes ", " no\n", "", "x + 1"])
def test_every_stage_has_the_ids_of_the_conversation(name, prompt, text, tokenizer, context, rankings, monkeypatch):
    """Prompt + answer + end token: as the template renders all of it, at once, for every stage."""
    tokenizer, lent = tokenizer[name], context(name)
    whole = conversation_with_answer(prompt, text)
    if name == "own":
        said = [
            [tokenizer.role_ids[m["role"]], *tokenizer.encode(m["content"]), tokenizer.end_of_message] for m in whole
        ]
        expected = [tokenizer.bos, *(i for ids in said for i in ids)]
    else:
        rendered = tokenizer.template.render(whole, add_generation_prompt=False).removesuffix("\n")
        expected = tokenizer._coder.encode_with_special(rendered).ids
    assert expected[-1] == tokenizer.end_of_message
    asked = tk.encode_prompt(tokenizer, prompt).tolist()
    assert expected[: len(asked)] == asked  # what RL samples from
    own = expected[len(asked) :]

    path = rankings([verdict("n", prompt, [text, "other"]), *many(["a", "b"], ASKED)])
    monkeypatch.setattr(
        "lm.stages.reward_model.ranking_batches.split_held_out", lambda items, *_: (items[9:], items[:9])
    )
    for stage in PREFERENCES:
        [batch] = STAGES[stage].batches(lent, rankings=path, length=80, prompts_per_batch=9).held_out(None)
        row = jax.tree.map(lambda x: x[0, 0], batch.tokens)
        ids = row.inputs[row.segments > 0].tolist()
        if stage in REWARD_MODEL_STAGES:
            assert ids == expected
        else:
            assert [*ids, row.targets[row.segments > 0][-1]] == expected
            assert row.targets[row.weights > 0].tolist() == own

    if name == "last only" and prompt is LATER:
        return  # no mask of several answers is true there: see test_borrowed
    monkeypatch.setitem(CONVERSATION_SOURCES, "made", lambda: [Conversation(f"n{i}", whole) for i in range(2)])
    second = lambda keys, fraction: [np.arange(len(names)) > 0 for names, _ in keys]
    monkeypatch.setattr("lm.data.tokenized_sources.held_out_documents", second)
    for stage in SUPERVISED:
        rows = STAGES[stage].batches(lent, sources="made", length=80, batch_size=1).train(None, 0)
        assert [*rows.inputs[rows.segments > 0], rows.targets[rows.segments > 0][-1]] == expected
        assert rows.targets[rows.weights > 0].tolist()[-len(own) :] == own


def test_an_answer_whose_first_token_is_also_the_marker_s_is_not_learnt(bytewise):
    """A line end of the marker and two of the answer make two tokens, but whoever is asked has one line end there."""
    made = tokenizers.Tokenizer.from_str(bytewise)
    source = json.loads(made.to_str())
    newline = "\u010a"  # a newline, as byte-level BPE spells it
    source["model"]["vocab"][newline * 2] = max(source["model"]["vocab"].values()) + 1
    source["model"]["merges"].insert(0, [newline, newline])
    merging = tokenizer_from_parts(
        tokenizer_json=json.dumps(source), chat_template=CHATML, named_tokens={}, special_tokens=SPECIAL, stop_ids=(0,)
    )
    plain, merged = tk.encode_chats(merging, [turns("a", "b"), turns("a", "\n\nb")])
    assert plain.weights.sum() == 2 and merged.weights.sum() == 0
    several = tk.encode_chat(merging, turns("a", "\n\nb", "a", "b"))
    assert several.weights.sum() == 2  # the other answer is
    assert truncation.truncated_rows([plain, merged], 99).counts == {"skipped": 0, "untrained": 1}


def test_a_template_that_closes_no_answer_ends_with_the_document(bytewise):
    """Not with the last token of whatever the assistant said."""
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    assert tokenizer_from_parts(
        tokenizer_json=bytewise, chat_template=template, special_tokens=SPECIAL, stop_ids=(0,)
    ).stop_ids == (0,)


def test_a_template_that_asks_otherwise_than_it_answers_is_refused(bytewise):
    thinks = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
    tokenizer = tokenizer_from_parts(
        tokenizer_json=bytewise, chat_template=thinks, special_tokens=SPECIAL, stop_ids=(0,)
    )
    with pytest.raises(UserError, match="writes an answer that is there otherwise than it asks for one"):
        tk.encode_chats(tokenizer, [turns("a", "b")], last=True)


# Stages that learn from verdicts


@pytest.mark.parametrize("stage", PREFERENCES)
@pytest.mark.parametrize("name", ["own", "trims"])
def test_prompts_longer_than_a_row_leave_the_answers_to_learn_from(stage, name, context, rankings):
    """Item by item: the answer is whole, the prompt's end stands before it, and how many were cut is counted."""
    lent = context(name)
    path = rankings(many(["yes", "no"]))
    found = STAGES[stage].batches(lent, rankings=path, length=24, prompts_per_batch=4)
    about = found.dataset_info
    assert about["prompts"] + about["held_out_prompts"] == 30
    assert (about["shortened"], about["skipped"], about["equal"], about["undecided"]) == (60, 0, 0, 0)
    batch = found.train(None, 0).tokens
    first, second = batch.inputs[:, 0], batch.inputs[:, 1]
    assert (batch.segments == 1).all() and (first != second).any(axis=1).all()
    whole = tk.encode_chat(lent.tokenizer, conversation_with_answer(LONG, "yes")).ids.tolist()
    row = [*first[0], *([] if stage in REWARD_MODEL_STAGES else batch.targets[0, 0, -1:])]
    opening = list(lent.tokenizer.start_ids)
    assert row[: len(opening)] == opening and row[len(opening) :] == whole[len(opening) - len(row) :]


@pytest.mark.parametrize("stage", PREFERENCES)
@pytest.mark.parametrize(
    "name, responses, length, reason",
    [
        ("own", ["same", "same"], 80, "verdicts that prefer an answer to the same one"),
        ("trims", ["yes", "yes "], 80, "verdicts that prefer an answer to the same one"),
        ("own", ["yes", "no"], 1, None),
    ],
)
def test_a_run_with_nothing_left_to_learn_is_refused(stage, name, responses, length, reason, context, rankings):
    path = rankings(many(responses, ASKED))
    with pytest.raises(UserError) as error:
        STAGES[stage].batches(context(name), rankings=path, length=length)
    if reason is None:  # a judge's rows are the end token alone; a policy's have no room
        cut = stage in REWARD_MODEL_STAGES
        reason = "answer to the same one, 60 answers shortened to" if cut else "60 answers longer than data.length 1"
    assert str(error.value).startswith(f"{path}: no verdict is left to learn from (30 ")
    assert reason in str(error.value) and str(error.value).endswith("): raise data.length, or rank other answers")


@pytest.mark.parametrize("stage", PREFERENCES)
@pytest.mark.parametrize("name, twice", [("own", ["same", "same"]), ("trims", ["yes", "yes "])])
def test_what_cannot_teach_is_left_out_and_counted(stage, name, twice, context, rankings):
    """The others stay as they are: the batches are those of a file without the useless verdicts."""
    good = many(["good", "bad"], ASKED)
    bad = [verdict(f"b{i}", turns(f"word {i}"), twice) for i in range(10)]
    options = {"length": 40, "prompts_per_batch": 30}
    found = STAGES[stage].batches(context(name), rankings=rankings(good + bad), **options)
    about = found.dataset_info
    assert about["equal"] == 10 and about["prompts"] + about["held_out_prompts"] == 30
    without = STAGES[stage].batches(context(name), rankings=rankings(good), **options)
    jax.tree.map(np.testing.assert_array_equal, found.train(None, 1), without.train(None, 1))


@pytest.mark.parametrize("stage", REWARD_MODEL_STAGES)
def test_answers_that_are_the_same_once_cut_are_left_out(stage, context, rankings):
    """Longer than a row, and different only behind its end."""
    alike = [verdict(f"b{i}", turns(f"word {i}"), ["the cat " * 30 + end for end in "xy"]) for i in range(10)]
    found = STAGES[stage].batches(context("own"), rankings=rankings(many(["a", "b"], ASKED) + alike), length=32)
    assert (
        found.dataset_info["equal"] == 10
        and found.dataset_info["prompts"] + found.dataset_info["held_out_prompts"] == 30
    )


# Stages that learn from conversations, and those that sample


@pytest.fixture
def made(monkeypatch):
    def of(conversations):
        monkeypatch.setitem(CONVERSATION_SOURCES, "made", lambda: conversations)
        return {"sources": "made", "held_out": 0.3}

    return of


@pytest.mark.parametrize("stage", [*SUPERVISED, "gkd"])
def test_conversations_longer_than_a_row(stage, context, made):
    short = [Conversation(f"s{i}", turns(f"what is the {i}", "yes")) for i in range(30)]
    long = [Conversation(f"l{i}", turns(f"what is the {i}", "the cat " * 30)) for i in range(20)]
    sizes = {"rollouts": 2, "prompt_length": 32, "turns": 2} if stage == "gkd" else {"turns": 2}
    options = sizes | made(short + long)
    batches = lambda **own: call_with_options(STAGES[stage].batches, options | own, context("own"), name="data")
    about = batches(length=32).dataset_info
    assert about["skipped"] + about["held_out_skipped"] == 20 and about["untrained"] == about["held_out_untrained"] == 0
    message = (
        r"none of \d+ conversations can be learnt from \(\d+ conversations longer than a row of 4 tokens\): "
        "lengthen the row"
    )
    with pytest.raises(UserError, match=message):
        batches(length=4)


@pytest.mark.parametrize("stage", SAMPLING)
def test_prompts_that_are_longer_or_come_again_are_counted(stage, context, made):
    talks = [Conversation(f"s{i}", turns(f"what is the {i}", "yes")) for i in range(40)]
    again = [talk._replace(name=f"again {talk.name}") for talk in talks]
    long = [Conversation(f"l{i}", turns(f"{i} {LONG[0]['content']}", "yes")) for i in range(20)]
    options = made(talks + again + long) | {"rollouts": 4, "max_new": 4, "turns": 1}
    batches = lambda **own: call_with_options(STAGES[stage].batches, options | own, context("own"), name="data")
    about, end = batches(prompt_length=32).dataset_info, "_prompts" if stage == "gkd" else ""
    assert about[f"skipped{end}"] + about[f"held_out_skipped{end}"] == 20 and about[f"repeated{end}"] == 40
    assert about["prompts"] + about["held_out_prompts"] == 40
    with pytest.raises(UserError, match=r"can be asked \(\d+ prompts longer than prompt_length 3\): raise"):
        batches(prompt_length=3)


def test_held_out_text_beyond_its_bytes_is_counted(context, tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"{i} " + TEXTS[0] * 5)
    options = {"corpus": str(tmp_path), "length": 16, "held_out": 0.3}
    whole, part = (
        STAGES["pretrain"].batches(context("own"), **options, held_out_bytes=n).dataset_info for n in (10**6, 500)
    )
    assert whole["held_out_skipped"] == 0 < part["held_out_skipped"]
    assert part["held_out_documents"] + part["held_out_skipped"] == whole["held_out_documents"]


# What is held out is not trained on under another name


def test_a_prompt_under_several_names_is_on_one_side(rankings):
    """White space apart; and a prompt that has one name goes by it, whatever else is in the file."""
    repeated = [verdict(f"again/{i}", turns(f"question  {i % 40}" + " " * (i % 2)), ["a", "b"]) for i in range(400)]
    alone = [verdict(f"alone/{i // 2}", turns(f"single {i}"), ["a", "b"]) for i in range(200)]
    path = rankings(repeated + alone)
    asked = lambda side: {" ".join(r.prompt[0]["content"].split()) for r in side}
    before: set[str] = set()
    for fraction in (0.1, 0.3, 0.6):
        train, unseen, _ = ranking_batches.split_rankings(path, fraction)
        assert len(train) + len(unseen) == 600 and not asked(train) & asked(unseen)
        assert {r.name for r in unseen if r.name.startswith("alone")} == {
            r.name for r in alone if sources.is_held_out(r.name, fraction)
        }
        assert before < asked(unseen)  # a larger fraction holds out more, and what was held out stays so
        before = asked(unseen)
    assert 12 < len([prompt for prompt in before if prompt.startswith("question")]) < 36  # 24 of 40 expected


def test_a_rater_s_verdicts_stay_together_though_openers_repeat():
    train, unseen, _ = ranking_batches.split_rankings("chitchat", 0.2)
    assert not {r.name for r in train} & {r.name for r in unseen}


@pytest.mark.parametrize("copies", ["documents", "conversations"])
def test_copies_under_other_names_are_on_one_side(copies):
    make = (
        sources.Document
        if copies == "documents"
        else lambda name, text: Conversation(name, turns(*text.splitlines(), "yes"))
    )
    items = [make(f"{copy}/{i}", f"text number {i}\nand more of it") for copy in "abc" for i in range(100)]
    train, unseen = sources.split_held_out(items, 0.3)
    assert len(train) + len(unseen) == 300
    assert not {item.content for item in train} & {item.content for item in unseen}


@pytest.mark.parametrize("name, text", [("a", "text"), ("{}", "text"), ("a", "text {}")])
def test_what_no_fraction_can_part_says_so(name, text):
    items = [sources.Document(name.format(i), text.format(i if name == "a" else "")) for i in range(40)]
    message = "of 40 documents none is (held out|left to train on): all have one name or one text, so no fraction parts"
    with pytest.raises(UserError, match=message):
        sources.split_held_out(items, 0.5)


def test_made_sums_are_held_out_in_every_phrasing():
    sums = lambda side: {talk.messages[1]["content"] for talk in side}
    train, unseen = sources.split_held_out(conversations.arithmetic_conversations(), 0.1)
    assert unseen and not sums(train) & sums(unseen)
    asked, held_out = sources.split_held_out(
        conversations.prompt_contexts(conversations.arithmetic_conversations()), 0.1
    )
    unknown = {talk.messages[0]["content"] for talk in unseen}
    assert {talk.messages[0]["content"] for talk in held_out} == unknown  # RL's prompts are those that SFT never saw


def test_the_summary_s_words_are_one_line():
    """Every count has its words, in one line with the way out."""
    counts = {"skipped": 1, "shortened": 2, "untrained": 3, "equal": 4, "undecided": 5, "empty": 6}
    told = str(
        truncation.nothing_left_error("none is left", counts, things="answers", limit="data.length 9", way="raise it")
    )
    assert re.findall(r"\d+", told) == ["1", "9", "2", "9", "3", "4", "5"] and told.endswith("): raise it")
    assert "\n" not in told and "there was none" in str(
        truncation.nothing_left_error("none is left", {}, things="answers", limit="", way="")
    )
