"""Scaling laws: known laws are found again, with intervals that hold them; tables that will not do."""

import numpy as np
import pytest

from lm.core.errors import UserError
from lm.studies.scaling import isoflop, parametric, points
from lm.studies.scaling.parametric import LAW_PARAMETERS, CenteredObjective, ScalingLaw
from lm.studies.scaling.points import Points

TRUTH = ScalingLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu et al. 2024, eq. 6, arXiv 2404.10102


def table(spread: float, *, budgets: int = 6, sizes: int = 7, seed: int = 0) -> Points:
    """Runs of TRUTH at equal costs, a factor 4 around the best size; log loss normal with that spread."""
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    n = TRUTH.optimum(flops)[0] * np.tile(np.geomspace(1 / 4, 4, sizes), budgets)
    d = flops / 6 / n
    noise = spread * np.random.default_rng(seed).normal(size=len(n))
    return Points(n, d, TRUTH.loss(n, d) * np.exp(noise))


def budgets(runs: Points, sizes: int = 7) -> list[isoflop.BudgetRuns]:
    cut = [runs[i : i + sizes] for i in range(0, len(runs.loss), sizes)]
    return [isoflop.BudgetRuns(one.parameters, one.tokens, 6 * one.parameters * one.tokens, one.loss) for one in cut]


def test_the_law_by_hand():
    """2 + 30 / 100^0.5 + 80 / 10000^0.25 = 2 + 3 + 8."""
    law = ScalingLaw(2.0, 30.0, 80.0, 0.5, 0.25)
    assert law.loss(100.0, 10_000.0) == pytest.approx(13.0)
    assert law.size_exponent == pytest.approx(1 / 3)


def test_the_optimum_is_lowest_among_sizes_of_the_same_cost():
    n, d = TRUTH.optimum(1e20)
    assert 6 * n * d == pytest.approx(1e20)
    others = n * np.array([0.9, 0.99, 1.01, 1.1])
    assert np.all(TRUTH.loss(others, 1e20 / 6 / others) > TRUTH.loss(n, d))


def test_the_gradient_is_that_of_the_value():
    near, x = CenteredObjective(table(0.01)), np.array([0.5, -0.8, -0.4, 0.3, 0.45])
    found = near.objective(x)[1]
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        slope = (near.objective(x + step)[0] - near.objective(x - step)[0]) / 2e-6
        assert found[i] == pytest.approx(slope, rel=1e-4)


def test_a_table_without_noise_gives_its_law_back():
    """Summed losses and tight tolerances: the search does not stop short (Besiroglu et al. 2024, sec. 3)."""
    found = parametric.parametric_fit(table(0.0), draws=20)
    assert found.law == pytest.approx(TRUTH, rel=0.01)
    assert np.abs(found.errors).max() < 1e-4


def test_a_noisy_table_gives_intervals_that_hold_its_law():
    """Over 40 such tables the intervals of the five held the truth 95 to 100 % of the time (200 draws)."""
    found = parametric.parametric_fit(table(0.005, seed=1), draws=100)
    estimates = found.estimates()
    for name in LAW_PARAMETERS:
        assert estimates[name].low <= getattr(TRUTH, name) <= estimates[name].high, (name, estimates[name])
    assert estimates["alpha"].high - estimates["alpha"].low < 0.1
    assert estimates["growth"].low <= TRUTH.size_exponent <= estimates["growth"].high
    larger = TRUTH.optimum(1e22)
    predicted = found.predicted_loss(*larger)
    assert predicted.low < TRUTH.loss(*larger) < predicted.high < 1.1 * predicted.low


def test_one_outlier_moves_the_law_little():
    """Huber's loss: a run that diverged to twice its loss is given the weight of its direction, not of its distance."""
    runs = table(0.001)
    runs.loss[10] *= 2
    law = parametric.parametric_fit(runs, draws=20).law
    assert law.loss(1e9, 1e10) == pytest.approx(TRUTH.loss(1e9, 1e10), rel=0.005)


def test_the_same_table_gives_the_same_intervals():
    one, other = (parametric.parametric_fit(table(0.01), draws=20, seed=3).estimates() for _ in range(2))
    assert one == other


def test_a_parabola_by_hand():
    """3 + (log N - 5)^2 is lowest at e^5, where it is 3; D falls as 1 / N from there."""
    n = np.exp(np.array([3.0, 4.0, 5.5, 7.0]))
    budget = isoflop.BudgetRuns(n, 1e6 / n, np.full(4, 6e6), 3 + (np.log(n) - 5) ** 2)
    (valley,) = isoflop.isoflop_fit([budget], draws=20).minima
    assert valley.parameters == pytest.approx(np.exp(5)) and valley.loss == pytest.approx(3)
    assert valley.tokens == pytest.approx(1e6 / np.exp(5)) and valley.bend == pytest.approx(1) and valley.inside


def test_parabolas_find_the_growth_of_the_best_size():
    found = isoflop.isoflop_fit(budgets(table(0.003)), draws=400)
    assert (
        found.size_exponent.low < TRUTH.size_exponent < found.size_exponent.high
        and found.size_exponent.high - found.size_exponent.low < 0.2
    )
    assert found.token_exponent.value == pytest.approx(1 - found.size_exponent.value, abs=1e-6)  # as C = 6 N D
    assert found.optimum(1e22)[0] == pytest.approx(TRUTH.optimum(1e22)[0], rel=0.5)


def test_a_budget_without_a_valley_is_left_out():
    runs = budgets(table(0.0))
    hill = runs[0]._replace(loss=5 - (np.log(runs[0].parameters) - 18) ** 2 / 10)
    with_hill, without = isoflop.isoflop_fit([hill, *runs[1:]], draws=20), isoflop.isoflop_fit(runs[1:], draws=20)
    assert with_hill.lines == without.lines and np.isnan(with_hill.minima[0].parameters)
    assert isoflop.isoflop_fit([hill, hill], draws=20).size_exponent is None


GOOD = "\n".join(
    ["parameters,tokens,loss", *(f"{10**i},{10**j},{5 - i / 10 - j / 10}" for i in (1, 2, 3) for j in (4, 5, 6))]
)


@pytest.mark.parametrize(
    "text, error",
    [
        (GOOD.replace("tokens", "data"), "has no column 'tokens' (it has parameters, data, loss)"),
        ("", "has no column 'parameters' (it has nothing)"),
        (GOOD + "\n10,20,nan", ", line 11: loss is 'nan'; it must be a positive number"),
        (GOOD + "\n10,many,3", ", line 11: tokens is 'many'; it must be a positive number"),
        (GOOD + "\n10,20", ", line 11: loss is None; it must be a positive number"),
        (GOOD + "\n10,-20,3", ", line 11: tokens is '-20'; it must be a positive number"),
        ("\n".join(GOOD.split("\n")[:8]), "has 7 runs; a law of five numbers needs at least 8"),
        ("parameters,tokens,loss" + "\n10,20,3" * 9, "parameters takes fewer than 3 values"),
    ],
)
def test_tables_that_will_not_do(text, error, tmp_path):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(UserError) as raised:
        points.read_points(tmp_path / "runs.csv")
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.csv .*give a CSV file with the columns parameters,tokens"):
        points.read_points(tmp_path / "none.csv")


def test_a_table_is_read_by_its_names(tmp_path):
    (tmp_path / "runs.csv").write_text(
        "﻿loss, name, tokens, parameters\n" + "\n".join(f"3,x,{t},{t}" for t in range(1, 9))
    )
    runs = points.read_points(tmp_path / "runs.csv")
    assert runs.loss.tolist() == [3] * 8 and runs.tokens.tolist() == list(range(1, 9))
