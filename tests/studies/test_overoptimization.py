"""The over-optimisation lab: the estimator by enumeration, the fits on known curves, and a tiny lab from end to end."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
from runs import EXPERIMENTS, enter_small_world, finished

from lm.core.config import load_config
from lm.core.errors import UserError
from lm.core.statistics import mean_estimate
from lm.data import preferences, sources
from lm.rewards import REWARDS
from lm.runs.workdir import read_json
from lm.studies.overoptimization import curves, measure, page, study
from lm.train import loop

__all__ = ["finished"]


def by_enumeration(values, by, n) -> float:
    """The mean, over every choice of n answers, of the value of the best by `by`; of several such, their mean."""
    best = []
    for chosen in itertools.combinations(range(len(by)), n):
        top = max(by[i] for i in chosen)
        best.append(np.mean([values[i] for i in chosen if by[i] == top]))
    return float(np.mean(best))


def test_best_of_n_by_hand():
    """Of 3 answers with proxies 1, 2, 3 and gold 10, 20, 60, two are drawn: {1,2} gives 20, the other two pairs 60."""
    assert curves.best_of_n_mean(np.array([[10.0, 20.0, 60.0]]), np.array([[1.0, 2.0, 3.0]]), 2) == pytest.approx(
        [140 / 3]
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_best_of_n_is_the_mean_over_every_choice(n):
    """Of 7 answers, with ties by the proxy and without."""
    draw = np.random.default_rng(0)
    values, by = draw.normal(size=(2, 7)), np.array([draw.normal(size=7), [1.0, 3.0, 2.0, 3.0, 1.0, 3.0, 2.0]])
    found = curves.best_of_n_mean(values, by, n)
    assert found == pytest.approx([by_enumeration(*pair, n) for pair in zip(values, by)])
    if n == 1:
        assert found == pytest.approx(values.mean(axis=1))


def test_best_of_n_of_a_large_pool_is_finite():
    by = np.random.default_rng(0).normal(size=(2, 1000))
    assert curves.best_of_n_mean(by, by, 1000) == pytest.approx(by.max(axis=1))
    assert np.all(np.diff([curves.best_of_n_mean(by, by, n) for n in (1, 10, 100, 500)], axis=0) > 0)


def test_the_kl_of_best_of_n():
    """log 2 - 1/2 and log 4 - 3/4; nothing for n = 1. The n go up to the pool, each once."""
    assert curves.best_of_n_kl(np.array([1, 2, 4])) == pytest.approx([0, 0.193147, 0.636294], abs=1e-6)
    found = curves.best_of_n_counts(16)
    assert found[0] == 1 and found[-1] == 16 and found == sorted(set(found))


@pytest.mark.parametrize("form, d", [(curves.BEST_OF_N, np.linspace(0, 2, 9)), (curves.PPO, np.linspace(0, 6, 9))])
def test_a_fit_recovers_what_made_the_curve(form, d):
    """alpha 1.5, beta 0.4; at d = 0 there is nothing to learn, and log 0 harms nobody."""
    made = d * (1.5 - 0.4 * d) if form == curves.BEST_OF_N else d * (1.5 - 0.4 * np.log(np.maximum(d, 1e-9)))
    assert curves.fitted_coefficients(form, d, made) == pytest.approx([1.5, 0.4])
    peak = curves.CURVE_PEAKS[form](1.5, 0.4)
    assert peak == pytest.approx({curves.BEST_OF_N: 1.5 / 0.8, curves.PPO: math.exp(1.5 / 0.4 - 1)}[form])
    value = lambda x: np.array([1.5, 0.4]) @ curves.CURVE_FORMS[form](np.array([x]))
    assert value(peak) > value(0.99 * peak) and value(peak) > value(1.01 * peak)


def curve(gold, kl=None, method=curves.PPO, members=1) -> curves.RewardCurve:
    gold = np.asarray(gold, float)
    kl = np.repeat(np.linspace(0.5, 9, len(gold))[:, None], gold.shape[1], axis=1) if kl is None else kl
    return curves.RewardCurve(method, 50, members, list(range(len(gold))), kl, gold, 2 * gold)


def noisy(d, *, alpha: float, beta: float, prompts: int = 200, deviation: float = 1.0) -> np.ndarray:
    truth = d * (alpha - beta * np.log(d))
    return truth[:, None] + deviation * np.random.default_rng(0).normal(size=(len(d), prompts))


def test_coefficients_come_with_intervals_that_hold_the_truth():
    d = np.sqrt(np.linspace(0.5, 9, 12))
    found = curves.coefficient_estimates(curve(gold := noisy(d, alpha=1.0, beta=0.5)), gold)
    for name, truth in (("alpha", 1.0), ("beta", 0.5)):
        told = found[name]
        assert told["low"] < truth < told["high"] and told["low"] < told["value"] < told["high"]
        assert told["high"] - told["low"] < 0.5
    assert found["peak"] == pytest.approx(math.exp(found["alpha"]["value"] / found["beta"]["value"] - 1))
    rising = curves.coefficient_estimates(curve(gold := noisy(d, alpha=1.0, beta=-0.5)), gold)
    assert rising["peak"] is None  # it has none


def test_a_fall_is_seen_where_there_is_one():
    d = np.sqrt(np.linspace(0.5, 9, 12))
    falls = curves.gold_decline(curve(noisy(d, alpha=1.0, beta=0.9)))
    assert falls.high < 0
    flat = curves.gold_decline(curve(noisy(d, alpha=0.0, beta=0.0)))
    assert flat.low < 0 < flat.high
    rises = curves.gold_decline(curve(noisy(d, alpha=1.0, beta=0.0, deviation=0.1)))
    assert (rises.value, rises.low, rises.high) == (0, 0, 0)


def test_choosing_the_luckiest_station_costs_nothing():
    """Of 30 stations that do not differ, the best is above the last by luck: measured on the same prompts, that would
    look like a fall in a quarter of all cases, and on the others it does in one of twenty."""
    draw, naive, found = np.random.default_rng(0), 0, 0
    for _ in range(200):
        gold = draw.normal(size=(30, 60))
        best = gold[np.argmax(gold.mean(axis=1))]
        naive += mean_estimate(gold[-1] - best).high < 0
        found += curves.gold_decline(curve(gold)).high < 0
    assert naive > 40 and found < 15


def test_deviations_are_within_prompts():
    """Two prompts whose answers vary by 1 around means far apart: (variance 2 + 2) / 2, not that of the means."""
    assert curves.within_prompt_deviation(np.array([[-1.0, 1.0], [99.0, 101.0]])) == pytest.approx(math.sqrt(2))


def test_an_ensemble_is_that_of_the_rewards():
    """Mean less half a deviation: 2 - 0.5 and 5 - 0."""
    assert measure.ensemble_scores(np.array([[1.0, 5.0], [3.0, 5.0]]), 0.5).tolist() == [1.5, 5.0]


def lab_config(run, *overrides):
    given = (f"init_from={run}/sft", "sizes=(8,)", "reward_steps=(2,)", *overrides)
    return load_config(f"{EXPERIMENTS / 'overoptimization.py'}:tiny", given)


@pytest.fixture(scope="module")
def root(finished, tmp_path_factory):
    """A lab with one size and two proxies that was stopped as the second PPO began, and started again."""
    path, run = tmp_path_factory.mktemp("lab") / "run", loop.train_stage
    with pytest.MonkeyPatch.context() as patch:
        enter_small_world(patch.setattr)

        def stopped(config, workdir):
            if str(workdir).endswith("8x2"):
                raise KeyboardInterrupt
            return run(config, workdir)

        patch.setattr(loop, "train_stage", stopped)
        with pytest.raises(KeyboardInterrupt):
            study.run_overoptimization(lab_config(finished), path)
        shutil.copytree(path, path.with_name("before"))
        patch.setattr(loop, "train_stage", run)
        study.run_overoptimization(lab_config(finished), path)
    return path


@pytest.fixture(scope="module")
def summary(root):
    return read_json(root / "summary.json")


def test_a_second_start_goes_on_where_the_first_stopped(root):
    before = root.with_name("before")
    assert not (before / "summary.json").exists() and not (before / "ppo" / "8x2").exists()
    kept = [file.relative_to(before) for file in before.rglob("*.json*") if file.name != "config.json"]
    assert {"pool.jsonl", "summary.json", "rankings-8.jsonl", "measured-4.json"} <= {file.name for file in kept}
    assert all((root / file).read_bytes() == (before / file).read_bytes() for file in kept)


def test_proxies_learn_from_the_first_verdicts_of_the_gold_rater(root):
    """Both members from the same 8, each in an order of its own; the held-out ones are all there."""
    seen, unseen = [], []
    for ranking in preferences.read_jsonl_rankings(root / "verdicts" / "rankings-8.jsonl"):
        (unseen if sources.is_held_out(ranking.name, 0.15) else seen).append(ranking)
    every = [
        r
        for r in preferences.read_jsonl_rankings(root / "verdicts" / "rankings.jsonl")
        if preferences.preference_pairs(r)
    ]
    assert seen == [r for r in every if not sources.is_held_out(r.name, 0.15)][:8]
    assert unseen == [r for r in every if sources.is_held_out(r.name, 0.15)] != []
    configs = [read_json(root / "reward" / "8" / str(member) / "config.json") for member in (0, 1)]
    assert [config["seed"] for config in configs] == [0, 1]
    assert {config["data"]["rankings"] for config in configs} == {str(root / "verdicts" / "rankings-8.jsonl")}
    assert {config["train"]["steps"] for config in configs} == {
        config["optimizer"]["total_steps"] for config in configs
    }


def test_the_pool_is_scored_by_the_rule_and_by_every_proxy(root, summary):
    rows = [json.loads(line) for line in (root / "pool.jsonl").read_text().splitlines()]
    assert len(rows) == summary["samples"] == 8 and {len(row["texts"]) for row in rows} == {summary["prompts"]} == {16}
    assert len({text for row in rows for text in row["texts"]}) > 64  # draws differ
    assert {len(read_json(root / "pool" / f"8-{member}.json")) for member in (0, 1)} == {128}
    assert set(itertools.chain(*(row["gold"] for row in rows))) <= set(range(-4, 8))
    assert REWARDS["rule"]([{"messages": [{"role": "user", "content": ""}]}], [""]).shape == (1,)


def test_every_climb_has_its_curve(root, summary):
    named = {(c["method"], c["members"]): c for c in summary["curves"]}
    assert set(named) == {(method, members) for method in (curves.BEST_OF_N, curves.PPO) for members in (1, 2)}
    for (method, _), told in named.items():
        assert told["stations"] == (curves.best_of_n_counts(8) if method == curves.BEST_OF_N else [2, 4])
        assert len(told["distance"]) == len(told["gold"]) == len(told["proxy"]) == len(told["stations"])
    start = named[curves.BEST_OF_N, 1]
    assert start["distance"][0] < 2e-3 and start["gold"][0]["value"] == pytest.approx(0, abs=1e-9)
    assert all(b["value"] >= a["value"] for a, b in itertools.pairwise(start["proxy"]))  # it takes the proxy's best
    measured = [read_json(root / "ppo" / "8" / f"measured-{step}.json") for step in (2, 4)]
    assert named[curves.PPO, 1]["distance"] == pytest.approx(
        [math.sqrt(max(np.mean(each["kl"]), 1e-6)) for each in measured]
    )


def test_the_page_and_the_pictures(root, summary):
    text = (root / "overoptimisation.html").read_text()
    assert text.count("<svg") == 1 and "<script" not in text
    assert (root / "overoptimisation.svg").read_text().startswith("<svg")
    assert (root / "overoptimisation.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"<td>{told['name']}</td>" in text for told in summary["curves"])


def test_sentences_say_what_was_seen():
    down, up = {"value": -0.5, "low": -0.8, "high": -0.2}, {"value": 0.0, "low": 0.0, "high": 0.0}
    noise = {"value": -0.1, "low": -0.3, "high": 0.1}
    each = dict(distance=[1.0, 2.0, 3.0], gold=[{"value": value} for value in (0.2, 1.0, 0.5)])
    told = [
        {**each, "name": "a", "highest": 1, "fall": down, "turns": True},
        {**each, "name": "b", "highest": 1, "fall": noise, "turns": False},
        {**each, "name": "c", "highest": 2, "fall": up, "turns": False},
    ]
    one = {"method": curves.PPO, "verdicts": 50, **down}
    assert page.conclusion_sentences({"curves": told, "ensembles": [one, {**one, **noise}]})[:5] == [
        "a: gold +0.50 at the end (distance 3.0), highest +1.00 at 2.0: it turns down, by −0.50 [−0.80, −0.20].",
        "b: gold +0.50 at the end (distance 3.0), highest +1.00 at 2.0: whether it turns down is inside the noise "
        "(−0.10 [−0.30, +0.10]).",
        "c: gold +0.50 at the end (distance 3.0), its highest: it does not turn down in this range.",
        "ppo, 50 verdicts: at the end the ensemble harms (−0.50 [−0.80, −0.20]).",
        "ppo, 50 verdicts: at the end the ensemble makes no difference outside the noise (−0.10 [−0.30, +0.10]).",
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("init_from=nowhere", "there is no workdir nowhere: train that stage first"),
        ("sizes=()", r"sizes is \(\): give numbers of verdicts, each once, the smallest first"),
        ("sizes=(0,)", "config.sizes is 0; it must be at least 1"),
        ("sizes=(16,8)", r"sizes is \(16, 8\): give numbers of verdicts, each once, the smallest first"),
        ("reward_steps=(2,2)", "reward_steps has 2 entries for 1 sizes: one for each"),
        ("members=0", "config.members is 0; it must be at least 1"),
        ("evaluate.rater=length", "evaluate.rater is 'length', verdicts.rank.rater 'rule': the gold rater must be the"),
        ("ppo.train.steps=5", "ppo.train has steps 5, save_every 2 and keep 2: every saved policy is a point"),
        ("evaluate.samples=1", "evaluate.samples is 1; it must be at least 2"),
        ("prompts.turns=0", "prompts.turns is 0; it must be at least 1"),
        ("reward.data.length=40", r"proxies are trained on \(reward.data.length\) rows of 40 tokens, .* may have 41"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(finished, tmp_path, monkeypatch, override, message):
    enter_small_world(monkeypatch.setattr)
    monkeypatch.setattr(study.auto_rank, "run_auto_rank", lambda *_: pytest.fail("ranked"))
    with pytest.raises(UserError, match=message):
        study.run_overoptimization(lab_config(finished, override), tmp_path / "lab")


def test_prompts_that_somebody_learns_from_are_refused(finished):
    config = lab_config(finished).unlock()
    del config.ppo.data.held_out  # in our config it follows prompts.held_out
    config.ppo.data.held_out = 0.1
    with pytest.raises(UserError, match="ppo.data.held_out is 0.1, prompts.held_out 0.05: they must be the same"):
        study.check_config(config)


def test_too_few_verdicts_are_told(root, finished):
    with pytest.raises(UserError, match="the gold rater decided only .* pairs to learn from, sizes asks for 1,000"):
        measure.ranking_subset_file(root, 1000, 0.15)
