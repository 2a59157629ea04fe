"""Each check of a batch passes on what is right, and fails on a batch that is wrong in just that."""

import jax
import numpy as np
import pytest
import tokenizers

from lm.core.types import RankedAnswers, Rollouts, Tokens
from lm.data import batch_checks, length_statistics, packing
from lm.data.batch_checks import summed_checks, trained_once, trained_tokens
from lm.data.inspect import (
    Answer,
    TokenIds,
    assistant_marker,
    found_answers,
    group_label,
    is_chat,
    row_views,
    token_ids,
    token_parts,
)
from lm.data.origins import RowOrigin, SegmentOrigin
from lm.tokenizer import TokenizedExample, encode_chat, train_tokenizer
from lm.tokenizer.huggingface import tokenizer_from_parts

USER, ASSISTANT, END, BOS, EOS = 4, 5, 6, 2, 3
IDS = TokenIds(60, (END, EOS), EOS, (ASSISTANT,))


def conversation(*answers: int) -> TokenizedExample:
    """<bos>, then for each number a question and an answer that says it twice."""
    ids, weights = [BOS], [0]
    for said in answers:
        ids += [USER, 9, END, ASSISTANT, said, said, END]
        weights += [0, 0, 0, 0, 1, 1, 1]
    return TokenizedExample(np.array(ids, np.int32), np.array(weights, np.float32))


def chat_rows() -> Tokens:
    """Three conversations in rows of 24: of 14 inputs, and of 7, in a row; and one of 21."""
    return packing.packed_rows([conversation(20, 21), conversation(30), conversation(40, 41, 42)], 24)[0]


def document_rows() -> Tokens:
    return packing.stream_rows([[BOS, *range(20, 29), EOS], [BOS, *range(30, 39), EOS]], 8)


def verdict(tokens: Tokens, name: str, **options) -> batch_checks.Check:
    """One check of a batch by name, of which there must be one."""
    (found,) = [check for check in batch_checks.batch_checks(tokens, IDS, **options) if check.name == name]
    return found


def altered(tokens: Tokens, field: str, row: int, place: int, value) -> Tokens:
    changed = np.array(getattr(tokens, field))
    changed[row, place] = value
    return tokens.replace(**{field: changed})


@pytest.mark.parametrize("rows", [chat_rows, document_rows])
def test_what_the_packers_make_has_no_fault(rows):
    checks = batch_checks.batch_checks(rows(), IDS)
    assert all(check.count > 0 and not check.faults for check in checks)


def test_answers_are_found():
    """The longest conversation is the first row; then two in a row, each 7 inputs a question and answer."""
    tokens = chat_rows()
    assert is_chat(tokens, IDS) and not is_chat(document_rows(), IDS)
    assert found_answers(tokens, IDS) == [
        *(Answer(0, begin, begin + 2, True) for begin in (4, 11, 18)),
        *(Answer(1, begin, begin + 2, True) for begin in (4, 11, 18)),
    ]
    cut = altered(tokens, "targets", 1, 20, 9)
    assert found_answers(cut, IDS)[-1] == Answer(1, 18, 20, False)


# (what must be true, what makes it untrue of the chat rows, where the first fault is). Row 1, in 0-based places:
# 0 bos, 1 user, 2 9, 3 end, 4 assistant, 5 40, 6 40, 7 user, 8 9, ...; the target of place t is the input of t + 1,
# but for the end of a segment, in row 2 at place 13 (of the first) and 20 (of the second).
CORRUPTIONS = {
    "ids inside the vocabulary": (("inputs", 0, 3, 60), "row 1, token 3"),
    "no target across a segment boundary": (("targets", 0, 5, 9), "row 1, token 5"),
    "positions restart in each segment": (("positions", 1, 14, 14), "row 2, token 14"),
    "every assistant end token trained": (("weights", 0, 6, 0), "row 1, token 6"),
    "first assistant token trained": (("weights", 0, 4, 0), "row 1, token 4"),
    "no gap inside a trained answer": (("weights", 0, 5, 0), "row 1, token 4"),
    "only answers trained": (("weights", 0, 1, 1), "row 1, token 1"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_conversation_fails_its_check(name):
    corruption, first = CORRUPTIONS[name]
    right, wrong = verdict(chat_rows(), name), verdict(altered(chat_rows(), *corruption), name)
    assert right.faults == 0 and right.count > 0
    assert (wrong.faults, wrong.first) == (1, first)


def test_targets_of_another_segment_and_of_padding():
    name = "no target across a segment boundary"
    # A document's end whose target is the next document's first token: weight 0 as `stream_rows` lays it.
    tokens = document_rows()
    edge = tokens.inputs.tolist()[1].index(EOS)
    assert tokens.targets[1, edge] == BOS and tokens.weights[1, edge] == 0
    assert verdict(altered(tokens, "weights", 1, edge, 1), name).faults == 1
    # Padding that is trained; and the end token of a packed conversation, which stands in no input, is its own.
    padded = chat_rows()
    assert padded.segments[1, -1] == 0
    assert verdict(altered(padded, "weights", 1, 23, 1), name).first == "row 2, token 23"
    assert verdict(altered(padded, "inputs", 1, 14, END), name).faults == 0


def test_a_token_of_a_document_that_is_not_trained():
    name = "every token of a document trained"
    assert verdict(document_rows(), name).faults == 0
    assert verdict(altered(document_rows(), "weights", 0, 2, 0), name).first == "row 1, token 2"


def test_segments_are_numbered_from_one():
    name = "positions restart in each segment"
    tokens = chat_rows()
    assert verdict(tokens.replace(segments=np.where(tokens.segments == 2, 3, tokens.segments)), name).faults == 1


def test_only_a_sampled_answer_may_have_no_end():
    name = "every assistant end token trained"
    cut = altered(chat_rows(), "targets", 0, 20, 9)
    assert verdict(cut, name).faults == 1
    assert verdict(cut, name, is_sampled=True).faults == 0


def test_a_context_answer_is_none_of_the_trained():
    tokens = chat_rows()
    context = tokens.replace(weights=np.where(np.arange(24) < 7, 0, tokens.weights).astype(np.float32))
    checks = batch_checks.batch_checks(context, IDS)
    assert not any(check.faults for check in checks)
    assert verdict(context, "every assistant end token trained").count == 4  # of 6


def test_weights_between_0_and_1_are_trained():
    tokens = chat_rows()
    assert not any(c.faults for c in batch_checks.batch_checks(tokens.replace(weights=0.5 * tokens.weights), IDS))


# Trained twice


def excerpt_origins(starts) -> list[RowOrigin]:
    return [RowOrigin([SegmentOrigin("made/talk", document=7, start=start)], row) for row, start in enumerate(starts)]


def test_overlapping_excerpts_of_a_conversation():
    """A talk of three answers in excerpts of four messages: side by side, and with two messages in common."""
    apart = packing.padded_rows([conversation(20, 21), conversation(22)], 16)
    overlapping = packing.padded_rows([conversation(20, 21), conversation(21, 22)], 16)
    right = trained_once([trained_tokens(apart, IDS, excerpt_origins([0, 4]))], {7: "made/talk"})
    wrong = trained_once([trained_tokens(overlapping, IDS, excerpt_origins([0, 2]))], {7: "made/talk"})
    assert (right.count, right.faults) == (3, 0)
    assert (wrong.count, wrong.faults, wrong.first) == (3, 1, "made/talk, place 3")


def test_overlapping_pieces_of_a_document():
    def rows(*starts):
        document = [BOS, *range(20, 40), EOS]
        pieces = [document[start : start + 9] for start in starts]
        tokens = packing.padded_rows([TokenizedExample(np.array(p, np.int32), np.ones(len(p))) for p in pieces], 8)
        return trained_once([trained_tokens(tokens, IDS, excerpt_origins(starts))], {7: "a book"})

    assert (rows(0, 8).count, rows(0, 8).faults) == (16, 0)  # the last target is the next one's first input
    assert (rows(0, 6).faults, rows(0, 6).first) == (2, "a book, place 7")


def test_a_row_may_come_again_in_the_next_epoch():
    tokens = packing.padded_rows([conversation(20)], 16)
    places = [trained_tokens(tokens, IDS, [RowOrigin([SegmentOrigin("a")], 0, epoch)]) for epoch in (0, 1, 1)]
    assert trained_once(places[:2], {0: "a"}).faults == 0
    assert trained_once(places, {0: "a"}).faults == 1


def test_best_fit_and_stream_train_nothing_twice():
    documents = [[BOS, *range(20, 20 + n), EOS] for n in (5, 17, 2, 30)]
    for rows, contents in packing.DOCUMENT_PACKINGS.values():
        held = contents([len(document) for document in documents], 8)
        origins = [
            RowOrigin([SegmentOrigin("", document=piece.document, start=piece.start) for piece in row], r)
            for r, row in enumerate(held)
        ]
        found = trained_once([trained_tokens(rows(documents, 8), IDS, origins)], dict.fromkeys(range(4), ""))
        assert (found.count, found.faults) == (sum(map(len, documents)) - 4, 0)


# Ranked answers, rollouts, reward models


def stacked(rows: Tokens, *lead: int) -> Tokens:
    return jax.tree.map(lambda x: x.reshape(*lead, x.shape[-1]), rows)


def test_ranked_answers_are_there():
    nothing = TokenizedExample(np.zeros(1, np.int32), np.zeros(1, np.float32))
    tokens = stacked(packing.padded_rows([conversation(20), conversation(21), conversation(22), nothing], 8), 2, 2)
    batch = RankedAnswers(tokens, np.array([[[1], [2]], [[1], [0]]], np.int32))
    name = "every ranked answer there"
    assert verdict(batch, name).faults == 0
    assert verdict(batch.replace(ranks=np.array([[[1], [2]], [[1], [2]]])), name).first == "row 2, token 1"


def test_a_reward_model_reads_the_end_token():
    """Its rows are one token longer, so that the end token is an input; nothing of them is trained."""
    row = lambda end: TokenizedExample(np.array([BOS, USER, 9, END, ASSISTANT, 20, end, EOS], np.int32), np.zeros(8))
    name = "every answer scored at its end token"
    right, wrong = (packing.padded_rows([row(END), row(end)], 8) for end in (END, 20))
    assert verdict(right, name, trains_reward_model=True).faults == 0
    assert verdict(wrong, name, trains_reward_model=True).first == "row 2, token 6"


def rollouts() -> Rollouts:
    tokens = packing.padded_rows([conversation(said) for said in (20, 21, 22, 23)], 8)
    zeros = np.zeros(4, np.float32)
    return Rollouts(tokens, zeros, {}, zeros > 1, -tokens.weights, group=2)


def test_rollouts_have_shared_prompts_and_finite_numbers():
    shared, finite = "answers of a group share their prompt", "rewards and log-probs are numbers"
    batch = rollouts()
    assert [verdict(batch, name, is_sampled=True).faults for name in (shared, finite)] == [0, 0]
    other = batch.replace(tokens=altered(batch.tokens, "inputs", 3, 2, 10))
    assert verdict(other, shared, is_sampled=True).first == "row 4, token 0"
    assert verdict(batch.replace(rewards=np.array([0, np.nan, 0, 0])), finite, is_sampled=True).first == "row 2"
    assert verdict(batch.replace(sampler_logprobs=batch.tokens.weights), finite, is_sampled=True).faults == 4


def test_every_part_of_a_batch_is_checked():
    batch = rollouts().replace(text_tokens=altered(document_rows(), "inputs", 0, 1, -1))
    assert list(token_parts(batch)) == ["tokens", "text_tokens"]
    assert verdict(batch, "ids inside the vocabulary").faults == 0
    assert verdict(batch, "ids inside the vocabulary (text)").faults == 1


def test_checks_of_several_batches_add_up():
    batches = [chat_rows(), altered(chat_rows(), "weights", 0, 6, 0)]
    found = summed_checks(batch_checks.batch_checks(batch, IDS) for batch in batches)
    (end,) = [check for check in found if check.name == "every assistant end token trained"]
    assert (end.count, end.faults, end.first) == (12, 1, "row 1, token 6")


# Views and lengths


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["How are you today? I am fine, thank you, Ada.\n" * 40], vocab_size=300)


TALK = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine."}]


def test_the_marker_of_a_template(tokenizer):
    assert assistant_marker(tokenizer) == (tokenizer.role_ids["assistant"],)
    assert token_ids(tokenizer).stop == tokenizer.stop_ids


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_of_others():
    """ChatML: the marker is several ids, and after the end token stands a line's end, which is not trained."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["How are you? I am fine."] * 9, trainer)
    tokenizer = tokenizer_from_parts(
        tokenizer_json=made.to_str(), chat_template=CHATML, special_tokens=special, stop_ids=(0,)
    )
    ids = token_ids(tokenizer)
    assert "".join(tokenizer.pieces(ids.marker)) == "\n<|im_start|>assistant\n" and ids.stop == (2, 0)
    tokens, _ = packing.packed_rows([encode_chat(tokenizer, TALK + TALK), encode_chat(tokenizer, TALK)], 160)
    checks = {check.name: check for check in batch_checks.batch_checks(tokens, ids)}
    assert checks["every assistant end token trained"].count == 3 and not any(c.faults for c in checks.values())
    forgetful = tokens.replace(weights=np.where(tokens.targets == 2, 0, tokens.weights))
    found = {check.name: check.faults for check in batch_checks.batch_checks(forgetful, ids)}
    assert {name for name, faults in found.items() if faults} == {"every assistant end token trained"}


def test_a_row_is_shown_as_it_is_trained(tokenizer):
    tokens, _ = packing.packed_rows([encode_chat(tokenizer, TALK)], 64)
    logprobs = -np.arange(64, dtype=np.float32)[None]
    talk, padding = row_views(tokenizer, tokens, 0, {"logprob": logprobs})
    assert "".join(t.text for t in talk) == "<|bos|><|user|>How are you?<|end|><|assistant|>I am fine.<|end|>"
    assert "".join(t.text for t in talk if t.kind == "trained") == "I am fine.<|end|>"
    assert [t.position for t in talk] == list(range(len(talk)))
    assert talk[0].values == {} and talk[3].values == {"logprob": -2.0}  # the target of input 2
    assert {t.kind for t in padding} == {"padding"} and len(padding) == 64 - len(talk) + 1


def test_the_first_token_of_the_next_document_is_not_shown_twice(tokenizer):
    documents = [tokenizer.document_ids(tokenizer.encode(text)) for text in ("How are you", "I am fine, thank you")]
    tokens = packing.stream_rows(documents, 16)
    texts = ["".join(t.text for t in segment) for segment in row_views(tokenizer, tokens, 0)]
    assert texts[0] == "<|bos|>How are you<|eos|>" and texts[1].startswith("<|bos|>I am")


def test_labels_of_rows():
    assert [group_label(row, (4,)) for row in (0, 3)] == ["row 1", "row 4"]
    assert [group_label(row, (2, 2)) for row in (1, 2)] == ["prompt 1, answer 2", "prompt 2, answer 1"]


def test_lengths_by_source():
    """Two conversations of one source and one of no known origin; the answers are three tokens each."""
    tokens = packing.padded_rows([conversation(20, 21), conversation(30), conversation(40)], 16)
    origins = [RowOrigin([SegmentOrigin("a/1", "a", "forum", 0, 0, 15)], 0), RowOrigin([SegmentOrigin("a/2", "a")], 1)]
    lengths = length_statistics.segment_lengths(tokens, IDS, origins)
    assert [(x.source, x.kind, x.tokens, x.trained, x.answers) for x in lengths] == [
        ("a", "forum", 14, 6, (3, 3)),
        ("a", "not known", 7, 3, (3,)),
        ("not known", "not known", 7, 3, (3,)),
    ]
    found = length_statistics.summaries(lengths, lambda length: length.source)
    assert list(found) == ["a", "not known"]
    assert (found["a"].segments, found["a"].tokens, found["a"].trained) == (2, 21, 9)
    assert found["a"].document_median == (15 + 8) / 2 and found["a"].answer_high == 3


def test_a_document_in_several_pieces_is_one():
    origin = SegmentOrigin("book", "books", document=3, size=100)
    pieces = [length_statistics.SegmentLength(origin._replace(start=start), 50, 50, ()) for start in (0, 50)]
    assert length_statistics.document_lengths(pieces).tolist() == [100]
