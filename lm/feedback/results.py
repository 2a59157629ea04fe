"""The results of the verdicts: for the models that answered, for the raters, and for how far the raters agree.

A skipped item does not count. A unit of agreement is a pair of responses of an item: 1 if the first is better, -1 if
the second is, 0 for a tie; "both bad" is a tie.
"""

import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from lm.core.statistics import (
    NO_ESTIMATE,
    Estimate,
    estimate_text,
    interval_text,
    mean_estimate,
    percent_text,
    signed_number,
    success_rate,
)
from lm.data.preferences import RATING_AXES, RESPONSE_FLAGS, Ranking
from lm.feedback.agreement import (
    bootstrap_estimate,
    bradley_terry_strengths,
    cohen_kappa,
    krippendorff_alpha,
    rater_reliability,
)
from lm.runs.html import SERIES_COLORS, TEXT_COLOR, interval_plot, rendered_page, svg_figure

MIN_SHARED_PAIRS = 10  # pairs that two raters must have in common for a kappa
MAX_CONTESTED = 5  # items shown


class RaterSummary(NamedTuple):
    name: str
    verdicts: int
    seconds: float | None  # the median
    ties: int  # verdicts in which two responses share a rank, "both bad" apart
    both_bad: int
    skipped: int
    first_shown_preferred: Estimate  # how often the response shown first is the one preferred
    first_shown_chance: float  # and how often it would be without a bias
    reliability: Estimate  # how often this rater agrees with the majority of the others


class ModelSummary(NamedTuple):
    name: str
    responses: int  # judged ones
    strength: Estimate  # Bradley-Terry, logarithmic; nan for one that met no other
    axes: dict[str, Estimate]
    flags: dict[str, int]


class ContestedItem(NamedTuple):
    disagreement: float  # the share of pairs of raters that disagree, over the item's pairs of responses
    item: Ranking
    ranks: dict[str, list[int]]  # of each rater


class RankingResults(NamedTuple):
    rankings: list[Ranking]  # not skipped; the last verdict of a rater on an item
    items: int
    raters: list[RaterSummary]
    alpha: Estimate
    kappas: dict[tuple[str, str], float]
    models: list[ModelSummary]  # the strongest first
    contested: list[ContestedItem]


def ranking_results(rankings: Sequence[Ranking]) -> RankingResults:
    """Everything the page shows of these verdicts."""
    last = {(item_identity(ranking), ranking.rater): ranking for ranking in rankings}
    judged = [ranking for ranking in last.values() if ranking.verdict != "skipped"]
    names = list(dict.fromkeys(ranking.rater for ranking in last.values()))
    units, ratings = pair_votes(judged, names)
    shared = ratings[:, np.sum(~np.isnan(ratings), axis=0) >= 2]
    reliable = dict(zip(names, rater_reliability(ratings)))
    return RankingResults(
        judged,
        len({item_identity(ranking) for ranking in judged}),
        [rater_summary(name, [r for r in last.values() if r.rater == name], reliable[name]) for name in names],
        bootstrap_estimate(krippendorff_alpha, shared),
        rater_kappas(names, ratings),
        model_summaries(judged),
        contested_items(judged, units, ratings),
    )


def item_identity(ranking: Ranking) -> str:
    """The identity of a verdict's item: verdicts with the same one are on the same item."""
    return json.dumps([ranking.prompt, ranking.responses])


def pair_votes(judged: Sequence[Ranking], raters: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The item of each unit, and f64[raters, units]: -1, 0 or 1, nan where a rater has not judged the item."""
    columns: dict[tuple[str, int, int], dict[str, float]] = defaultdict(dict)
    for ranking in judged:
        for i, j in response_pairs(ranking):
            columns[item_identity(ranking), i, j][ranking.rater] = np.sign(ranking.ranking[j] - ranking.ranking[i])
    rows = [[column.get(rater, np.nan) for column in columns.values()] for rater in raters]
    return [item for item, _, _ in columns], np.array(rows, np.float64).reshape(len(raters), len(columns))


def response_pairs(ranking: Ranking) -> Iterator[tuple[int, int]]:
    return itertools.combinations(range(len(ranking.responses)), 2)


def rater_summary(name: str, verdicts: Sequence[Ranking], reliable: Estimate) -> RaterSummary:
    kinds = Counter(ranking.verdict for ranking in verdicts)
    ranked = [ranking for ranking in verdicts if ranking.verdict == "ranked"]
    seconds = [ranking.seconds for ranking in verdicts if ranking.seconds is not None]
    return RaterSummary(
        name,
        len(verdicts),
        statistics.median(seconds) if seconds else None,
        sum(len(set(ranking.ranking)) < len(ranking.ranking) for ranking in ranked),
        kinds["both bad"],
        kinds["skipped"],
        *first_shown_bias(verdicts),
        reliable,
    )


def first_shown_bias(verdicts: Sequence[Ranking]) -> tuple[Estimate, float]:
    """How often the response shown first is the one preferred, and how often it would be without a bias."""
    decided = [r for r in verdicts if r.shown and r.ranking.count(min(r.ranking)) == 1]  # with one best response
    if not decided:
        return NO_ESTIMATE, np.nan
    first = [r.ranking[r.shown[0]] == min(r.ranking) for r in decided]
    return success_rate(first), float(np.mean([1 / len(r.ranking) for r in decided]))


def rater_kappas(names: Sequence[str], ratings: np.ndarray) -> dict[tuple[str, str], float]:
    """Cohen's kappa of every two raters that share MIN_SHARED_PAIRS pairs of responses."""
    rows = dict(zip(names, ratings))
    return {
        (a, b): cohen_kappa(rows[a], rows[b])
        for a, b in itertools.combinations(names, 2)
        if np.sum(~np.isnan(rows[a]) & ~np.isnan(rows[b])) >= MIN_SHARED_PAIRS
    }


def model_summaries(judged: Sequence[Ranking]) -> list[ModelSummary]:
    """The verdicts on the responses of each model, the strongest model first."""
    responses: Counter[str] = Counter()
    axes: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    flags: dict[str, Counter[str]] = defaultdict(Counter)
    games = []
    for ranking in judged:
        names = [source["model"] for source in ranking.sources if "model" in source]
        if len(names) < len(ranking.responses):
            continue  # nobody knows who answered
        responses.update(names)
        for i, j in response_pairs(ranking):
            if names[i] != names[j]:
                games.append((names[i], names[j], (1 + np.sign(ranking.ranking[j] - ranking.ranking[i])) / 2))
        for axis, scores in ranking.axes.items():
            for name, score in zip(names, scores):
                if score is not None:
                    axes[name][axis].append(score)
        for name, raised in zip(names, ranking.flags):
            flags[name].update(raised)
    strong = bradley_terry_strengths(games)
    summaries = [
        ModelSummary(
            name,
            count,
            strong[name] if name in strong else NO_ESTIMATE,
            {axis: mean_estimate(axes[name][axis]) if axes[name][axis] else NO_ESTIMATE for axis in RATING_AXES},
            {flag: flags[name][flag] for flag in RESPONSE_FLAGS},
        )
        for name, count in responses.items()
    ]
    return sorted(summaries, key=lambda model: np.nan_to_num(model.strength.value), reverse=True)


def contested_items(judged: Sequence[Ranking], units: Sequence[str], ratings: np.ndarray) -> list[ContestedItem]:
    """The items on which the raters disagree most, among those that two have judged."""
    rankings_of: dict[str, list[Ranking]] = defaultdict(list)
    for ranking in judged:
        rankings_of[item_identity(ranking)].append(ranking)
    shares: dict[str, list[float]] = defaultdict(list)
    for item, column in zip(units, ratings.T):
        ranks = column[~np.isnan(column)]
        if len(ranks) >= 2:
            shares[item].append(float(np.mean([a != b for a, b in itertools.combinations(ranks, 2)])))
    contested = [
        ContestedItem(
            statistics.mean(each),
            rankings_of[item][0],
            {ranking.rater: ranking.ranking for ranking in rankings_of[item]},
        )
        for item, each in shares.items()
        if any(each)
    ]
    return sorted(contested, key=lambda item: item.disagreement, reverse=True)[:MAX_CONTESTED]


def results_page(rankings: Sequence[Ranking], *, title: str) -> str:
    """The results as one self-contained HTML page without scripts."""
    results = ranking_results(rankings)
    compared = {model.name: model.strength for model in results.models if np.isfinite(model.strength.value)}
    reliable = {r.name: r.reliability for r in results.raters if np.isfinite(r.reliability.value)}
    return rendered_page(
        "feedback/results.html.jinja",
        title=title,
        results=results,
        claims=headline_figures(results),
        strengths=interval_plot(compared, "log-strength, with its 95 % interval", centre=0) if compared else "",
        reliability=interval_plot(reliable, "agreement with the majority of the others") if reliable else "",
        over_time=rankings_over_time(rankings) if rankings else "",
        axes=RATING_AXES,
        flags=RESPONSE_FLAGS,
        scored=any(model.axes[axis] is not NO_ESTIMATE for model in results.models for axis in RATING_AXES),
        flagged=any(any(model.flags.values()) for model in results.models),
        shared=MIN_SHARED_PAIRS,
    )


def headline_figures(results: RankingResults) -> list[dict[str, str]]:
    """The headline: how much was judged, how fast, how far raters agree, and whether the order of showing mattered."""
    seconds = [ranking.seconds for ranking in results.rankings if ranking.seconds is not None]
    first, chance = first_shown_bias(results.rankings)
    best = results.models[0] if results.models and np.isfinite(results.models[0].strength.value) else None
    return [
        {
            "title": "Verdicts",
            "figure": f"{len(results.rankings):,}",
            "note": f"on {results.items:,} items, by {len(results.raters)} rater{'s' * (len(results.raters) != 1)}"
            + (f"; {statistics.median(seconds):.1f} s in the median" if seconds else ""),
        },
        {
            "title": "Strongest model",
            "figure": best.name if best else "–",
            "note": f"log-strength {estimate_text(best.strength, 'signed')}" if best else "no two models were compared",
        },
        {
            "title": "Krippendorff's alpha",
            "figure": signed_number(results.alpha.value) if np.isfinite(results.alpha.value) else "–",
            "note": f"95 % interval {interval_text(results.alpha, 'signed')}; 1: full agreement, 0: by chance"
            if np.isfinite(results.alpha.value)
            else "no two raters have judged enough of the same items",
        },
        {
            "title": "First shown preferred",
            "figure": percent_text(first.value) if np.isfinite(first.value) else "–",
            "note": f"95 % interval {interval_text(first, 'percent')}; {percent_text(chance)} without a bias"
            if np.isfinite(first.value)
            else "no verdict has one best answer",
        },
    ]


def rankings_over_time(rankings: Sequence[Ranking]) -> Markup:
    """The number of verdicts of each rater over time."""

    def draw(axes: Axes):
        times_of: dict[str, list[datetime]] = defaultdict(list)
        for ranking in rankings:
            times_of[ranking.rater].append(datetime.fromisoformat(ranking.time).astimezone(UTC))
        for (name, times), colour in zip(times_of.items(), itertools.cycle(SERIES_COLORS)):
            times.sort()
            axes.step(times, range(1, len(times) + 1), where="post", color=colour, linewidth=1.6, label=name)
            axes.plot(times[-1:], [len(times)], "o", color=colour, markersize=4)
        first, last = min(times[0] for times in times_of.values()), max(times[-1] for times in times_of.values())
        margin = max((last - first) / 20, timedelta(seconds=1))
        axes.set_xlim(first - margin, last + margin)
        locator = AutoDateLocator(minticks=3, maxticks=6)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.set_ylabel("verdicts")
        axes.legend(frameon=False, labelcolor=TEXT_COLOR)

    return svg_figure(draw, width=4.4, height=2.4)
