"""Measures how well a reward model agrees with its rater on held-out answers.

    python -m lm reward-report --workdir=runs/quickstart/reward
    python -m lm reward-report --workdir=runs/ratings

Prints a table and writes WORKDIR/taste.json and WORKDIR/taste.html: accuracy by margin and by axis with intervals,
calibration, correlation with length, and the pairs on which the model is most confident and wrong.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.statistics import Estimate, mean_estimate, success_rate
from lm.data import batches
from lm.data.preferences import Ranking
from lm.data.tokenized_rankings import TokenizedRanking, ranked_answers_batch
from lm.losses.ranking import preference_mask
from lm.runs.console import print_table, run_program, say, warn
from lm.runs.html import HELD_OUT_COLOR, TEXT_COLOR, TRAIN_COLOR, rendered_page, svg_figure
from lm.runs.workdir import CONFIG_FILE, TrainedModel, load_trained_model, read_json, write_text
from lm.stages import REWARD_MODEL_STAGES
from lm.stages.reward_model import ranking_batches

PAGE_FILE, NUMBERS_FILE = "taste.html", "taste.json"
MAX_WORST_PAIRS = 12  # pairs shown, one of a prompt at most
RANKINGS_AT_ONCE = 32  # verdicts scored together
FLAGS = {"workdir": dict(required=True, metavar="DIR", help="a trained reward model's own folder")}


class PreferencePair(NamedTuple):
    """A preference of the rater on an axis, and by how much the model shares it."""

    ranking: int  # which of the held-out verdicts
    better: int
    worse: int
    rank_gap: int  # ranks between the two
    score_gap: float  # score of the better one minus score of the other


def measure_reward_model(path: str | Path) -> dict[str, Any]:
    """Judges the held-out answers with the reward model of a workdir; writes and returns the measurements."""
    path = Path(path)
    trained = load_trained_model(path, backend=jax.default_backend(), warn=warn)
    if trained.stage not in REWARD_MODEL_STAGES:
        raise UserError(f"{path} is no reward model (it is {trained.stage}): train stage reward, and name its workdir")
    options = read_json(path / CONFIG_FILE)["data"]
    axes = ranking_batches.ordered_axes(options["axes"])
    rows = {name: options[name] for name in ("columns", "skip_bad_rows") if name in options}
    _, unseen, _ = ranking_batches.split_rankings(options["rankings"], options["held_out"], **rows)
    verdicts, _ = ranking_batches.reward_model_rows(trained.tokenizer, unseen, tuple(axes), options["length"])
    ranks, lengths, scores = held_out_scores(trained, verdicts, options["length"])
    total = scores @ np.array(list(axes.values()))
    pairs = preference_pairs(ranks[..., 0], total)
    measurements = {
        "prompts": len(verdicts),
        "pairs": len(pairs),
        "accuracy": accuracy_by_ranking(pairs)._asdict(),
        "longer": accuracy_by_ranking(preference_pairs(ranks[..., 0], lengths))._asdict(),
        "axes": {
            axis: accuracy_by_ranking(own)._asdict()
            for a, axis in enumerate(axes)
            if (own := preference_pairs(ranks[..., a], scores[..., a]))
        },
        "apart": accuracy_by_margin(pairs),
        "calibration": calibration_bins(pairs),
        "length_correlation": pearson_correlation(total[lengths > 0], lengths[lengths > 0]),
        "answers": [[float(x), int(n)] for x, n in zip(total[lengths > 0], lengths[lengths > 0])],
        "worst": worst_pairs(pairs, [verdict.ranking for verdict in verdicts], total),
    }
    write_text(path / NUMBERS_FILE, json.dumps(measurements, ensure_ascii=False, indent=1) + "\n")
    page = rendered_page(
        "report/reward_model.html.jinja", root=path, measured=measurements, figures=reward_model_figures(measurements)
    )
    write_text(path / PAGE_FILE, page)
    return measurements


def held_out_scores(
    trained: TrainedModel, verdicts: Sequence[TokenizedRanking], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks i32[V,K,A], lengths in tokens [V,K] (0: no such answer) and scores f64[V,K,A] of every answer."""
    rows = ranked_answers_batch(verdicts, length, max(len(verdict.rows) for verdict in verdicts))
    score = jax.jit(functools.partial(ranking_batches.answer_scores, trained.model))
    parts = [score(trained.params, part.tokens) for part in batches.sequential_batches(rows, RANKINGS_AT_ONCE)]
    scores = np.concatenate([np.asarray(part, np.float64) for part in parts])[: len(verdicts)]
    return rows.ranks, (rows.tokens.segments > 0).sum(axis=-1), scores


def preference_pairs(ranks: np.ndarray, scores: np.ndarray) -> list[PreferencePair]:
    """Every strict preference in ranks [V,K], with the lead in scores [V,K]."""
    return [
        PreferencePair(int(v), int(i), int(j), int(ranks[v, j] - ranks[v, i]), float(scores[v, i] - scores[v, j]))
        for v, i, j in zip(*np.nonzero(np.asarray(preference_mask(ranks))))
    ]


def pair_accuracy(pair: PreferencePair) -> float:
    """1 where the model shares the preference, one half where it has none."""
    return 0.5 if pair.score_gap == 0 else float(pair.score_gap > 0)


def accuracy_by_ranking(pairs: Sequence[PreferencePair]) -> Estimate:
    """Share of shared preferences; each verdict counts once, as its pairs are not independent."""
    of_verdict: dict[int, list[float]] = {}
    for pair in pairs:
        of_verdict.setdefault(pair.ranking, []).append(pair_accuracy(pair))
    return mean_estimate([float(np.mean(each)) for each in of_verdict.values()])


def accuracy_by_margin(pairs: Sequence[PreferencePair]) -> list[dict[str, Any]]:
    """Accuracy by how many ranks the two answers are apart. The last group holds all larger distances."""
    groups = []
    for low, high in zip(ranking_batches.MARGIN_BINS, (*ranking_batches.MARGIN_BINS[1:], math.inf)):
        inside = [pair.score_gap > 0 for pair in pairs if low <= pair.rank_gap < high]
        if inside:
            groups.append(
                {"apart": low, "last": math.isinf(high), "pairs": len(inside), **success_rate(inside)._asdict()}
            )
    return groups


def calibration_bins(pairs: Sequence[PreferencePair]) -> list[dict[str, Any]]:
    """How often the side that the model prefers is the better one, by the probability that the model gives it."""
    bins = []
    for low, high in zip(ranking_batches.CONFIDENCE_BINS, (*ranking_batches.CONFIDENCE_BINS[1:], math.inf)):
        inside = [pair for pair in pairs if low <= pair_confidence(pair) < high]
        if inside:
            confidence = float(np.mean([pair_confidence(pair) for pair in inside]))
            true = success_rate([pair.score_gap > 0 for pair in inside])
            bins.append({"from": low, "said": confidence, "pairs": len(inside), **true._asdict()})
    return bins


def pair_confidence(pair: PreferencePair) -> float:
    """The probability that the model gives to the side it prefers."""
    return 1 / (1 + math.exp(-abs(pair.score_gap)))


def pearson_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where either does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def worst_pairs(
    pairs: Sequence[PreferencePair], verdicts: Sequence[Ranking], total: np.ndarray
) -> list[dict[str, Any]]:
    """The preferences that the model contradicts most, one of each verdict."""
    worst_of = {}
    for pair in sorted((pair for pair in pairs if pair.score_gap < 0), key=lambda pair: pair.score_gap):
        worst_of.setdefault(pair.ranking, pair)
    shown = list(worst_of.values())[:MAX_WORST_PAIRS]
    return [
        {
            "prompt": verdicts[pair.ranking].prompt,
            "better": verdicts[pair.ranking].responses[pair.better],
            "worse": verdicts[pair.ranking].responses[pair.worse],
            "scores": [float(total[pair.ranking, pair.better]), float(total[pair.ranking, pair.worse])],
            "sure": pair_confidence(pair),
        }
        for pair in shown
    ]


def reward_model_figures(measurements: Mapping[str, Any]) -> list[tuple[str, Markup, str]]:
    """(title, picture, caption) of calibration, accuracy by margin, and score over length."""

    def draw_calibration(axes: Axes):
        confidence, true = ([one[key] for one in measurements["calibration"]] for key in ("said", "value"))
        axes.plot([0.5, 1], [0.5, 1], color=TEXT_COLOR, linewidth=0.8, linestyle="--")
        axes.errorbar(
            confidence, true, yerr=_interval_reach(measurements["calibration"]), fmt="o", color=TRAIN_COLOR, capsize=3
        )
        axes.set_xlabel("what the model gives the side it prefers")
        axes.set_ylabel("how often that side was better")
        axes.set_ylim(-0.02, 1.02)

    def margins(axes: Axes):
        names = [f"{one['apart']}{' or more' if one['last'] else ''}" for one in measurements["apart"]]
        values = [one["value"] for one in measurements["apart"]]
        axes.axhline(0.5, color=TEXT_COLOR, linewidth=0.8, linestyle="--")
        axes.errorbar(
            range(len(names)),
            values,
            yerr=_interval_reach(measurements["apart"]),
            fmt="o",
            color=TRAIN_COLOR,
            capsize=3,
        )
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("ranks apart")
        axes.set_ylabel("accuracy")

    def lengths(axes: Axes):
        score, length = np.array(measurements["answers"]).T
        axes.plot(length, score, ".", color=HELD_OUT_COLOR, alpha=0.5, markersize=4)
        axes.set_xlabel("tokens of prompt and answer")
        axes.set_ylabel("score")

    return [
        (
            "Calibration",
            svg_figure(draw_calibration, width=3.2, height=2.4),
            "On the dashed line the model is as sure as it should be; above it, too modest.",
        ),
        (
            "Accuracy by the rater's margin",
            svg_figure(margins, width=3.2, height=2.4),
            "How often model and rater agree, by how far apart the rater put the two; a coin gets 0.5.",
        ),
        (
            "Score and length",
            svg_figure(lengths, width=3.2, height=2.4),
            f"Correlation {measurements['length_correlation']:+.2f}. A taste for length alone is a common flaw.",
        ),
    ]


def _interval_reach(estimates: Sequence[Mapping[str, float]]) -> np.ndarray:
    """How far the interval of each estimate reaches below and above its value."""
    down, up = ([abs(one[side] - one["value"]) for one in estimates] for side in ("low", "high"))
    return np.array([down, up])


def print_measurements(measurements: Mapping[str, Any]) -> None:
    """The numbers as a table on the terminal."""
    rows = [("accuracy", measurements["accuracy"]), ("had the longer answer always won", measurements["longer"])]
    rows += [
        (f"accuracy on {axis}", one) for axis, one in measurements["axes"].items() if len(measurements["axes"]) > 1
    ]
    rows += [
        (f"accuracy {one['apart']}{' or more' if one['last'] else ''} ranks apart", one)
        for one in measurements["apart"]
    ]
    rows += [(f"accuracy where {one['said']:.0%} sure", one) for one in measurements["calibration"]]
    table = [[name, f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]", e.get("pairs", "")] for name, e in rows]
    title = f"{measurements['prompts']} held-out verdicts, {measurements['pairs']} pairs; in brackets 95 % intervals"
    print_table(title, ["", "", "pairs"], table)
    say(f"correlation of score and length {measurements['length_correlation']:+.2f}")


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    print_measurements(measure_reward_model(flags.workdir))
    say(f"page: {Path(flags.workdir) / PAGE_FILE}")


if __name__ == "__main__":
    run_program(program)
