"""Distillation: the divergences by hand, the stages on hand-made batches, and runs with a teacher's workdir."""

import dataclasses
import itertools
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import EXPERIMENTS, assert_same_run, made_dialogues, small

from lm import model as models, tokenizer
from lm.core import sharding
from lm.core.config import call_with_options, load_config
from lm.core.errors import UserError
from lm.losses.distillation import jensen_shannon, kl_divergence
from lm.model.logprobs import map_position_chunks
from lm.optim import optimizers
from lm.runs.checkpoint import Checkpoints
from lm.runs.workdir import open_workdir
from lm.stages.context import StageContext
from lm.stages.distillation import distill, gkd
from lm.stages.distillation.teacher_divergence import divergence_from_teacher
from lm.train import loop, setup, warm_start
from lm.train.host import SINGLE_RUN_HOST

__all__ = ["small"]

KEY = jax.random.key(0)
V = 31
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def log(*probabilities):
    return jnp.log(jnp.array(probabilities, jnp.float32))


STUDENT, TEACHER = log(0.5, 0.5), log(0.8, 0.2)


# The divergences


def test_the_ends_are_the_two_kls():
    # KL(teacher, student) = 0.8 log(0.8 / 0.5) + 0.2 log(0.2 / 0.5) = 0.8 * 0.470004 - 0.2 * 0.916291 = 0.192745
    # KL(student, teacher) = 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = 0.5 * (0.916291 - 0.470004) = 0.223144
    np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=0), 0.192745, rtol=1e-5)
    np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=1), 0.223144, rtol=1e-5)


def test_between_the_ends():
    # beta 0.25: m = 0.25 * (0.8, 0.2) + 0.75 * (0.5, 0.5) = (0.575, 0.425)
    # KL(teacher, m) = 0.8 log(0.8 / 0.575) + 0.2 log(0.2 / 0.425) = 0.8 * 0.330242 - 0.2 * 0.753772 = 0.113439
    # KL(student, m) = 0.5 log(0.5 / 0.575) + 0.5 log(0.5 / 0.425) = 0.5 * (0.162519 - 0.139762) = 0.011378
    # 0.25 * 0.113439 + 0.75 * 0.011378 = 0.036894
    np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=0.25), 0.036894, rtol=1e-4)
    # beta 0.5 is symmetric: the Jensen-Shannon divergence; of two that have nothing in common it is log 2
    both = [jensen_shannon(a, b, beta=0.5) for a, b in ((STUDENT, TEACHER), (TEACHER, STUDENT))]
    np.testing.assert_allclose(*both, rtol=1e-6)
    apart = jensen_shannon(log(1.0, 0.0, 0.0), log(0.0, 0.3, 0.7), beta=0.5)
    np.testing.assert_allclose(apart, np.log(2), rtol=1e-6)


def test_near_its_ends_it_is_beta_times_a_kl():
    """Agarwal et al. 2023, sec. 2: the limits of JSD / beta and JSD / (1 - beta) are the two KLs."""
    teacher, student = (jax.nn.log_softmax(jax.random.normal(key, (4, V))) for key in jax.random.split(KEY))
    forward, reverse = kl_divergence(teacher, student), kl_divergence(student, teacher)
    np.testing.assert_allclose(jensen_shannon(student, teacher, beta=0.002) / 0.002, forward, rtol=0.02)
    np.testing.assert_allclose(jensen_shannon(student, teacher, beta=0.998) / 0.002, reverse, rtol=0.02)


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(beta):
    logits = jax.random.normal(KEY, (3, V))
    loss = lambda x: jensen_shannon(jax.nn.log_softmax(x), jax.nn.log_softmax(logits), beta=beta).sum()
    value, slope = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize("beta, never", list(itertools.product(BETAS, (-1e4, -1e30, -np.inf))))
def test_what_neither_can_say_counts_for_nothing(beta, never):
    """Log-probs of no support, as top-k leaves them: no NaN in value or gradient, and the other tokens as before."""
    pad = lambda x: jnp.concatenate([x, jnp.array([never])])
    loss = lambda x, y: jensen_shannon(x, y, beta=beta)
    value, slopes = jax.value_and_grad(loss, (0, 1))(pad(STUDENT), pad(TEACHER))
    np.testing.assert_allclose(value, loss(STUDENT, TEACHER), rtol=1e-6)
    expected = jax.grad(loss, (0, 1))(STUDENT, TEACHER)
    for slope, known in zip(slopes, expected):
        np.testing.assert_allclose(slope[:2], known, rtol=1e-5)
        assert slope[2] == 0


def test_what_only_the_teacher_cannot_say_costs_the_reverse_kl_everything():
    one_sided = log(1.0, 0.0)
    assert jensen_shannon(STUDENT, one_sided, beta=1) == np.inf
    np.testing.assert_allclose(jensen_shannon(STUDENT, one_sided, beta=0), np.log(2), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jensen_shannon(x, one_sided, beta=0.9))(STUDENT)).all()


# The stages on hand-made batches


@pytest.fixture(scope="module")
def pair(tiny_model):
    """A student and a teacher of another shape, with the decoders of both, off their starting values."""
    student = models.make_model(dataclasses.replace(tiny_model.config, layers=1))
    teacher = models.make_model(
        dataclasses.replace(student.config, width=24, heads=2, kv_heads=1, tie_embeddings=False)
    )
    lm, teacher_lm = (jax.tree.map(lambda x: 1.5 * x, jax.jit(net.init)(KEY)) for net in (student, teacher))
    return SimpleNamespace(model=student, lm=lm, teacher=teacher, teacher_lm=teacher_lm)


def optimizer(learning_rate=0.01):
    return optimizers.make_optimizer(
        learning_rate=learning_rate, total_steps=1000, schedule_name="constant", weight_decay=0.0, eps=1e-5
    )


def ragged(rows, seed=0, count=4):
    draw = np.random.default_rng(seed)
    return rows(draw.integers(1, V, (count, 8)), draw.integers(4, 9, count), start=3)


def begun(pair, stage, **options):
    update = stage.make(pair.model, optimizer(), teacher=pair.teacher, **options)
    return update, update.init(KEY, {"lm": pair.lm}, {"teacher": pair.teacher_lm})


def numbers(metrics):
    return {name: float(m.value()) for name, m in metrics.items()}


def logits_of(net, lm, tokens):
    return np.asarray(
        net.logits(lm, net.hidden_states(lm, tokens.inputs, tokens.positions, tokens.segments)), np.float64
    )


def test_it_is_the_mean_over_weighted_targets(pair, rows):
    """At temperature 2, by numpy: the divergence of both distributions; the loss is the student's at temperature 1."""
    tokens = ragged(rows)
    update, state = begun(pair, distill, beta=0.0, temperature=2.0)
    found = jax.jit(update.evaluate)(state, tokens)
    ours, theirs = logits_of(pair.model, pair.lm, tokens), logits_of(pair.teacher, pair.teacher_lm, tokens)
    log_softmax = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
    p, q = log_softmax(theirs / 2), log_softmax(ours / 2)
    w = tokens.weights > 0
    assert found["divergence"].weight == w.sum()
    np.testing.assert_allclose(found["divergence"].value(), (np.exp(p) * (p - q)).sum(-1)[w].mean(), rtol=1e-4)
    written = np.take_along_axis(log_softmax(ours), tokens.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["loss"].value(), -written[w].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["agreement"].value(), (ours.argmax(-1) == theirs.argmax(-1))[w].mean(), rtol=1e-6)


def test_a_target_of_weight_0_might_as_well_not_be_there(pair, rows):
    """Whatever is written at the end of a row, weight 0 there is the shorter row."""
    ids = np.random.default_rng(1).integers(1, V, (4, 9))
    longer, shorter = (rows(ids, [length] * 4, start=3) for length in (9, 6))
    longer = longer.replace(weights=shorter.weights)
    update, state = begun(pair, distill, beta=0.5)
    step = jax.jit(update.update)
    for a, b in zip(*(jax.tree.leaves(step(state, tokens)[0].params) for tokens in (longer, shorter)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    nothing = shorter.replace(weights=jnp.zeros_like(shorter.weights))
    idle, metrics = step(state, nothing)
    jax.tree.map(np.testing.assert_array_equal, idle.params, state.params)
    assert numbers(metrics)["divergence"] == 0


def test_microbatches_do_not_change_the_update(pair, rows):
    """Rule 1, with rows of unequal weight."""
    tokens = ragged(rows)
    results = []
    for count in (1, 4):
        update, state = begun(pair, distill, beta=0.5, microbatches=count)
        results.append(jax.jit(update.update)(state, tokens))
    (one, metrics), (other, summed) = results
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for name, value in numbers(metrics).items():
        np.testing.assert_allclose(value, numbers(summed)[name], rtol=1e-5, err_msg=name)


def test_chunked_equals_plain(pair, rows):
    """Rule 10, in value and gradient: 7 positions as 3 + 3 + 1, the last piece filled up."""
    tokens = ragged(rows)
    chunky = models.make_model(dataclasses.replace(pair.model.config, loss_chunk=3))
    found = []
    for net in (pair.model, chunky):
        compare = divergence_from_teacher(net, pair.teacher, beta=0.5, temperature=0.7)
        loss = lambda lm: jnp.sum(compare(lm, pair.teacher_lm, tokens).divergence * tokens.weights)
        found.append((jax.jit(compare)(pair.lm, pair.teacher_lm, tokens), jax.jit(jax.grad(loss))(pair.lm)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_logits_of_neither_exist_at_once(pair, rows):
    """No array of all positions times the vocabulary in the program of a chunked step, forward or backward."""
    tokens = ragged(rows)
    chunky = models.make_model(dataclasses.replace(pair.model.config, loss_chunk=3))
    sizes = []
    for net in (pair.model, chunky):
        compare = divergence_from_teacher(net, pair.teacher, beta=0.5, temperature=1.0)
        loss = lambda lm: jnp.sum(compare(lm, pair.teacher_lm, tokens).divergence)
        sizes.append("4,7,31]" in str(jax.make_jaxpr(jax.grad(loss))(pair.lm)))
    assert sizes == [True, False]


def test_chunks_keep_trees_and_further_axes():
    x, y = np.arange(24.0).reshape(2, 6, 2), np.arange(12).reshape(2, 6)
    function = lambda x, y: {"sum": x.sum(-1) + y, "both": x * y[..., None]}
    for size in (0, 1, 4, 5, 6, 7):
        jax.tree.map(
            np.testing.assert_array_equal, map_position_chunks(function, x, y, chunk_size=size), function(x, y)
        )


@pytest.mark.parametrize("stage", [distill, gkd])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 1.5}, r"stage.beta is 1.5; it must be from 0 \(forward KL\) to 1 \(reverse KL\)"),
        ({"temperature": 0.0}, "stage.temperature is 0.0; it must be above 0"),
    ],
)
def test_options_that_make_no_sense(pair, stage, options, message):
    with pytest.raises(UserError, match=message):
        stage.make(pair.model, optimizer(), teacher=pair.teacher, **options)


def test_a_teacher_must_have_the_student_s_logits_and_context(pair, rows):
    other = models.make_model(dataclasses.replace(pair.teacher.config, vocab_size=V + 1))
    with pytest.raises(UserError, match="logits for 31 tokens and stage.teacher for 32, a teacher with another vocab"):
        distill.make(pair.model, optimizer(), teacher=other)
    short = models.make_model(dataclasses.replace(pair.teacher.config, context=6))
    compare = divergence_from_teacher(pair.model, short, beta=0.0, temperature=1.0)
    with pytest.raises(UserError, match="rows of 7 tokens are longer than stage.teacher's context of 6"):
        compare(pair.lm, pair.teacher_lm, ragged(rows))


def test_the_student_comes_to_say_what_its_teacher_says(pair, rows):
    """The teacher knows one likely next token for each token (its blocks add nothing); the written tokens are noise.

    On rows never seen the divergence falls below a tenth; the teacher stays as it was, bit by bit.
    """
    silent = {
        name: 0 * leaf if name in ("attention_out", "down") else leaf
        for name, leaf in pair.teacher_lm["layers"].items()
    }
    teacher_lm = {**pair.teacher_lm, "layers": silent}
    update = distill.make(pair.model, optimizer(0.02), teacher=pair.teacher, beta=0.5)
    state = update.init(KEY, {"lm": pair.lm}, {"teacher": teacher_lm})
    unseen = ragged(rows, seed=10_000, count=64)
    evaluate, step = jax.jit(update.evaluate), jax.jit(update.update)
    before = numbers(evaluate(state, unseen))
    for i in range(80):
        state, _ = step(state, ragged(rows, seed=i, count=64))
    after = numbers(evaluate(state, unseen))
    assert after["divergence"] < 0.1 * before["divergence"], (before, after)
    assert before["agreement"] < 0.2 and after["agreement"] > 0.6, (before, after)
    jax.tree.map(np.testing.assert_array_equal, state.frozen["teacher"], teacher_lm)


# On-policy


def test_held_out_tells_the_student_s_words_from_people_s(pair, rows):
    """Rows 0 and 2 are its own; each kind is the mean of its own rows, and equals what stage distill says of them."""
    tokens = ragged(rows)
    update, state = begun(pair, gkd, beta=0.5)
    found = numbers(jax.jit(update.evaluate)(state, gkd.HeldOutRows(tokens, np.array([1, 0, 1, 0], np.float32))))
    plain, _ = begun(pair, distill, beta=0.5)
    own, people = (
        numbers(jax.jit(plain.evaluate)(state, jax.tree.map(lambda x: x[start::2], tokens))) for start in (0, 1)
    )
    assert sorted(found) == ["agreement", "divergence", "loss", "on_policy_agreement", "on_policy_divergence"]
    for name in ("divergence", "agreement", "loss"):
        np.testing.assert_allclose(found[name], people[name], rtol=1e-5)
    for name in ("divergence", "agreement"):
        np.testing.assert_allclose(found[f"on_policy_{name}"], own[name], rtol=1e-5)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """A tokenizer of made conversations."""
    found = tokenizer.train_tokenizer(
        (turn for _, turns in made_dialogues() for turn in turns), vocab_size=320, max_bytes=10**6
    )
    found.save(tmp_path_factory.mktemp("speech") / "tokenizer.model")
    return found


def net(speech, **sizes):
    common = dict(vocab_size=speech.vocab_size, layers=1, heads=2, kv_heads=1, head_size=8, hidden=24, context=64)
    return models.make_model(models.ModelConfig(**common, **sizes).for_backend("cpu"))


def test_a_coin_says_who_writes_a_batch(small, speech):
    """A function of (seed, i): half of the batches are sampled at 0.5, all at 1, none at 0, and again the same."""
    student = net(speech, width=16)
    state = SimpleNamespace(params={"lm": jax.jit(student.init)(KEY)}, key=KEY)
    options = dict(prompt_length=32, max_new=8, rollouts=8, length=60, batch_size=4, held_out=0.05, held_out_rollouts=8)
    context = StageContext(student, speech, 0, jax.jit, None)

    def gkd_batches(**changes):
        return call_with_options(gkd.batches, {**options, **changes}, context, name="data")

    batches = {share: gkd_batches(on_policy_fraction=share) for share in (0.0, 0.5, 1.0)}
    kinds = {share: [len(found.train(state, i).inputs) for i in range(12)] for share, found in batches.items()}
    assert set(kinds[0.0]) == {4} and set(kinds[1.0]) == {8} and 2 <= kinds[0.5].count(8) <= 10
    again = gkd_batches(on_policy_fraction=0.5)
    for i in (kinds[0.5].index(4), kinds[0.5].index(8)):
        jax.tree.map(np.testing.assert_array_equal, again.train(state, i), batches[0.5].train(state, i))
    first = batches[1.0].train(state, 0)
    counted = first.weights.sum(axis=1)
    assert first.inputs.shape == (8, 32 + 8 - 1) and ((1 <= counted) & (counted <= 8)).all()
    (own, *people) = batches[0.5].held_out(state)
    assert (
        own.is_student_written.all()
        and len(own.is_student_written) == 8
        and people
        and not any(lesson.is_student_written.any() for lesson in people)
    )
    with pytest.raises(UserError, match="data.on_policy_fraction is 2; it is a share of batches, from 0 to 1"):
        gkd_batches(on_policy_fraction=2)
    with pytest.raises(UserError, match="held_out_rollouts is 8, no whole batch of data.rollouts 64: raise it to 64"):
        gkd_batches(rollouts=64)


# Runs


@pytest.fixture(scope="module")
def teacher(speech, tmp_path_factory):
    """A workdir as a stage leaves it, of a network of another shape than the student's."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    larger = net(speech, width=24, tie_embeddings=False)
    left_behind(folder, "sft", speech, larger)
    return folder


def left_behind(folder, stage, tokens, network):
    lm = jax.tree.map(lambda x: 2.0 * x, jax.jit(network.init)(jax.random.key(5)))
    meta = {"stage": stage, "fingerprint": tokens.fingerprint, "model": dataclasses.asdict(network.config)}
    with open_workdir(folder, {}) as workdir, Checkpoints(workdir.checkpoints_path) as checkpoints:
        tokens.save(workdir.tokenizer_path)
        checkpoints.save(1, {"params": {"lm": lm}}, meta)


@pytest.fixture
def config(teacher):
    """config(stage, *overrides): its experiment, tiny, from nothing, taught by `teacher`."""

    def of(stage, *overrides):
        given = [f"stage.teacher={teacher}", f"tokenizer={teacher}", "optimizer.warmup_steps=1"]
        given += ["train.steps=4", "train.log_every=2", "train.save_every=2"]
        given += ["model.layers=1"] if stage == "distill" else []  # the other's come with init_from
        return load_config(f"{EXPERIMENTS / stage}.py:tiny", [*given, *overrides])

    return of


def test_a_taught_run_resumes_to_the_same_bits(small, config, tmp_path):
    """What a kill after the checkpoint of step 2 would leave; the teacher is loaded anew, never saved."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    summary = loop.train_stage(config("distill"), straight)
    assert summary["held_out"]["divergence"] < summary["before"]["divergence"]
    assert not [path for path in (straight / "checkpoints").rglob("*") if "teacher" in path.name]
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoints" / "4")
    (killed / "summary.json").unlink()
    loop.train_stage(config("distill"), killed)
    assert_same_run(killed, straight)
    # then the student goes on with its own words
    summary = loop.train_stage(
        config("gkd", f"init_from={straight}", "data.on_policy_fraction=1.0", "tokenizer="), tmp_path / "gkd"
    )
    assert summary["held_out"]["on_policy_divergence"] < summary["before"]["on_policy_divergence"]


@pytest.fixture(scope="module")
def strangers(teacher, tmp_path_factory):
    """Workdirs that can teach nobody: of another tokenizer, and of a reward model."""
    folder = tmp_path_factory.mktemp("strangers")
    other = tokenizer.train_tokenizer(
        (" ".join(turns) for _, turns in made_dialogues()), vocab_size=310, max_bytes=10**6
    )
    left_behind(folder / "foreign", "sft", other, net(other, width=16))
    known = tokenizer.load_tokenizer(teacher / "tokenizer.model")
    left_behind(folder / "judge", "reward", known, net(known, width=16))
    return folder


@pytest.mark.parametrize(
    "override, message",
    [
        ("stage.teacher=nowhere", "there is no workdir nowhere: train that stage first, or name another"),
        ("stage.teacher=", "a workdir's name is empty: give the folder of a trained stage"),
        ("stage.teacher={}/judge", "stage.teacher {}/judge is a reward model, which scores answers and writes none"),
        ("stage.teacher={}/foreign", "stage.teacher {}/foreign was trained with tokenizer and template "),
        ("stage.teacher={}/foreign", "and a teacher with another vocabulary cannot be followed token by token: "),
        ("stage.beta=-1", "stage.beta is -1.0; it must be from 0"),
    ],
)
def test_bad_teachers_are_one_line(small, config, strangers, tmp_path, override, message):
    with pytest.raises(UserError) as error:
        loop.train_stage(config("distill", override.format(strangers)), tmp_path / "run")
    said = str(error.value)
    assert message.format(strangers) in said and "\n" not in said
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_teacher_that_is_not_named(small, config, tmp_path):
    forgetful = config("distill").unlock()
    del forgetful.stage.teacher
    with pytest.raises(
        UserError, match="stage.teacher is missing: lm.stages.distillation.distill.make has no default for it"
    ):
        loop.train_stage(forgetful, tmp_path / "run")


def test_a_teacher_of_another_shape_lies_on_the_mesh_like_any_network(speech, teacher):
    """Its leaves, the untied head that the student lacks included, are split by their own logical axes."""
    student = net(speech, width=16)
    trained = warm_start.teacher_from_workdir(str(teacher), speech)
    update = distill.make(student, optimizer(), teacher=trained.model)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    given = student, 0, {}, {}, {"teacher": trained}, mesh, SINGLE_RUN_HOST
    state, shardings = setup.initial_state(lambda scalars: update, *given)
    found = state.frozen["teacher"]
    jax.tree.map(np.testing.assert_array_equal, found, trained.params["lm"])
    for leaf in (found["head"], found["embedding"], found["layers"]["query"], state.params["lm"]["layers"]["query"]):
        assert leaf.addressable_shards[0].data.size * 4 == leaf.size
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
