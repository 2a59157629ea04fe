"""The results of one stage's run: curves and answers as parts for any page, and a page of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from lm.core.imports import is_import_path
from lm.core.statistics import percent_text
from lm.runs.html import HELD_OUT_COLOR, SERIES_COLORS, TRAIN_COLOR, rendered_page, short_number, svg_figure
from lm.runs.timing import PHASES
from lm.runs.workdir import (
    CONFIG_FILE,
    REPORT_FILE,
    ROLLOUTS_FILE,
    SUMMARY_FILE,
    read_json,
    read_metrics,
    read_run_starts,
    write_text,
)
from lm.stages import REWARD_MODEL_STAGES, ROLLOUT_STAGES, STAGES, TEACHER_STAGES

SHOWN_ROLLOUTS = 4  # answers of a policy shown from the first batch that was logged, and as many from the last
SMOOTHING_PARTS = 10  # a smoothed line is the mean of about a tenth of the points
PHASE_COLOURS = dict(zip(PHASES, SERIES_COLORS, strict=True)) | {"other": "var(--line)"}


class MetricPanel(NamedTuple):
    metric: str
    title: str
    note: str
    shows_held_out: bool = True  # whether its held-out value has a meaning


LOSS_PANEL = MetricPanel("loss", "Loss", "Surprise at the next token, in nats; lower is better.")
REWARD_MODEL_PANELS = (
    MetricPanel("loss", "Loss", "−log of the probability given to the rater's verdict; a coin flip costs 0.69."),
    MetricPanel(
        "accuracy", "Accuracy on pairs", "How often the answer that the rater preferred gets the higher score."
    ),
)
RL_PANELS = (
    MetricPanel("reward", "Reward", "What an answer is worth to the policy: what it is trained to raise."),
    MetricPanel(
        "reward/", "A part of the reward", "One of the rewards whose weighted sum the policy is trained to raise."
    ),
    MetricPanel("score/", "The rater's own score", "The policy never sees it; it judges the learned reward."),
    MetricPanel(
        "kl", "KL to the starting model", "How far the policy has moved, in nats an answer; moving costs reward."
    ),
    MetricPanel("entropy", "Entropy", "How undecided the policy is, in nats a token; near 0 it says one thing only."),
    MetricPanel("clip_fraction", "Clip fraction", "Share of tokens that an update moved beyond the clip.", False),
    MetricPanel("explained_variance", "Explained variance", "How much of the returns the value head foresees; 1: all."),
    MetricPanel(
        "equal_groups", "Groups alike", "Share of prompts whose answers are all worth the same: they teach nothing."
    ),
    MetricPanel("response_length", "Tokens an answer", "A reward may come to favour long answers, or short ones."),
    MetricPanel("stopped", "Ended by itself", "Share of answers; the rest were cut off by the limit."),
)
PREFERENCE_PANELS = (
    MetricPanel("loss", "Loss", "What the verdicts cost the policy; lower is better."),
    MetricPanel("accuracy", "Accuracy on pairs", "How often the policy's own reward prefers what the rater preferred."),
    MetricPanel("margin", "Margin", "By how much, in units of that reward."),
    MetricPanel(
        "chosen_logprob", "Log-probability of the preferred", "Falling: the policy leaves both answers behind."
    ),
)
DISTILLATION_PANELS = (
    MetricPanel("divergence", "Divergence from the teacher", "In nats a token, on what people wrote."),
    MetricPanel("on_policy_divergence", "The same, on its own words", "On answers that the student sampled."),
    LOSS_PANEL,
)
STAGE_PANELS: Mapping[str, Sequence[MetricPanel]] = {
    "pretrain": (LOSS_PANEL,),
    "sft": (LOSS_PANEL._replace(note="Surprise at the tokens of replies, in nats; what others say is not counted."),),
    **dict.fromkeys(REWARD_MODEL_STAGES, REWARD_MODEL_PANELS),
    **dict.fromkeys(("dpo", "ipo", "kto", "orpo", "simpo"), PREFERENCE_PANELS),
    **dict.fromkeys(TEACHER_STAGES, DISTILLATION_PANELS),
    **dict.fromkeys(ROLLOUT_STAGES, RL_PANELS),
}


# For a custom stage: the metrics that it logs under known names.
OWN_STAGE_PANELS = (MetricPanel("loss", "Loss", "What the stage minimises."), *RL_PANELS)


class StageRun(NamedTuple):
    name: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    summary: Mapping[str, Any]  # empty while it has not finished

    @property
    def method(self) -> str:
        """The stage it trained; a program that trains nothing goes by its own name."""
        return self.config["stage"]["name"] if "stage" in self.config else self.name


def write_run_page(path: str | Path) -> Path:
    """Writes the page of the stage that was trained in `path` and returns the page's path."""
    path = Path(path)
    stage, starts = stage_run(path), read_run_starts(path)
    page = rendered_page(
        "report/run.html.jinja",
        root=path,
        stage=stage,
        method=STAGES[stage.method].title if stage.method in STAGES else "",
        scores=held_out_changes(stage.summary),
        costs=run_costs(stage.summary, starts),
        phases=phase_shares(stage.summary),
        curves=metric_figures(stage._replace(name="")),  # on its own page it needs no name
        rollouts=shown_rollouts(path),
        starts=starts,
        config=json.dumps(stage.config, indent=2),
    )
    write_text(path / REPORT_FILE, page)
    return path / REPORT_FILE


def is_outdated(path: Path) -> bool:
    """Whether the page of a finished run is missing, or older than its summary."""
    page = path / REPORT_FILE
    return not page.exists() or page.stat().st_mtime_ns < (path / SUMMARY_FILE).stat().st_mtime_ns


def held_out_changes(summary: Mapping[str, Any]) -> list[tuple[str, float | None, float]]:
    """(metric, before the first step, after the last) of each held-out metric; none where nothing was held out."""
    if "held_out" not in summary:
        return []
    before = summary["before"]
    return [(name, before[name] if name in before else None, after) for name, after in summary["held_out"].items()]


def run_costs(summary: Mapping[str, Any], starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(what, how much, a note) of what a run took."""
    costs = []
    if "seconds" in summary:
        costs.append(("Seconds", f"{summary['seconds']:,.1f}", f"in {len(starts)} start{'s' * (len(starts) != 1)}"))
    if "tokens" in summary:
        costs.append(
            ("Tokens learned from", short_number(summary["tokens"]), f"in {summary['steps']:,} steps; padding left out")
        )
    if "parameters" in summary:
        costs.append(("Parameters", short_number(summary["parameters"]), ""))
    if "model_flops" in summary:
        note = "forward and backward over the tokens learned from, in every pass"
        costs.append(("Model FLOPs", short_number(summary["model_flops"]), note))
    if "mfu" in summary:
        peak = starts[-1]["peak"] if starts else {"flops_per_second": None, "source": "no record of the machine"}
        over = f"of {short_number(peak['flops_per_second'])}FLOP/s, " if peak["flops_per_second"] else ""
        mfu = "–" if summary["mfu"] is None else percent_text(summary["mfu"])
        costs.append(("MFU, over data and update", mfu, f"{over}{peak['source']}"))
    if "peak_memory_bytes" in summary:
        note = {"device": "of the fullest device", "process": "resident set of the process"}[summary["peak_memory_of"]]
        costs.append(("Peak memory", f"{short_number(summary['peak_memory_bytes'])}B", note))
    return costs


def phase_shares(summary: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    """(phase, seconds, share of all seconds, colour) of each phase that took any time."""
    if "seconds_by_phase" not in summary:
        return []
    seconds_of = {phase: seconds for phase, seconds in summary["seconds_by_phase"].items() if seconds > 0}
    return [
        (name, seconds_spent, seconds_spent / sum(seconds_of.values()), PHASE_COLOURS[name])
        for name, seconds_spent in seconds_of.items()
    ]


def stage_run(path: Path) -> StageRun:
    """What a workdir records; all of it empty where there is none."""
    config, summary = (read_json(path / file) if (path / file).exists() else {} for file in (CONFIG_FILE, SUMMARY_FILE))
    return StageRun(path.name, config, read_metrics(path), summary)


def stage_panels(method: str) -> Sequence[MetricPanel]:
    if is_import_path(method):
        return OWN_STAGE_PANELS
    return STAGE_PANELS[method] if method in STAGE_PANELS else ()


def metric_figures(stage: StageRun) -> list[tuple[str, MetricPanel, Markup]]:
    """A curve for each panel of the stage that has a metric; "score/" stands for every metric that begins so."""
    logged = dict.fromkeys(name for row in stage.rows for name in row)
    return [
        (stage.name, panel, metric_curve(stage.rows, name, held_out=panel.shows_held_out))
        for panel in stage_panels(stage.method)
        for name in logged
        if name == panel.metric or panel.metric.endswith("/") and name.startswith(panel.metric)
    ]


def metric_curve(rows: Sequence[Mapping[str, Any]], metric: str, *, held_out: bool = True) -> Markup:
    """A metric over the steps: as logged, smoothed where there are many points, and held out as dots."""

    def points(name):
        return np.array([(row["step"], row[name]) for row in rows if name in row], float).reshape(-1, 2).T

    def draw(axes: Axes):
        steps, values = points(metric)
        dense = len(values) >= 2 * SMOOTHING_PARTS
        axes.plot(steps, values, color=TRAIN_COLOR, alpha=0.5 if dense else 1, linewidth=0.8 if dense else 1.6)
        if dense:
            axes.plot(steps, moving_average(values), color=TRAIN_COLOR, linewidth=1.8)
        if held_out:
            axes.plot(*points(f"held_out/{metric}"), "o", color=HELD_OUT_COLOR, markersize=4.5, zorder=3)
        axes.set_xlabel("step", labelpad=1)
        axes.ticklabel_format(useOffset=False)
        axes.locator_params(nbins=5)
        axes.margins(y=0.12)

    return svg_figure(draw, width=3.0, height=1.9)


def moving_average(values: np.ndarray) -> np.ndarray:
    """Centred means over a tenth of the values; fewer near the ends, so that both ends stay where they are."""
    half = len(values) // (2 * SMOOTHING_PARTS)
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def shown_rollouts(path: Path) -> list[dict[str, Any]]:
    """The first rows of the first and of the last batch in a stage's rollouts.jsonl; none if it samples nothing."""
    logged = read_metrics(path / ROLLOUTS_FILE)
    steps = dict.fromkeys(row["step"] for row in (logged[:1] + logged[-1:]))
    return [row for step in steps for row in [row for row in logged if row["step"] == step][:SHOWN_ROLLOUTS]]
