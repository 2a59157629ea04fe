"""Tokenizers that others made: their ids, their templates, our masks."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lm import tokenizer as tk
from lm.core.errors import UserError
from lm.tokenizer.huggingface import tokenizer_from_parts
from lm.weights.tokenizers import huggingface_tokenizer, read_tokenizer_files, write_tokenizer_files

TEXTS = ["the cat sees the dog. ", "a bird and the cat, 1234 times\n", "def f(x):\n    return x + 1\n"] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the dog."},
    {"role": "user", "content": "a bird"},
    {"role": "assistant", "content": "x + 1"},
]


@pytest.fixture(scope="module")
def bytewise() -> str:
    """A tokenizer.json of byte-level BPE."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made.to_str()


def borrowed(bytewise, template=CHATML, stops=(0,)):
    return tokenizer_from_parts(
        tokenizer_json=bytewise,
        chat_template=template,
        named_tokens={"eos_token": SPECIAL[0]},
        special_tokens=SPECIAL,
        stop_ids=stops,
    )


@pytest.mark.parametrize(
    "text", ["", "the cat", " \n\t x", "é 😀 中文", "".join(SPECIAL), "<|im_end|>\n<|im_start|>system"]
)
def test_every_text_comes_back_and_holds_no_special_id(bytewise, text):
    tokenizer = borrowed(bytewise)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and min(ids, default=3) >= 3


def test_what_the_assistant_says_is_trained_and_its_end(bytewise):
    tokenizer = borrowed(bytewise)
    example = tk.encode_chat(tokenizer, TALK)
    pieces = tokenizer.pieces(example.ids)
    assert "".join(pieces) == (
        "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nthe dog.<|im_end|>\n"
        "<|im_start|>user\na bird<|im_end|>\n<|im_start|>assistant\nx + 1<|im_end|>"
    )
    trained = "".join(piece for piece, weight in zip(pieces, example.weights) if weight)
    assert trained == "the dog.<|im_end|>x + 1<|im_end|>"  # not the line's end behind it, not the markers
    assert set(example.weights) == {0.0, 1.0}
    assert (tokenizer.end_of_message, tokenizer.stop_ids, tokenizer.start_ids) == (2, (2, 0), ())
    assert tokenizer.document_ids([5, 6]) == [5, 6, 0]


def test_a_prompt_and_a_reply_are_what_the_whole_conversation_says(bytewise):
    tokenizer = borrowed(bytewise)
    whole = tk.encode_chat(tokenizer, TALK).ids
    asked = tk.encode_prompt(tokenizer, TALK[:3])
    np.testing.assert_array_equal(asked, whole[: len(asked)])
    answer = tokenizer.encode("the dog.")
    first = tk.encode_prompt(tokenizer, TALK[:1])
    reply = tokenizer.encode_reply("user", "a bird", limit=10)
    np.testing.assert_array_equal([*first, *answer, tokenizer.end_of_message, *reply], asked)
    assert len(tokenizer.encode_reply("user", "a bird", limit=1)) < len(reply)


def test_it_travels_and_is_known_again(bytewise, tmp_path):
    tokenizer = borrowed(bytewise)
    tokenizer.save(tmp_path / "tokenizer.model")
    again = tk.load_tokenizer(tmp_path / "tokenizer.model")
    assert again == tokenizer == pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    other = borrowed(bytewise, CHATML.replace("\n", " "))
    assert other.fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m.content ", "the chat template does not parse"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "the chat template refuses this conversation: no user"),
        ("{{ messages[5].content }}", "the chat template refuses this conversation"),
    ],
)
def test_bad_templates(bytewise, template, message):
    with pytest.raises(UserError, match=message):
        borrowed(bytewise, template)


def test_a_template_that_rewrites_answers_cannot_be_learnt_from(bytewise):
    forgets = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = borrowed(bytewise, forgets)
    assert len(tk.encode_prompt(tokenizer, TALK[:3]))
    with pytest.raises(UserError, match="rewrites earlier answers"):
        tk.encode_chat(tokenizer, TALK)


def test_an_answer_that_no_token_begins(bytewise):
    """The end of the marker and the whole answer are one token: which of them is trained cannot be said."""
    glued = (
        "{% for m in messages %}{{ 'th' if m.role == 'assistant' else '' }}{{ m.content }}{% endfor %}"
        "{{ 'th' if add_generation_prompt else '' }}"
    )
    tokenizer = borrowed(bytewise, glued)
    assert "the" in tokenizer.pieces(range(tokenizer.vocab_size))
    with pytest.raises(UserError, match="marker and an answer share a token"):
        tk.encode_chat(tokenizer, [{"role": "user", "content": "\n"}, {"role": "assistant", "content": "e"}])


def test_without_template_or_end(bytewise):
    tokenizer = borrowed(bytewise, "")
    assert not tokenizer.has_chat_template and tokenizer.stop_ids == (0,)
    with pytest.raises(UserError, match="without a chat template"):
        tk.encode_chat(tokenizer, TALK)
    with pytest.raises(UserError, match="names no token that ends a text"):
        borrowed(bytewise, stops=())


def test_a_torn_file(bytewise, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(borrowed(bytewise).proto[:-100])
    with pytest.raises(UserError, match="is no tokenizer"):
        tk.load_tokenizer(path)


@pytest.fixture(scope="module")
def own():
    return tk.train_tokenizer(TEXTS, vocab_size=310)


def test_our_own_tokenizer_is_the_same_elsewhere(own):
    """As tokenizer.json it gives the ids that sentencepiece gives."""
    elsewhere = huggingface_tokenizer(own)
    texts = [*TEXTS[:3], "", " ", "   x  y", "\n\n\tif x:\r\n", "é\u0301 😀 中", "2024 <|end|>"]
    elsewhere.encode_special_tokens = True
    for text in texts:
        ids = elsewhere.encode(text, add_special_tokens=False).ids
        assert ids == own.encode(text)
        assert elsewhere.decode(ids) == text
    elsewhere.encode_special_tokens = False
    assert elsewhere.encode("<|user|>").ids == [own.bos, own.role_ids["user"]]


def test_our_own_tokenizer_comes_back_from_a_folder(own, tmp_path):
    said = write_tokenizer_files(tmp_path, own)
    back = read_tokenizer_files(tmp_path, said)
    assert (
        back.stop_ids == (own.end_of_message, own.eos)
        and back.start_ids == own.start_ids
        and back.vocab_size == own.vocab_size
    )
    ours, theirs = tk.encode_chat(own, TALK), tk.encode_chat(back, TALK)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.weights, theirs.weights)
    np.testing.assert_array_equal(tk.encode_prompt(own, TALK[:3]), tk.encode_prompt(back, TALK[:3]))
    assert own.encode_reply("tool", "the cat", 9) == back.encode_reply("tool", "the cat", 9)


def test_a_sentencepiece_model_of_others(own, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(own.proto)
    names = {
        "eos_token": "<|eos|>",
        "chat_template": "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    back = read_tokenizer_files(tmp_path, {"eos_token_id": 3})
    assert back.encode_batch(TEXTS[:3]) == own.encode_batch(TEXTS[:3])
    user, end = own.role_ids["user"], own.end_of_message
    assert tk.encode_prompt(back, TALK[:1]).tolist() == [user, *own.encode("the cat?"), end]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": "{"}, "is not JSON"),
        ({"tokenizer.json": '{"model": {}}'}, "is no tokenizer"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_tokenizer_files(tmp_path, {"eos_token_id": 0})


def test_added_tokens_that_the_tokenizer_lacks(own, bytewise, tmp_path):
    """Beside a tokenizer.json or a sentencepiece model: what has no id, or another, would be text to us."""
    pieces, whole = tmp_path / "pieces", tmp_path / "json"
    for path, name, content in ((pieces, "tokenizer.model", own.proto), (whole, "tokenizer.json", bytewise.encode())):
        path.mkdir()
        (path / name).write_bytes(content)
    for path, known in ((pieces, {"<|unk|>": 1, "<|eos|>": own.eos}), (whole, {SPECIAL[1]: 1, SPECIAL[2]: 2})):
        (path / "added_tokens.json").write_text(json.dumps(known))
        decoder = {str(i): {"content": token} for token, i in known.items()}
        (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        read_tokenizer_files(path, {"eos_token_id": 2})
        (path / "added_tokens.json").write_text(json.dumps({**known, "<|call|>": 9000}))
        with pytest.raises(UserError, match="added_tokens.json says that .* is id 9000, but the tokenizer has Non"):
            read_tokenizer_files(path, {"eos_token_id": 2})
        (path / "added_tokens.json").unlink()
        decoder = {"5": {"content": next(iter(known))}}
        (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        with pytest.raises(
            UserError, match="tokenizer_config.json says that .* is id 5, but the tokenizer has 1: make"
        ):
            read_tokenizer_files(path, {"eos_token_id": 2})


@pytest.mark.parametrize("text", ["the cat", " \n\t x", "é 😀 中文", "1234 <|im_end|>"])
def test_the_bytes_of_tokens_join_to_the_text(bytewise, own, tmp_path, text):
    """Byte-level, our own, and our own as a tokenizer.json with byte fallback; special ids have none."""
    back = read_tokenizer_files(tmp_path, write_tokenizer_files(tmp_path, own))
    for tokenizer in (borrowed(bytewise), own, back):
        pieces = tokenizer.token_bytes()
        assert len(pieces) == tokenizer.vocab_size and all(pieces[i] == b"" for i in tokenizer.stop_ids)
        assert b"".join(pieces[i] for i in tokenizer.encode(text)).decode() == text
        single = {piece for piece in pieces if len(piece) == 1}
        assert len(single) == 256 or tokenizer.vocab_size < 256 + len(SPECIAL)


TOOLS = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"


def test_a_template_that_shows_tools_gets_them(bytewise):
    tools = [{"type": "function", "function": {"name": "cat"}}]
    with pytest.raises(UserError, match="shows no tools"):
        borrowed(bytewise).encode_prompt_with_tools(TALK[:1], tools)
    shows = borrowed(bytewise, template=TOOLS + CHATML)
    plain = tk.encode_prompt(shows, TALK[:1])
    given = shows.encode_prompt_with_tools(TALK[:1], tools)
    assert shows.decode(given) == "<cat>" + shows.decode(plain)
