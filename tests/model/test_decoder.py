"""The transformer: against a second one in plain numpy, and against itself computed another way."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from lm import model
from lm.core.errors import UserError
from lm.core.types import Tokens
from lm.model.attention import causal_attention, masked_attention, merged_heads, queries_by_kv_head
from lm.model.params import flops_per_token, matmul_param_count, param_count, param_specs
from lm.model.rope import apply_rope, rope_angles, rope_frequencies
from lm.optim import optimizers


def packed(*rows, length):
    """Tokens of rows, each a list of id sequences laid end to end as isolated segments."""
    shape = len(rows), length
    tokens = Tokens(*(np.zeros(shape, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    for r, row in enumerate(rows):
        start = 0
        for segment, ids in enumerate(row, 1):
            here = r, slice(start, start + len(ids) - 1)
            tokens.inputs[here], tokens.targets[here], tokens.weights[here] = ids[:-1], ids[1:], 1
            tokens.positions[here], tokens.segments[here] = np.arange(len(ids) - 1), segment
            start += len(ids) - 1
    return tokens


def sequences(*lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 31, n) for n in lengths]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


A, B, C, D = sequences(6, 4, 3, 10)
TOKENS = packed([A, B, C], [D], [], length=12)  # three segments, one row of 9 and padding, one row all padding


def variant(tiny_model, **changes):
    return model.make_model(dataclasses.replace(tiny_model.config, **changes))


def numpy_logits(c, lm, tokens):
    """The forward pass in float64, one row, one head and one query at a time; it shares nothing with lm.model."""
    lm = jax.tree.map(lambda x: np.asarray(x, np.float64), lm)
    norm = lambda x, scale: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + c.norm_eps) * scale

    def turned(x, position):
        pairs = x[: c.head_size // 2] + 1j * x[c.head_size // 2 :]
        pairs = pairs * np.exp(1j * position * c.rope_base ** (-2 * np.arange(c.head_size // 2) / c.head_size))
        return np.concatenate([pairs.real, pairs.imag])

    out = np.zeros((*tokens.inputs.shape, c.vocab_size))
    for b, (inputs, positions, segments) in enumerate(zip(tokens.inputs, tokens.positions, tokens.segments)):
        x = lm["embedding"][inputs]
        for i in range(c.layers):
            p = {name: leaf[i] for name, leaf in lm["layers"].items()}
            h = norm(x, p["attention_norm"])
            heads = lambda name, n: (h @ p[name]).reshape(len(h), n, c.head_size)
            q, k, v = heads("query", c.heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
            if c.qk_norm:
                q, k = norm(q, p["query_norm"]), norm(k, p["key_norm"])
            mixed = np.zeros((len(h), c.heads, c.head_size))
            for t in range(len(h)):
                seen = [s for s in range(t + 1) if segments[s] == segments[t] > 0]
                for n in range(c.heads if seen else 0):
                    group = n // (c.heads // c.kv_heads)
                    query = turned(q[t, n], positions[t])
                    scores = np.array([query @ turned(k[s, group], positions[s]) for s in seen]) / np.sqrt(c.head_size)
                    weights = np.exp(scores - scores.max())
                    mixed[t, n] = weights / weights.sum() @ v[seen, group]
            x = x + mixed.reshape(len(h), -1) @ p["attention_out"]
            h = norm(x, p["mlp_norm"])
            gate = h @ p["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up"])) @ p["down"]
        out[b] = norm(x, lm["final_norm"]) @ (lm["embedding"].T if c.tie_embeddings else lm["head"])
    return out


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False, "qk_norm": False, "kv_heads": 4}], ids=["grouped", "untied"]
)
def test_forward_pass_agrees_with_numpy(changes, tiny_model):
    m = variant(tiny_model, **changes)
    seeds = itertools.count()  # other noise on every leaf: no norm is 1, and no two are alike
    lm = jax.jit(m.init)(jax.random.key(3))
    lm = jax.tree.map(lambda x: np.asarray(x) + 0.1 * normal(*x.shape, seed=next(seeds)), lm)
    x = jax.jit(m.hidden_states)(lm, TOKENS.inputs, TOKENS.positions, TOKENS.segments)
    assert x.shape == (3, 12, 16)
    logits = jax.jit(m.logits)(lm, x)
    assert logits.shape == (3, 12, 31) and logits.dtype == jnp.float32
    expected = numpy_logits(m.config, lm, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)

    # Scores at a temperature: log-probs and entropy of softmax(logits / T), log_z of the logits themselves.
    scores = jax.jit(lambda x: m.target_stats(lm, x, TOKENS.targets, temperature=0.7))(x)
    log_z = lambda z: np.log(np.exp(z).sum(-1))
    logprobs = expected / 0.7 - log_z(expected / 0.7)[..., None]
    of_targets = np.take_along_axis(logprobs, TOKENS.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores.logprobs, of_targets, atol=1e-5)
    np.testing.assert_allclose(scores.entropy, -(np.exp(logprobs) * logprobs).sum(-1), atol=1e-5)
    np.testing.assert_allclose(scores.log_z, log_z(expected), atol=1e-5)


def test_packed_rows_score_as_separate_ones(tiny_model, tiny_lm):
    """Rule 3."""
    score = jax.jit(tiny_model.token_logprobs)
    together = np.asarray(score(tiny_lm, TOKENS))
    apart = np.asarray(score(tiny_lm, packed([A], [B], [C], length=12)))
    np.testing.assert_allclose(together[0, :5], apart[0, :5], atol=1e-5)
    np.testing.assert_allclose(together[0, 5:8], apart[1, :3], atol=1e-5)
    np.testing.assert_allclose(together[0, 8:10], apart[2, :2], atol=1e-5)
    one_segment = dataclasses.replace(TOKENS, segments=(TOKENS.segments > 0).astype(np.int32))
    assert np.abs(np.asarray(score(tiny_lm, one_segment))[0, 5:8] - together[0, 5:8]).max() > 1e-2  # isolation matters


def test_causality_and_isolation_by_gradient(tiny_model, tiny_lm):
    """Rule 3. d state[t] / d embedding of input s is zero unless s <= t in the same segment, and not zero there.

    Every input is another id, so the gradient by the embedding's rows is the gradient by input. Padding sees only
    itself, by the residual stream, and is seen by nobody.
    """
    T = 12
    ids, segments = jnp.arange(T)[None], jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]])
    project = normal(16)

    def states(embedding):
        return tiny_model.hidden_states({**tiny_lm, "embedding": embedding}, ids, ids, segments)[0] @ project

    moved = np.abs(np.asarray(jax.jit(jax.jacrev(states))(tiny_lm["embedding"]))).max(axis=-1)[:, :T]  # [t, s]
    same = (segments[0][:, None] == segments[0]) & (segments[0] > 0)
    expected = np.asarray(same) & np.tri(T, dtype=bool) | np.eye(T, dtype=bool)
    np.testing.assert_array_equal(moved > 0, expected)


def test_padding_has_no_effect_and_gets_none(tiny_model, tiny_lm):
    """Rules 2 and 3: masked by segment, never by id, and no NaN from a row that is all padding."""

    def total(lm, tokens):
        logprobs = tiny_model.token_logprobs(lm, tokens)
        return jnp.sum(jnp.where(tokens.weights > 0, logprobs, 0)), logprobs

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, logprobs), grads = both(tiny_lm, TOKENS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((logprobs, grads)))
    padding = TOKENS.segments == 0
    draw = np.random.default_rng(1)
    garbage = {
        name: np.where(padding, draw.integers(0, 31, padding.shape), getattr(TOKENS, name)).astype(np.int32)
        for name in ("inputs", "targets", "positions")
    }
    (same, _), same_grads = both(tiny_lm, dataclasses.replace(TOKENS, **garbage))
    assert value == same
    jax.tree.map(np.testing.assert_array_equal, grads, same_grads)
    # id 0 stands in padding only; in a tied model the softmax reaches its row too, so look at the untied one
    untied = variant(tiny_model, tie_embeddings=False)
    inputs = jax.jit(
        jax.grad(
            lambda e: jnp.sum(
                untied.token_logprobs({**tiny_lm, "embedding": e, "head": tiny_lm["embedding"].T}, TOKENS)
                * TOKENS.weights
            )
        )
    )(tiny_lm["embedding"])
    np.testing.assert_array_equal(inputs[0], 0)
    assert np.abs(inputs[D[0]]).max() > 0


@pytest.fixture(scope="module")
def score_and_grad(tiny_model, tiny_lm):
    """Changes of the config -> a scalar of everything a loss may ask of the model, and its gradient."""

    def of(**changes):
        m = variant(tiny_model, **changes)

        def total(lm):
            x = m.hidden_states(lm, TOKENS.inputs, TOKENS.positions, TOKENS.segments)
            scores = m.target_stats(lm, x, TOKENS.targets, temperature=0.7)
            each = scores.logprobs + 0.1 * scores.entropy + 0.01 * jnp.square(scores.log_z)
            return jnp.sum(each * TOKENS.weights) / TOKENS.weights.sum()

        return jax.jit(jax.value_and_grad(total))(tiny_lm)

    return of


@pytest.fixture(scope="module")
def plain(score_and_grad):
    return score_and_grad()


@pytest.mark.parametrize(
    "changes",
    [
        {"query_blocks": 4, "remat": "block"},
        {"scan": "yes", "remat": "dots"},
        {"loss_chunk": 5},  # 12 = 5 + 5 + 2: the last one is padded
    ],
    ids=str,
)
def test_other_ways_to_compute_the_same(changes, score_and_grad, plain):
    """Rule 10 for the chunked loss, to rounding in value and gradient; so for blocks, scan and rematerialisation."""
    value, grads = score_and_grad(**changes)
    np.testing.assert_allclose(value, plain[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6), grads, plain[1])


def test_remat_dots_keeps_the_products_and_block_keeps_none(tiny_model, tiny_lm, capsys):
    """Six products a layer are read again by the backward pass: queries, keys, values, attention out, gate, up."""

    def products(remat):
        m = variant(tiny_model, remat=remat)
        total = lambda lm: jnp.sum(m.hidden_states(lm, TOKENS.inputs, TOKENS.positions, TOKENS.segments))
        print_saved_residuals(total, tiny_lm)
        return capsys.readouterr().out.count("output of dot_general")

    assert products("dots") == 6 * tiny_model.config.layers
    assert products("block") == 0


def test_query_blocks_change_nothing():
    """Blocks of 3 queries, of 2 and 3, and of one each: the same attention, and the same gradient of q, k and v."""
    q, k, v = normal(3, 12, 4, 8), normal(3, 12, 2, 8, seed=1), normal(3, 12, 2, 8, seed=2)

    def total(qkv, blocks):
        return jnp.sum(jnp.sin(causal_attention(*qkv, jnp.asarray(TOKENS.segments), query_blocks=blocks)))

    of = jax.jit(jax.value_and_grad(total), static_argnums=1)
    one = of((q, k, v), 1)
    for blocks in (4, 5, 12):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), of((q, k, v), blocks), one)


def test_grouped_query_attention_equals_repeated_heads():
    """Query head n reads kv head n // (N / K): the same as keys and values repeated N / K times in place."""
    q, k, v = normal(2, 5, 6, 8), normal(2, 5, 3, 8, seed=1), normal(2, 5, 3, 8, seed=2)
    mask = np.broadcast_to(np.tri(5, dtype=bool), (2, 5, 5))

    @jax.jit
    def attend(k, v):
        return merged_heads(
            masked_attention(queries_by_kv_head(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
        )

    shared = np.asarray(attend(k, v))
    np.testing.assert_allclose(shared, attend(np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)), atol=1e-6)
    assert np.abs(shared - attend(np.tile(k, (1, 1, 2, 1)), np.tile(v, (1, 1, 2, 1)))).max() > 0.1


def test_attention_that_may_see_nothing_gives_zero():
    q, ones = jnp.ones((1, 1, 1, 2, 2)), jnp.ones((1, 1, 2, 2))
    mask = jnp.array([[[True, False], [False, False]]])
    np.testing.assert_array_equal(masked_attention(q, ones, ones, mask)[0, 0, 0], [[1, 1], [0, 0]])


def test_rotary_positions_are_relative():
    q, k = normal(2, 1, 1, 1, 8)
    turned = jax.jit(lambda x, position: apply_rope(x, rope_angles(position, rope_frequencies(8, 100.0))))
    turn = lambda x, position: np.asarray(turned(x, np.array([[position]])))
    product = lambda m, n: np.vdot(turn(q, m), turn(k, n))
    np.testing.assert_allclose(product(3, 1), product(13, 11), rtol=1e-4)
    assert np.abs(product(3, 1) - product(3, 2)) > 1e-2
    np.testing.assert_array_equal(turn(q, 0), q)
    np.testing.assert_allclose(np.linalg.norm(turn(q, 9)), np.linalg.norm(q), rtol=1e-6)
    # the second pair turns by position * 100^(-2/8): components 1 and 1 + H/2
    angle = 3 * 100.0**-0.25
    np.testing.assert_allclose(turn(q, 3)[..., 1], q[..., 1] * np.cos(angle) - q[..., 5] * np.sin(angle), rtol=1e-5)


def test_sizes_by_hand(tiny_model):
    """Embedding 31 * 16 = 496; a layer: queries 16 * 32 and out 32 * 16 = 1024, keys and values 2 * 16 * 16 = 512,
    SwiGLU 3 * 16 * 24 = 1152, norms 2 * 16 + 2 * 8 = 48; final norm 16.

    Products: 2 * 2688 + 496 = 5872. FLOPs a token at length 9 (rule 15): 6 * 5872 + 6 * 2 layers * 32 * 10 = 39072.
    """
    c = tiny_model.config
    assert param_count(param_specs(c)) == 496 + 2 * (1024 + 512 + 1152 + 48) + 16
    assert param_count(param_specs(dataclasses.replace(c, tie_embeddings=False))) == param_count(param_specs(c)) + 496
    assert matmul_param_count(c) == matmul_param_count(dataclasses.replace(c, tie_embeddings=False)) == 5872
    assert flops_per_token(c, 9) == 39072
    shapes = jax.eval_shape(tiny_model.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == param_count(param_specs(c))
    axes = jax.tree.map(len, tiny_model.logical_axes["lm"], is_leaf=lambda x: isinstance(x, tuple))
    assert axes == jax.tree.map(lambda x: len(x.shape), shapes)


def test_initial_parameters(tiny_model):
    """Norms 1, value head 0, matrices of deviation 0.88 rows^-1/2 (cut at two of it), outputs smaller by sqrt(2 L)."""
    wide = variant(tiny_model, width=64, hidden=128)
    lm = jax.jit(wide.init)(jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(lm))
    np.testing.assert_array_equal(lm["layers"]["query_norm"], 1)
    np.testing.assert_allclose(lm["layers"]["gate"].std(), 0.88 / 8, rtol=0.05)
    np.testing.assert_allclose(lm["layers"]["down"].std(), 0.88 / 128**0.5 / 2, rtol=0.05)  # sqrt(2 * 2 layers) = 2
    assert not np.array_equal(lm["layers"]["gate"], lm["layers"]["up"])  # a key for each
    head = tiny_model.init_value_head(jax.random.key(0))
    assert set(head) == {"score", "offset"}
    np.testing.assert_array_equal(tiny_model.value(head, normal(2, 3, 16)), np.zeros((2, 3)))
    head = {"score": jnp.arange(16.0), "offset": jnp.float32(0.5)}
    assert tiny_model.value(head, jnp.ones((1, 16)))[0] == 120.5  # 0 + 1 + ... + 15 = 120


def test_bfloat16_computes_and_float32_keeps(tiny_model, tiny_lm):
    """Rule 10: parameters, gradients and moments float32; products bfloat16; logits and log-probs float32 and close."""
    half = variant(tiny_model, dtype="bfloat16")
    x = jax.eval_shape(half.hidden_states, tiny_lm, TOKENS.inputs, TOKENS.positions, TOKENS.segments)
    assert x.dtype == jnp.bfloat16 and jax.eval_shape(half.logits, tiny_lm, x).dtype == jnp.float32
    grads = jax.eval_shape(jax.grad(lambda lm: jnp.sum(half.token_logprobs(lm, TOKENS))), tiny_lm)
    state = jax.eval_shape(optimizers.make_optimizer(learning_rate=1e-3, total_steps=10).init, tiny_lm)
    floats = [x.dtype for x in jax.tree.leaves((grads, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) >= 3 * len(jax.tree.leaves(tiny_lm)) and set(floats) == {jnp.dtype("float32")}
    logprobs = [np.asarray(jax.jit(m.token_logprobs)(tiny_lm, TOKENS)) for m in (half, tiny_model)]
    gap = np.abs(logprobs[0] - logprobs[1])[TOKENS.weights > 0]
    assert 0 < gap.max() < 0.2  # bfloat16 keeps 8 bits: 0.4 % of logits of a few units, through two layers


def test_auto_is_settled_by_the_backend():
    c = model.ModelConfig(vocab_size=8)
    assert dataclasses.asdict(c.for_backend("cpu")).items() >= {"dtype": "float32", "scan": "no"}.items()
    assert (
        dataclasses.asdict(c.for_backend("gpu")).items()
        >= {"dtype": "bfloat16", "scan": "yes", "query_blocks": 1}.items()
    )
    assert "auto" not in dataclasses.asdict(c.for_backend("cpu")).values()
    chosen = dataclasses.replace(c, dtype="bfloat16", scan="yes", query_blocks=2, attention="xla", cache_dtype="int8")
    assert chosen.for_backend("cpu") == chosen.for_backend("tpu") == chosen


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 0}, "model.width is 0; it must be at least 1"),
        ({"heads": 4, "kv_heads": 3}, "model.heads 4 is not a multiple of model.kv_heads 3"),
        ({"head_size": 7}, "model.head_size 7 is odd"),
        ({"remat": "all"}, "model.remat is 'all'; choose one of none, block, dots"),
        ({"dtype": "float16"}, "model.dtype is 'float16'; choose one of auto, float32, bfloat16"),
        ({"query_blocks": 0}, "model.query_blocks is 0"),
        ({"query_blocks": "four"}, "model.query_blocks is 'four'"),
        ({"loss_chunk": -1}, "model.loss_chunk is -1"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        model.ModelConfig(vocab_size=8, **changes)
