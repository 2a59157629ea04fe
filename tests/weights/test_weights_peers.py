"""Weights against transformers itself: what is stored is its, and what we export it loads, tensor for tensor.

Marked `peer`: needs tests/peers.txt. tests/weights/test_weights.py holds ours to the stored numbers in every run.
"""

import jax
import numpy as np
import pytest
from foreign import ABSENT, IDS, MISLABELLED, REAL, STORED, VOCAB, config_of, expanded, mislabelled_folder, write_config

from lm import model
from lm.weights import config_map, folder

pytestmark = pytest.mark.peer
EACH = pytest.mark.parametrize("name", list(STORED["models"]))
LENGTHS = np.array([24, 17, 9, 1])  # of other rows than the stored ones
ROWS = np.random.default_rng(3).integers(0, VOCAB, (len(LENGTHS), max(LENGTHS)))
THERE = np.arange(max(LENGTHS)) < LENGTHS[:, None]


@pytest.fixture(scope="module")
def peers():
    from peers import weights

    return weights


@pytest.fixture(scope="module")
def made(peers, tmp_path_factory):
    """(name) -> transformers' model, and its folder."""
    found = {}

    def of(name):
        if name not in found:
            path = tmp_path_factory.mktemp("made")
            found[name] = peers.made(name, path), path
        return found[name]

    return of


def test_the_stored_numbers_are_of_these_versions_and_models(peers):
    assert peers.versions() == STORED["versions"]
    assert set(peers.MODELS) == set(STORED["models"])


@EACH
def test_stored_numbers_are_transformers_s(name, peers, made):
    theirs, path = made(name)
    stored = STORED["models"][name]
    np.testing.assert_allclose(peers.logits(theirs, IDS, REAL)[REAL], stored["logits"], atol=3e-5)
    assert folder.read_config(path) == stored["config"]
    assert dict(sorted(peers.shapes(path).items())) == expanded(stored["tensors"], stored["config"])


@EACH
def test_logits_agree_and_the_export_is_the_same_model(name, peers, made, tmp_path):
    """Ragged rows, longer than any window: ours to 1e-4 in float32; theirs of our export bitwise."""
    theirs, path = made(name)
    expected = peers.logits(theirs, ROWS, THERE)
    c, params = folder.read_folder(path)
    m = model.make_model(c.for_backend("cpu"))
    positions = np.broadcast_to(np.arange(ROWS.shape[1]), ROWS.shape)
    run = jax.jit(lambda lm: m.logits(lm, m.hidden_states(lm, ROWS, positions, THERE.astype(np.int32))))
    np.testing.assert_allclose(np.asarray(run(params))[THERE], expected[THERE], atol=1e-4)

    kind = STORED["models"][name]["config"]["model_type"]
    folder.write_folder(tmp_path, c, params, dtype="float32", ids={"pad_token_id": 0}, kind=kind, shard_bytes=20_000)
    again = peers.loaded(tmp_path)
    assert type(again) is type(theirs)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(before[tensor].numpy(), after[tensor].numpy(), err_msg=tensor)
    np.testing.assert_array_equal(peers.logits(again, ROWS, THERE), expected)


@pytest.mark.parametrize("name", MISLABELLED)
def test_it_ties_as_the_tensors_have_it(name, peers, tmp_path):
    """tests/weights/test_weights_flags.py holds ours to the same stored logits."""
    theirs = peers.loaded(mislabelled_folder(name, tmp_path))
    truth, _ = MISLABELLED[name]
    np.testing.assert_allclose(peers.logits(theirs, IDS, REAL)[REAL], STORED["models"][truth]["logits"], atol=3e-5)


def test_what_it_takes_for_keys_that_are_left_out(peers, tmp_path):
    """Our values are in tests/weights/test_weights_flags.py; a config written out in full means the same."""
    import transformers

    for name, absent in {
        "mistral": ["sliding_window", "rope_parameters"],
        "mixtral": ["rope_parameters"],
        "gemma2": [
            *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation"),
            "tie_word_embeddings",
        ],
        "gemma3": ["rope_parameters", "tie_word_embeddings", "sliding_window"],
        "gpt2": ["tie_word_embeddings"],
        "llama": ["tie_word_embeddings"],
    }.items():
        hf = config_of(name, **dict.fromkeys(absent, ABSENT))
        write_config(tmp_path, hf)
        whole = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        assert set(absent) <= whole.keys() and config_map.model_config_from_json(
            whole
        ) == config_map.model_config_from_json(hf), name
