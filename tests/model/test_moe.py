"""Mixtures of experts: the routed product, what keeps the experts in use, and that a router learns it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model
from lm.core.errors import UserError
from lm.model import lora
from lm.model.moe import Routing, load_balancing_loss, moe_mlp, router_z_loss
from lm.model.quantization import quantized_params
from lm.optim import optimizers
from lm.stages.pretraining import pretrain, sft
from lm.stages.pretraining.next_token import next_token_loss

E, K, D, F = 4, 2, 8, 6


@pytest.fixture(scope="module")
def mixture(tiny_model) -> model.Model:
    return model.make_model(dataclasses.replace(tiny_model.config, experts=E, experts_per_token=K, hidden=12))


@pytest.fixture(scope="module")
def fresh(mixture):
    return jax.jit(mixture.init)(jax.random.key(0))


def tokens_of(rows, seed=0, n=8):
    draw = np.random.default_rng(seed)
    return rows(draw.integers(1, 31, (n, 9)), draw.integers(3, 10, n), start=2)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    "changes", [{}, {"experts_normalized": False, "gated": False}, {"experts_per_token": E}], ids=str
)
def test_routed_equals_a_loop_over_experts(changes):
    """In float64, a token and an expert at a time; and the gradient of one entry by finite differences."""
    c = model.ModelConfig(vocab_size=9, width=D, hidden=F, experts=E, experts_per_token=K)
    c = dataclasses.replace(c, **changes)
    draw = np.random.default_rng(0)
    layer = {
        "gate": draw.normal(size=(E, D, F)),
        "up": draw.normal(size=(E, D, F)),
        "down": draw.normal(size=(E, F, D)),
    }
    layer["router"], x = draw.normal(size=(D, E)), draw.normal(size=(3, 5, D))

    def by_hand(layer):
        out = np.zeros_like(x)
        for b, t in np.ndindex(3, 5):
            logits = x[b, t] @ layer["router"]
            p = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(-p)[: c.experts_per_token]
            total = p[chosen].sum() if c.experts_normalized else 1.0
            for e in chosen:
                up = x[b, t] @ layer["up"][e]
                h = silu(x[b, t] @ layer["gate"][e]) * up if c.gated else silu(up)
                out[b, t] += p[e] / total * (h @ layer["down"][e])
        return out

    run = jax.jit(lambda layer: moe_mlp(c, layer, jnp.asarray(x, jnp.float32), jax.nn.silu))
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), layer)
    out, routing = run(single)
    np.testing.assert_allclose(out, by_hand(layer), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(routing.log_z, np.log(np.exp(x @ layer["router"]).sum(-1)), rtol=1e-5)
    np.testing.assert_array_equal(routing.expert_mask.sum(-1), c.experts_per_token)
    gradient = jax.jit(jax.grad(lambda layer: jnp.sum(run(layer)[0])))(single)
    for name in ("router", "up", "down"):
        index = tuple(np.unravel_index(np.abs(gradient[name]).argmax(), gradient[name].shape))
        moved = [{**layer, name: layer[name].copy()} for _ in range(2)]
        moved[0][name][index] += 1e-6
        moved[1][name][index] -= 1e-6
        slope = (by_hand(moved[0]).sum() - by_hand(moved[1]).sum()) / 2e-6
        np.testing.assert_allclose(gradient[name][index], slope, rtol=1e-3, err_msg=name)


def of_shares(chosen, probabilities) -> Routing:
    """One layer and one row of tokens."""
    chosen, probabilities = (jnp.asarray(a, jnp.float32)[None, None] for a in (chosen, probabilities))
    return Routing(probabilities, chosen, jnp.zeros(chosen.shape[:-1]))


def test_balance_by_hand():
    """Even: E / k sum_e (k / E) (1 / E) = 1. All on one of four: 4 / 1 * 1 * 1 = 4. Padding does not count."""
    even = of_shares(np.tile([[1, 1, 0, 0], [0, 0, 1, 1]], (2, 1)), np.full((4, 4), 0.25))
    np.testing.assert_allclose(load_balancing_loss(even, jnp.ones((1, 4))), 1)
    one = of_shares([[1, 0, 0, 0]] * 4, [[1, 0, 0, 0]] * 4)
    np.testing.assert_allclose(load_balancing_loss(one, jnp.ones((1, 4))), 4)
    # Two tokens count: f = (1, 1/2, 1/2, 0), P = (0.5, 0.3, 0.1, 0.1): 4 / 2 * (0.5 + 0.15 + 0.05) = 1.4.
    mixed = of_shares(
        [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], [[0.6, 0.4, 0, 0], [0.4, 0.2, 0.2, 0.2], [0, 0, 0, 1]]
    )
    np.testing.assert_allclose(load_balancing_loss(mixed, jnp.array([[1.0, 1.0, 0.0]])), 1.4, rtol=1e-6)
    assert load_balancing_loss(mixed, jnp.zeros((1, 3))) == 0
    # The mean over layers: of 1.4 and 4.
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:, :, :3]]), mixed, one)
    np.testing.assert_allclose(load_balancing_loss(both, jnp.array([[1.0, 1.0, 0.0]])), 2.7, rtol=1e-6)


def test_router_z_by_hand():
    """Two layers whose routers' logsumexp is 1 and 3: (1 + 9) / 2 = 5."""
    routing = Routing(jnp.ones((2, 1, 1, 4)), jnp.ones((2, 1, 1, 4)), jnp.array([1.0, 3.0]).reshape(2, 1, 1))
    np.testing.assert_array_equal(router_z_loss(routing), [[5.0]])


def test_the_terms_of_the_loss(mixture, fresh, rows):
    """Of all tokens but padding, trained or not; logged without their coefficients. No NaN where all is padding."""
    tokens, padding = tokens_of(rows), jax.tree.map(np.zeros_like, tokens_of(rows))
    loss = jax.jit(
        functools.partial(next_token_loss(mixture, balance_loss=0.01, router_z_loss=0.001), {"lm": fresh}, {})
    )
    terms, metrics = loss(tokens, jax.random.key(0))
    _, routing = jax.jit(mixture.hidden_and_routing)(fresh, tokens.inputs, tokens.positions, tokens.segments)
    real = tokens.segments > 0
    share = np.asarray(routing.expert_mask)[:, real].mean(axis=1)
    probability = np.asarray(routing.probabilities)[:, real].mean(axis=1)
    expected = {
        "balance": np.mean(E / K * (share * probability).sum(-1)),
        "router_z": np.square(np.asarray(routing.log_z)[:, real]).mean(),
    }
    for name, coefficient in (("balance", 0.01), ("router_z", 0.001)):
        np.testing.assert_allclose(metrics[name].value(), expected[name], rtol=1e-5)
        np.testing.assert_allclose(terms[name].value(), coefficient * expected[name], rtol=1e-5)
        assert terms[name].weight == real.sum() > tokens.weights.sum()
    empty, _ = loss(padding, jax.random.key(0))
    assert all(term.total == term.weight == 0 for term in empty.values())


def skewed(fresh):
    """All tokens on the first two of four experts: every embedding gets a part in common, which their routers follow.

    What is added to all embeddings alike changes no probability of a tied model.
    """
    router = fresh["layers"]["router"]
    layers = {**fresh["layers"], "router": router + jnp.array([0.3, 0.3, 0, 0])}
    return {**fresh, "embedding": fresh["embedding"] + 0.5, "layers": layers}


def test_a_skewed_router_learns_to_share(mixture, fresh, rows):
    """Half of the experts idle: balance is 2. It falls to 1, as every router learns; without the term it stays."""
    batches = [tokens_of(rows, seed) for seed in range(4)]
    optimizer = optimizers.make_optimizer(learning_rate=3e-3, total_steps=100, schedule_name="constant")

    @jax.jit
    def run(coefficient):
        update = pretrain.make(mixture, optimizer, balance_loss=coefficient)
        state = update.init(jax.random.key(0), {"lm": skewed(fresh)}, {})
        many = jax.tree.map(lambda *each: jnp.stack([jnp.asarray(x) for x in each]), *batches * 15)
        return jax.lax.scan(update.update, state, many)

    state, metrics = run(1.0)
    _, without = run(0.0)
    values = lambda metrics, name: np.asarray(metrics[name].total / metrics[name].weight)
    even = values(metrics, "balance")
    assert even[0] > 1.8 and even[-1] < 1.1 and values(without, "balance")[-1] > 1.4
    assert values(metrics, "loss")[-1] < values(metrics, "loss")[0] - 0.3
    moved = jnp.abs(state.params["lm"]["layers"]["router"] - skewed(fresh)["layers"]["router"])
    assert np.all(np.asarray(moved).max(axis=(1, 2)) > 0.01)


@pytest.mark.parametrize("stage, name", [(pretrain, "balance_loss"), (sft, "router_z_loss")])
def test_a_model_without_experts_has_neither(stage, name, tiny_model):
    with pytest.raises(UserError, match=f"stage.{name} is 0.01, but the model has no experts: leave it out, or set"):
        stage.make(tiny_model, optimizers.make_optimizer(learning_rate=1.0, total_steps=1), **{name: 0.01})


def test_experts_of_a_base_kept_in_8_bits(mixture, fresh, rows):
    """Adapters on a frozen mixture: its experts' columns are scaled as those of other matrices are."""
    c = dataclasses.replace(mixture.config, lora_rank=1, lora_base_dtype="int8")
    adapted, tokens = model.make_model(c), tokens_of(rows)
    base, adapters = quantized_params(c.lora_base_dtype, fresh), jax.jit(adapted.init)(jax.random.key(1))
    assert base["layers"]["gate"].dtype == jnp.int8
    found = jax.jit(adapted.token_logprobs)(lora.adapters_over_base(adapters, {lora.FROZEN_BASE: base}), tokens)
    expected = jax.jit(mixture.token_logprobs)(lora.merged_params(c, base, adapters), tokens)
    np.testing.assert_allclose(found, expected, atol=2e-4)
