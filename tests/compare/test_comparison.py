"""Comparing runs: what is one setting, what the numbers are, what may be concluded, and what a user is told."""

import itertools
import json
import math
import re
from html import escape

import numpy as np
import pytest
from runs import finished
from scipy import stats

from lm.compare import comparison, figures, importance, page, statistics
from lm.compare.read import LoadedRuns, Run, read_runs
from lm.compare.settings import CODE_KEY, Setting, settings_of_runs
from lm.compare.statistics import (
    BETTER,
    INSIDE_NOISE,
    NOT_JUDGED,
    PAIRED,
    UNPAIRED,
    WORSE,
    cochran_p_value,
    comparison_count,
    contrasts_with_reference,
    hedges_correction,
    holm_factors,
    pooled_spread,
    setting_result,
)
from lm.compare.text import comparison_warnings, conclusion_sentences, contrast_sentence, correction_note
from lm.core.errors import UserError

__all__ = ["finished"]

CONFIG = {
    "seed": 0,
    "init_from": "",
    "model": {"width": 64, "hidden": 192},
    "optimizer": {"learning_rate": 0.001},
    "stage": {"name": "pretrain"},
    "train": {"steps": 20, "log_every": 10},
}


def made(path, value=4.0, *, finished=True, record=None, metric="held_out/loss", **changes):
    """The workdir of a run that ended at `value`; changes are dotted keys with __ for the dot."""
    config = json.loads(json.dumps(CONFIG))
    for key, new in changes.items():
        *parents, leaf = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[leaf] = new
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"step": step, metric: value + (20 - step) / 10, "tokens": 100 * step, "seconds": 0.5 * step}
            for step in (0, 10, 20)]  # fmt: skip
    rows.insert(2, {"step": 10, "loss": 5.0, "tokens": 1000, "seconds": 5.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (path / "summary.json").write_text(json.dumps({"stage": config["stage"]["name"], "steps": 20}))
    if record:
        start = {"revision": record, "dirty": False, "diff": None, "versions": {"jax": "0.10.2"}}
        (path / "record.json").write_text(json.dumps([start]))
    return path


def group(root, name, values, **changes):
    return [made(root / f"{name}{seed}", value, seed=seed, **changes) for seed, value in enumerate(values)]


@pytest.fixture
def sweep(tmp_path):
    """sweep(value): two learning rates, two widths, three seeds; `value` of them is a number, or a trial's state."""

    def of(value, metric="held_out/loss", direction="minimize"):
        root = tmp_path / "sweep"
        settings = itertools.product((1e-3, 1e-2), (64, 128), (0, 1, 2))
        for i, (rate, width, seed) in enumerate(settings):
            result, path = value(rate, width, seed), root / "trials" / f"{i:04}"
            number = result if isinstance(result, float) else None
            made(path, number or 9.0, finished=number is not None, seed=seed, optimizer__learning_rate=rate,
                 model__width=width, model__hidden=3 * width)  # fmt: skip
            told = {
                "number": i,
                "overrides": {"optimizer.learning_rate": rate, "model.width": width, "seed": seed},
                "seed": seed,
                "state": result if number is None else "complete",
                "value": number,
                "error": "loss is nan at step 7" if result == "failed" else None,
                "seconds": 1.0,
                "workdir": path.name,
            }
            (root / "trials" / f"{i:04}.json").write_text(json.dumps(told))
        (root / "sweep.json").write_text(json.dumps({"metric": metric, "direction": direction}))
        return root

    return of


def smooth(rate, width, seed):
    return 4.0 - width / 640 + 10 * rate + 0.01 * seed


def names(found):
    return [one.name for one in found]


def test_runs_that_differ_in_the_seed_only_are_one_setting(tmp_path):
    folders = [*group(tmp_path, "a", [4.0, 4.2, 4.1]), *group(tmp_path, "b", [3.0, 3.3], optimizer__learning_rate=0.01)]
    told = comparison.compare_runs(folders)
    assert names(told.results) == ["learning_rate=0.01", "learning_rate=0.001"]
    assert told.results[1].values == {0: 4.0, 1: 4.2, 2: 4.1}
    assert told.settings.differing_keys == ["optimizer.learning_rate"] and not told.settings.notes


def test_what_follows_from_a_sweeps_parameters_is_not_in_names(sweep):
    told = comparison.compare_runs([sweep(smooth)])
    assert names(told.results)[0] == "learning_rate=0.001, width=128"
    assert told.settings.parameters == ["optimizer.learning_rate", "model.width"]
    assert set(told.settings.differing_keys) == {"model.width", "model.hidden", "optimizer.learning_rate"}
    assert len(told.results) == 4 and all(len(one.values) == 3 for one in told.results)


def test_without_a_sweep_every_difference_is_named(tmp_path):
    one, other = made(tmp_path / "a"), made(tmp_path / "b", model__width=128, model__hidden=384)
    assert names(comparison.compare_runs([one, other]).results) == ["width=64, hidden=192", "width=128, hidden=384"]


def test_paths_beside_the_run_are_the_same_place_in_every_folder(tmp_path):
    folders = [made(tmp_path / seed / "sft", seed=int(seed), init_from=f"{tmp_path}/{seed}/pretrain") for seed in "01"]
    (setting,) = comparison.compare_runs(folders).results
    assert list(setting.values) == [0, 1]
    (note,) = comparison.compare_runs(folders).settings.notes
    assert note.startswith("Runs of one setting differ in init_from,")
    elsewhere = [made(tmp_path / x / "ppo", init_from=f"{tmp_path}/0/sft") for x in "ab"]
    assert len(comparison.compare_runs(elsewhere).results) == 1  # one start for both, though it lies beside neither


def test_keys_may_be_set_aside(tmp_path):
    folders = [made(tmp_path / str(n), seed=n, train__log_every=10 + n) for n in (0, 1)]
    assert len(comparison.compare_runs(folders).results) == 2
    assert len(comparison.compare_runs(folders, ignore=["train"]).results) == 1


def test_a_repeated_run_counts_once_unless_the_code_was_another(tmp_path):
    one = [made(tmp_path / "a", 4.0, record="1" * 40), made(tmp_path / "b", 5.0, record="1" * 40)]
    told = comparison.compare_runs(one)
    assert told.results[0].values == {0: 4.0} and f"{one[1]} repeats {one[0]}" in told.settings.notes[0]
    told = comparison.compare_runs([*one, made(tmp_path / "c", 6.0, record="2" * 40)])
    assert names(told.results) == ["code=1111111", "code=2222222"] and told.settings.parameters == [CODE_KEY]


def test_different_code_and_packages_are_warned_of(tmp_path):
    old, new = group(tmp_path, "a", [4.0], record="1" * 40), group(tmp_path, "b", [4.0], record="2" * 40, init_from="x")
    told = comparison.compare_runs([*old, *new])
    assert names(told.results) == ["init_from=", "init_from=x"]  # the code is no part of a setting here
    assert any("different code (1111111, 2222222)" in text for text in comparison_warnings(told))
    record = json.loads((new[0] / "record.json").read_text())
    record[0] |= {"dirty": True, "diff": "code-0.diff", "versions": {"jax": "0.11"}}
    (new[0] / "code-0.diff").write_text("+1\n")
    (new[0] / "record.json").write_text(json.dumps(record))
    text = " ".join(comparison_warnings(comparison.compare_runs([*old, *new])))
    assert re.search(r"2222222 \+ changes [0-9a-f]{6}\b", text) and "different versions of jax" in text
    (new[0] / "record.json").write_text(json.dumps(record))
    assert "2222222 + changes" in " ".join(comparison_warnings(comparison.compare_runs([*old, *new])))


def test_a_number_is_the_same_with_and_without_a_point(tmp_path):
    assert (
        len(
            comparison.compare_runs(
                [made(tmp_path / "a", init_from=1.0), made(tmp_path / "b", seed=1, init_from=1)]
            ).results
        )
        == 1
    )


def test_the_last_value_counts(tmp_path):
    assert (
        comparison.compare_runs([made(tmp_path / "a", 3.5)]).results[0].mean.value == 3.5
    )  # and not 5.5 or 4.5, logged before


# What the numbers are


def test_mean_and_interval(tmp_path):
    """1, 2, 3: se = 1 / sqrt(3); Student's quantile of two degrees of freedom is 4.302653."""
    (one,) = comparison.compare_runs(group(tmp_path, "a", [1.0, 2.0, 3.0])).results
    assert one.mean.value == 2 and one.mean.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_a_paired_contrast(tmp_path):
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) = 3.4641, two degrees of freedom: p = 0.0742. d_z = 2,
    times J(2) = 1 / Gamma(1/2) = 0.56419: 1.1284. Alone, so nothing is corrected."""
    a, b = group(tmp_path, "a", [5.0, 7.0, 6.0]), group(tmp_path, "b", [4.0, 5.0, 3.0], init_from="x")
    told = comparison.compare_runs([*a, *b], baseline="init_from=x")
    (contrast,) = told.contrasts.values()
    reference = stats.ttest_rel([5, 7, 6], [4, 5, 3])
    assert contrast.test_name == PAIRED and contrast.n == 3 and contrast.difference.value == 2
    assert contrast.p == pytest.approx(reference.pvalue) == pytest.approx(0.07418, abs=1e-5)
    assert (contrast.difference.low, contrast.difference.high) == pytest.approx(tuple(reference.confidence_interval()))
    assert contrast.effect_size == pytest.approx(2 / math.sqrt(math.pi))
    assert contrast.conclusion == INSIDE_NOISE


def test_other_seeds_are_compared_by_welch(tmp_path):
    a = [made(tmp_path / f"a{n}", value, seed=n) for n, value in enumerate([5.0, 7.0, 6.5])]
    b = [made(tmp_path / f"b{n}", value, seed=n, init_from="x") for n, value in zip((2, 3, 4, 5), [4.0, 4.1, 4.3, 3.9])]
    (contrast,) = comparison.compare_runs([*a, *b], baseline="init_from=x").contrasts.values()
    reference = stats.ttest_ind([5, 7, 6.5], [4, 4.1, 4.3, 3.9], equal_var=False)
    assert contrast.test_name == UNPAIRED and contrast.n == 3
    assert contrast.p == pytest.approx(reference.pvalue)
    assert (contrast.difference.low, contrast.difference.high) == pytest.approx(tuple(reference.confidence_interval()))
    deviation = math.sqrt((2 * np.var([5, 7, 6.5], ddof=1) + 3 * np.var([4, 4.1, 4.3, 3.9], ddof=1)) / 5)
    assert contrast.effect_size == pytest.approx(hedges_correction(5) * contrast.difference.value / deviation)


def test_hedges():
    """J(2) = Gamma(1) / (sqrt(1) Gamma(1/2)); for many degrees of freedom 1 - 3 / (4 m - 1)."""
    assert hedges_correction(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert hedges_correction(50) == pytest.approx(1 - 3 / 199, abs=2e-5)


def test_holm():
    """0.01 x 3 = 0.03, 0.03 x 2 = 0.06, and 0.04 x 1 may not be below 0.06. Of a family of 6: x 6, x 5, x 4."""
    p = [0.04, 0.01, 0.03]
    assert [f * x for f, x in zip(holm_factors(p, 3), p)] == pytest.approx([0.06, 0.03, 0.06])
    assert [f * x for f, x in zip(holm_factors(p, 6), p)] == pytest.approx([0.16, 0.06, 0.15])
    assert holm_factors([0.0, 0.0], 2) == [2, 1]
    assert (comparison_count(3, False), comparison_count(3, True)) == (3, 6)


def settings_of(values, *, apart=False):
    """Settings whose runs ended at values f[settings, seeds]; of the same seeds, or each of its own (apart)."""
    found = []
    for i, row in enumerate(values):
        seeds = range(100 * i * apart, 100 * i * apart + len(row))
        runs = [Run(None, {"seed": s}, [{"step": 1, "m": float(x)}], {}, None) for s, x in zip(seeds, row)]
        found.append(setting_result(Setting(f"s{i}", {}, runs), "m", confidence=0.95))
    return found


def drawn(values, direction="minimize", *, chosen=False, pool=True, apart=False):
    """Contrasts of such settings with the first, or with the best; `pool` their spread, or test each pair by itself."""
    found = settings_of(values, apart=apart)
    reference = comparison.best_result(found, direction) if chosen else found[0]
    spread = pooled_spread(found) if pool else None
    return contrasts_with_reference(
        found, reference, direction, spread=spread, reference_is_best=chosen, confidence=0.95
    )


TABLE = [[1.0, 2.0, 3.0], [2.0, 4.0, 3.0], [0.0, 0.0, 3.0]]


def test_the_pooled_spread_of_the_same_seeds():
    """Less the settings' means 2, 3, 1: -1 0 1, -1 1 0, -1 -1 2; less what the seeds have in common, -1 0 1: 0 0 0,
    0 1 -1, 0 -1 1. Squares 0 + 2 + 2 over (3 - 1)(3 - 1) = 4: 1. Cochran: of 4 x 2/3 a row keeps a share of 2 / (8/3)
    = 3/4, uniform here (2 and 2 degrees of freedom), so 3 x 1/4."""
    spread = pooled_spread(settings_of(TABLE))
    assert spread == (pytest.approx(1), 4, 3, True, pytest.approx(0.75)) and spread.is_equal
    contrast = drawn(TABLE)["s1"]
    assert contrast.test_name == "pooled over 3 settings, 4 degrees of freedom"
    assert contrast.difference.value == 1 and contrast.difference.se == pytest.approx(math.sqrt(2 / 3))
    assert contrast.effect_size == pytest.approx(hedges_correction(4))
    # t = sqrt(3/2) against both others, s2 being as far below; Holm doubles the p of either.
    assert contrast.p == pytest.approx(2 * 2 * stats.t.sf(math.sqrt(1.5), 4))


def test_the_pooled_spread_of_other_seeds():
    """Squares within the settings are 2 + 2 + 6 over 9 - 3 = 6; with another two runs of 3 and 3 in the first setting,
    mean 12/5: (1.96 + 0.16 + 3 x 0.36 = 3.2) + 2 + 6 over 11 - 3 = 8. A setting of two seeds has no part in it."""
    assert pooled_spread(settings_of(TABLE, apart=True))[:4] == (pytest.approx(math.sqrt(10 / 6)), 6, 3, False)
    more = [[*TABLE[0], 3.0, 3.0], *TABLE[1:], [5.0, 9.0]]
    assert pooled_spread(settings_of(more))[:4] == (pytest.approx(math.sqrt(11.2 / 8)), 8, 3, False)
    contrast = drawn(more)["s1"]
    assert contrast.n == 3 and contrast.difference.se == pytest.approx(math.sqrt(1.4 * (1 / 5 + 1 / 3)))
    assert drawn(more)["s3"].conclusion == NOT_JUDGED


def test_two_settings_or_no_spread_pool_nothing():
    assert (
        pooled_spread(settings_of(TABLE[:2])) is None and pooled_spread(settings_of([*TABLE[:2], [1.0, 2.0]])) is None
    )
    assert pooled_spread(settings_of([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])) is None


@pytest.mark.parametrize("k, n, critical", [(3, 3, 0.8709), (5, 3, 0.6838), (10, 6, 0.3029)])
def test_cochran(k, n, critical):
    """Five per cent points of the table of Eisenhart, Hastay and Wallis (1947)."""
    shares = np.full(k, (1 - critical) / (k - 1))
    shares[0] = critical
    assert cochran_p_value(shares, np.full(k, n - 1), k * (n - 1)) == pytest.approx(0.05, abs=3e-4)


@pytest.mark.parametrize("seeds", [(4, 4, 4, 4), (3, 4, 5, 6)])
def test_the_best_of_many_is_tested_by_tukeys_range(seeds):
    draw = np.random.default_rng(3).normal
    values = [draw(size=n) + 1.5 * i for i, n in enumerate(seeds)]
    reference = stats.tukey_hsd(*values)
    interval = reference.confidence_interval(0.95)
    told = drawn(values, chosen=True, apart=True)
    assert set(told) == {"s1", "s2", "s3"}
    for i in (1, 2, 3):
        contrast = told[f"s{i}"]
        assert contrast.p == pytest.approx(reference.pvalue[i, 0], abs=1e-9)
        low, high = contrast.difference.low, contrast.difference.high
        assert (low, high) == pytest.approx((interval.low[i, 0], interval.high[i, 0]))


@pytest.mark.parametrize("chosen, pool, times", [(False, False, 40), (False, True, 40), (True, True, 8)])
def test_inside_the_noise_is_said_when_and_only_when_the_interval_includes_zero(chosen, pool, times):
    draw = np.random.default_rng(0).normal
    seen = set()
    for scale in (0.0, 1.0, 3.0, 10.0):
        for _ in range(times):
            told = drawn(draw(size=(4, 3)) + scale * draw(size=(4, 1)), chosen=chosen, pool=pool)
            for contrast in told.values():
                within = contrast.difference.low <= 0 <= contrast.difference.high
                assert within == (contrast.p >= 0.05) == (contrast.conclusion == INSIDE_NOISE)
                said = contrast_sentence(contrast)
                assert ("inside the noise" in said) == within and ("is better than" in said) != within
                if not within:
                    winner = contrast.name if contrast.difference.value < 0 else contrast.reference
                    assert said.startswith(f"{winner} is better than ")
                    assert contrast.conclusion == (BETTER if winner == contrast.name else WORSE)
                seen.add(contrast.conclusion)
    assert seen == ({INSIDE_NOISE, WORSE} if chosen else {INSIDE_NOISE, BETTER, WORSE})


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
def test_equal_settings_are_rarely_called_different(chosen, pool, monkeypatch):
    """Six equal settings, 400 times: in at most 5 % of them, give or take 2.2, any contrast lies outside the noise."""
    monkeypatch.setattr(
        statistics, "studentized_range_p", lambda *_: math.nan
    )  # slow, and verdicts come from intervals
    draw, wrong = np.random.default_rng(1).normal, 0
    for _ in range(400):
        told = drawn(draw(size=(6, 4)) + draw(size=4), chosen=chosen, pool=pool)
        wrong += any(contrast.conclusion != INSIDE_NOISE for contrast in told.values())
    assert wrong / 400 <= 0.072


def test_three_seeds_of_twelve_settings_show_a_difference_of_five_spreads():
    """Seeds differ by as much as runs of one. By its own three seeds each pair shows next to nothing."""
    draw, found = np.random.default_rng(2).normal, {True: [], False: []}
    for _ in range(3):
        values = draw(size=(12, 3)) + draw(size=3)
        values[0] -= 5
        for pool in found:
            found[pool] += [one.conclusion == WORSE for one in drawn(values, chosen=True, pool=pool).values()]
    assert np.mean(found[True]) > 0.9 and np.mean(found[False]) < 0.1


def test_more_is_better_where_the_direction_says_so():
    values = [[1.0, 1.1, 1.2], [5.0, 5.11, 5.19]]
    assert [drawn(values, direction)["s1"].conclusion for direction in ("minimize", "maximize")] == [WORSE, BETTER]


@pytest.mark.parametrize("values", [[[1.0, 1.1], [5.0, 5.1]], [[1.0], [5.0]], [[1.0, 1.1, 1.2], [5.0, 5.1]]])
def test_two_seeds_judge_nothing(values):
    contrast = drawn(values)["s1"]
    assert contrast.conclusion == NOT_JUDGED and contrast.p is None and contrast.difference.high == math.inf


def test_a_difference_that_no_seed_changes():
    assert drawn([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])["s1"][4:] == ((0, 0, 0, 0), 1.0, None, INSIDE_NOISE)
    same = drawn([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])["s1"]
    assert (same.p, same.effect_size, same.conclusion) == (0, None, WORSE)


# What is said


def test_sentences(tmp_path):
    """Around the settings' means in tenths: -1 0 1, -1 1 0, 2 -1 -1; the seeds' means are 0. Squares 0.02 + 0.02 + 0.06
    over 4 degrees of freedom: 0.158, times sqrt(2/3) of a difference: 0.129. Of two tests the smaller p is doubled, so
    its interval is that of 97.5 %, with quantile 3.495: 1 +- 0.451. The other: 2.776 x 0.129 = 0.358. Effect size:
    J(4) = 0.798, over 0.158."""
    a = group(tmp_path, "a", [4.0, 4.1, 4.2])
    b = group(tmp_path, "b", [3.0, 3.2, 3.1], init_from="b")
    c = group(tmp_path, "c", [4.32, 4.02, 4.02], init_from="c")
    d = group(tmp_path, "d", [1.0, 1.0], init_from="d")
    told = comparison.compare_runs([*a, *b, *c, *d], baseline="init_from=")
    how = "n = 3 seeds, pooled over 3 settings, 4 degrees of freedom"
    assert [re.sub(r"\(p.*?, n", "(p, n", text) for text in conclusion_sentences(told)] == [
        f"init_from=b is better than init_from= by 1.000 [0.5487, 1.451] (p, {how}, effect size 5.0).",
        "init_from=c and init_from= cannot be told apart: a difference of +0.0200 [−0.338, +0.378] is inside the noise "
        f"(p, {how}).",
        "Against init_from= the noise cannot be judged without three seeds on both sides: init_from=d (−3.05, 2 "
        "seeds). Such a difference may be chance, however large it looks.",
    ]
    assert correction_note(told) == (
        "Tested by one spread between seeds, pooled over 3 settings, 4 degrees of freedom. 2 comparisons; their p and "
        "intervals are corrected for that number (Holm)."
    )
    chosen = comparison.compare_runs([*a, *b, *c, *d])
    assert chosen.reference == "init_from=b"  # the best whose noise can be judged
    assert (
        "2 comparisons with the best of 3; their p and intervals are corrected for all 3 pairs (Tukey)"
        in correction_note(chosen)
    )
    assert conclusion_sentences(chosen)[-1].startswith(
        "init_from=b was taken as the reference because its mean is the best here"
    )


def test_spreads_that_differ_are_not_pooled_and_that_is_said(tmp_path):
    """One setting's runs lie a hundred times as far apart."""
    values = [[1.0, 1.01, 1.03], [2.0, 2.03, 2.02], [3.02, 3.0, 3.01], [4.0, 9.0, 5.0]]
    folders = [path for i, row in enumerate(values) for path in group(tmp_path, f"r{i}-", row, init_from=f"{i}")]
    told = comparison.compare_runs(folders)
    assert not told.pooled_spread.is_equal
    assert {contrast.test_name for contrast in told.contrasts.values()} == {PAIRED}
    assert told.contrasts["init_from=1"] == drawn(values, chosen=True, pool=False)["s1"]._replace(
        name="init_from=1", reference="init_from=0"
    )
    assert correction_note(told).startswith(
        "The spread differs between settings (Cochran's C), so each pair is tested on its own seeds. 3 comparisons "
    )
    html = page.render_page(told, [])
    assert "it is not pooled over them" in html and "finds nothing against it" not in html


def test_a_single_run(tmp_path, capsys):
    comparison.program([str(made(tmp_path / "a", 3.5))])
    said = capsys.readouterr().out
    assert "pretrain: held_out/loss 3.500 (one seed: no interval). There is one setting only" in said
    assert (tmp_path / "compare.html").exists()


def test_failed_and_pruned_trials_are_named_and_counted_in_no_mean(sweep, capsys):
    lost = {(1e-2, 128, 0): "failed", (1e-2, 128, 2): "pruned"}
    root = sweep(lambda *key: lost[key] if key in lost else smooth(*key))
    told = comparison.compare_runs([root])
    assert {gone.path.name: gone.state for gone in told.missing} == {"0009": "failed", "0011": "pruned"}
    (one,) = [one for one in told.results if one.name == "learning_rate=0.01, width=128"]
    assert one.values == {1: smooth(1e-2, 128, 1)}
    assert any("2 of 3 runs gave no number (1 failed, 1 pruned)" in text for text in comparison_warnings(told))
    comparison.program([str(root)])
    said = capsys.readouterr()
    assert "0009 is failed and counted in no mean: loss is nan at step 7" in said.err
    html = (root.parent / "compare.html").read_text()
    assert "loss is nan at step 7" in html and "stopped early by the sweep" in html


def test_a_sweep_says_what_is_measured_and_what_is_better(sweep):
    root = sweep(smooth, direction="maximize")
    told = comparison.compare_runs([root])
    assert (told.metric, told.direction) == ("held_out/loss", "maximize")
    assert told.results[0].name == "learning_rate=0.01, width=64"
    assert comparison.compare_runs([root], direction="minimize").results[-1].name == told.results[0].name


def test_the_direction_of_a_metric_by_its_name():
    for metric, direction in {
        "held_out/loss": "minimize",
        "held_out/accuracy": "maximize",
        "reward": "maximize",
        "held_out/score/rule": "maximize",
        "held_out/score_deviation": "minimize",
    }.items():
        assert comparison.metric_direction(metric, LoadedRuns([], [], {})) == direction


def test_a_sweep_of_pipelines_is_judged_by_one_stage_and_told_by_all(tmp_path):
    """The rate of pretraining is in no config of SFT, but tells its settings apart; paths of each trial do not."""
    for i, (rate, width, seed) in enumerate(itertools.product((0.1, 0.2), (64, 128), (0, 1))):
        root = tmp_path / "trials" / f"{i:04}"
        made(root / "sft", rate, seed=seed, model__width=width, init_from=f"{root}/pretrain")
        overrides = {"pretrain.optimizer.learning_rate": rate, "sft.model.width": width}
        told = {"overrides": overrides, "state": "complete", "error": None, "workdir": f"{root.name}/sft"}
        root.with_name(f"{root.name}.json").write_text(json.dumps(told))
    (tmp_path / "sweep.json").write_text('{"metric": "held_out/loss", "direction": "minimize"}')
    told = comparison.compare_runs([tmp_path])
    assert names(told.results)[::3] == ["learning_rate=0.1, width=64", "learning_rate=0.2, width=128"]
    assert [list(one.values) for one in told.results] == [[0, 1]] * 4


def test_the_page_holds_everything_and_needs_nothing(sweep, capsys):
    root = sweep(lambda rate, width, seed: smooth(rate, width, seed) + 0.01 * math.sin(width + 1000 * rate + 7 * seed))
    comparison.program(["--output", str(root / "page.html"), str(root), "--confidence=0.9"])
    html = (root / "page.html").read_text()
    assert "<script" not in html and "http" not in html.replace("http://www.w3.org", "")
    told = comparison.compare_runs([root], confidence=0.9)
    for text in (*conclusion_sentences(told), *names(told.results), *comparison_warnings(told)):
        assert escape(text, quote=False) in html
    for part in ("The way there", "one line for each width", "mean over seeds", "Parallel coordinates", "PED-ANOVA",
                 "pooled over 4 settings, 6 degrees of freedom", "<small>3 seeds, pooled</small>",
                 "Where the configs differ", "model.hidden", "90\u00a0% interval", "What code made them"):  # fmt: skip
        assert part in html, part
    assert f"page: {root / 'page.html'}" in capsys.readouterr().out


def test_keys_that_cannot_be_told_apart_are_not_drawn(tmp_path):
    told = comparison.compare_runs([made(tmp_path / "a"), made(tmp_path / "b", model__width=128, model__hidden=384)])
    html = page.render_page(told, [])
    assert "2 keys differ, between 2 settings only" in html and "Parallel coordinates" not in html


def test_a_random_search_is_drawn_parameter_by_parameter(tmp_path):
    """Twelve settings of three parameters; their rates differ in the seventh digit, so names need more than three."""
    draw = np.random.default_rng(0).uniform
    for n in range(12):
        rate, width = 0.001 + 1e-9 * n, draw()
        made(tmp_path / str(n), draw(), optimizer__learning_rate=rate, model__width=width, init_from="ab"[n % 2])
    told = comparison.compare_runs(sorted(path for path in tmp_path.iterdir()))
    assert len(set(names(told.results))) == 12
    html = page.render_page(told, [])
    assert "over each parameter by itself" in html and "one line for each" not in html and "PED-ANOVA" in html


def test_curves_are_means_at_common_steps():
    lines = [{0: (0, 4.0), 10: (100, 2.0), 20: (200, 1.0)}, {0: (0, 6.0), 20: (220, 3.0)}]
    x, y = figures.aligned_lines(lines)
    assert x.tolist() == [0, 210] and y.tolist() == [[4, 1], [6, 3]]


def test_beside_a_metric_of_few_points_stands_a_curve_of_training(tmp_path):
    """Of the same name, or the loss; where the metric itself has a curve, only of the same name."""

    def titles(name, points, logged):
        path = made(tmp_path / name, metric="held_out/bits_per_byte")
        rows = [{"step": 10 * i, "tokens": i, "seconds": i, "held_out/bits_per_byte": 2.0 - i} for i in range(points)]
        rows += [{"step": 10 * i, "tokens": i, "seconds": i, key: 3.0 - i} for i in range(9) for key in logged]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [
            figure.title
            for figure in page.curve_figures(comparison.compare_runs([path], metric="held_out/bits_per_byte"))
        ]

    few = "in training over step, as held_out/bits_per_byte was logged at 2 steps only"
    assert titles("a", 2, ["loss"])[:2] == ["held_out/bits_per_byte over step", f"loss {few}"]
    assert titles("b", 2, ["loss", "bits_per_byte"])[1] == f"bits_per_byte {few}"
    assert titles("c", 9, ["loss"])[1] == "held_out/bits_per_byte over tokens"
    assert titles("d", 9, ["loss", "bits_per_byte"])[1] == "bits_per_byte in training over step"


def test_geometric():
    assert importance.is_geometric([1e-3, 3e-3, 1e-2]) and importance.is_geometric([64, 128, 256, 512])
    assert not importance.is_geometric([1, 2, 3, 4, 5]) and not importance.is_geometric([0, 1, 10, 100])
    assert not importance.is_geometric([1, 2]) and importance.is_geometric([1, 4])


def test_importance_finds_the_parameter_that_matters():
    """A grid of 4 x 4, three times: only `b` decides; and 60 points of two ranges: only `a`."""
    grid = [{"a": a, "b": b} for a in range(4) for b in range(4)] * 3
    shares = importance.parameter_importances(grid, [float(config["b"]) for config in grid], ["a", "b"], "minimize")
    assert list(shares) == ["b", "a"] and shares["b"] > 0.8 and sum(shares.values()) == pytest.approx(1)
    draw = np.random.default_rng(0)
    points = [{"a": 10.0 ** draw.uniform(-4, -1), "b": draw.uniform()} for _ in range(60)]
    values = [abs(math.log10(point["a"]) + 2) for point in points]
    assert importance.parameter_importances(points, values, ["a", "b"], "minimize")["a"] > 0.8
    assert (
        importance.good_run_count(8) == 4
        and importance.good_run_count(25) == 5
        and importance.good_run_count(200) == 20
    )


def test_importance_says_why_there_is_none(tmp_path):
    told = comparison.compare_runs([made(tmp_path / str(n), optimizer__learning_rate=0.1**n) for n in range(3)])
    assert "fewer than two" in page.importance_section(told)["why"]
    told = comparison.compare_runs(
        [made(tmp_path / f"b{n}", optimizer__learning_rate=0.1**n, init_from=str(n % 2)) for n in range(4)]
    )
    assert page.importance_section(told)["why"] == "Importance takes at least 8 finished runs; there are 4."


def test_what_a_real_run_left(finished, tmp_path, capsys):
    """Two stages of one pipeline, a metric that both log."""
    output = tmp_path / "page.html"
    stages = [str(finished / "pretrain"), str(finished / "sft")]
    comparison.program([*stages, f"--output={output}"])
    said = capsys.readouterr().out
    assert "stage=pretrain" in said and "the noise cannot be judged" in said and "<svg" in output.read_text()


# What is refused


def test_unfinished_runs_are_skipped_by_name(tmp_path):
    done, torn = made(tmp_path / "a"), made(tmp_path / "b", finished=False, seed=1)
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 10, "held_out/loss": 1.0}\n{"step": 20, "held')
    told = comparison.compare_runs([done, torn])
    assert told.results[0].values == {0: 4.0}
    assert [(gone.path, gone.state, gone.reason) for gone in told.missing] == [
        (torn, "unfinished", "10 of 20 steps are done")
    ]
    with pytest.raises(UserError, match=f"no finished run is left .{torn} is unfinished: 10 of 20 steps are done"):
        comparison.compare_runs([torn])
    longer = made(tmp_path / "c", seed=2, train__steps=40)  # its summary is of the run before it was stretched
    assert comparison.compare_runs([done, longer]).missing[0].reason == "20 of 40 steps are done"


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no folder is given: name those of runs and sweeps"):
        comparison.program([])
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/none"):
        comparison.compare_runs([tmp_path / "none"])
    with pytest.raises(UserError, match=f"{tmp_path} holds no run: there is no config.json of lm train in it"):
        comparison.compare_runs([tmp_path])
    run = made(tmp_path / "a")
    with pytest.raises(UserError, match=f"{tmp_path} holds no run; those in it are {run}"):
        comparison.compare_runs([tmp_path])
    (tmp_path / "sweep").mkdir()
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "config.json").write_text('{"seed": 0, "stage": {"name": "tokenizer"}}')
    with pytest.raises(UserError, match=f"{tokenizer} has no train.steps in its config.json, so it logs no metrics"):
        comparison.compare_runs([tokenizer])
    with pytest.raises(UserError, match="sweep/../a is given twice: name each folder once"):
        comparison.compare_runs([run, tmp_path / "sweep" / ".." / "a"])
    (tmp_path / "sweep" / "sweep.json").write_text('{"metric": "held_out/loss", "direction": "minimize"}')
    with pytest.raises(UserError, match="is a sweep without a trial"):
        comparison.compare_runs([tmp_path / "sweep"])


@pytest.mark.parametrize("file", ["config.json", "summary.json", "record.json", "metrics.jsonl"])
def test_torn_files_are_named(tmp_path, file):
    run = made(tmp_path / "a", record="1" * 40)
    (run / file).write_text('{"step": 1,\n')
    with pytest.raises(UserError, match=f"{run / file} is not JSON"):
        comparison.compare_runs([run])


def test_a_trial_of_a_sweep_that_still_runs(sweep):
    root = sweep(smooth)
    assert names(comparison.compare_runs([root / "trials" / n for n in ("0000", "0003")]).results)[0].endswith(
        "width=128"
    )
    (root / "trials" / "0003.json").unlink()
    (gone,) = comparison.compare_runs([root]).missing
    assert (gone.path.name, gone.state) == ("0003", "running")


def test_metrics_that_not_all_log(tmp_path):
    folders = [made(tmp_path / "a"), made(tmp_path / "b", metric="held_out/reward", init_from="x")]
    with pytest.raises(
        UserError, match=f"^{folders[1]} logs no held_out/loss: take a --metric that all of them log: loss$"
    ):
        comparison.compare_runs(folders)
    with pytest.raises(UserError, match="^no run logs held_out/los: .*: held_out/loss, loss$"):
        comparison.compare_runs(folders[:1], metric="held_out/los")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--baseline=width=1", "--baseline=width=1 is no setting: choose one of pretrain"),
        ("--confidence=95", "--confidence=95: give a number from 0.5 to below 1"),
        ("--confidence=high", "argument --confidence: invalid float value: 'high'"),
        ("--direction=up", "argument --direction: invalid choice: 'up'"),
        (
            "--output=nowhere/page.html",
            "--output=nowhere/page.html cannot be written: give a file in a folder that exists",
        ),
        ("--metrc=loss", "--metrc is not a flag of this program; did you mean --metric?"),
    ],
)
def test_bad_flags(tmp_path, flag, message):
    with pytest.raises(UserError, match=message):
        comparison.program([str(made(tmp_path / "a")), flag])
    assert not (tmp_path / "compare.html").exists()


def test_a_baseline_is_a_setting_or_a_folder_of_one(tmp_path):
    folders = [made(tmp_path / "a", 1.0), made(tmp_path / "b", 2.0, init_from="x")]
    for baseline in ("init_from=x", str(folders[1])):
        assert comparison.compare_runs(folders, baseline=baseline).reference == "init_from=x"
    assert read_runs(folders).directions == {} and settings_of_runs(read_runs(folders).runs).parameters == ["init_from"]
