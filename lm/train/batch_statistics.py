"""Figures and a table of the lengths of documents and answers, and of the trained share, by source and by kind."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lm.core.errors import UserError
from lm.data.length_statistics import UNKNOWN, LengthSummary, SegmentLength, answer_lengths, document_lengths, summaries
from lm.runs.console import print_table, say
from lm.runs.html import SERIES_COLORS, TEXT_COLOR, png_figure

LENGTHS_FIGURE, SHARES_FIGURE = "lengths.png", "shares.png"
HISTOGRAM_BINS = 30
MAX_SERIES = len(SERIES_COLORS)  # sources with a colour of their own in a histogram: those with the most tokens
COLUMNS = ("", "segments", "tokens", "trained", "document", "95 %", "answer", "95 %")


def write_statistics(lengths: Sequence[SegmentLength], folder: str | Path, *, padding: float) -> list[Path]:
    """Prints the tables and writes the figures of `lengths`; `padding` is the share of positions that hold nothing."""
    by_source, by_kind = (summaries(lengths, group) for group in (source_name, kind_name))
    if not by_source:
        raise UserError("the batches hold no tokens: there is nothing to count")
    has_kinds = set(by_kind) != {UNKNOWN}
    print_summaries("tokens by source, and of a document (or conversation) and an answer: median, 95 %", by_source)
    if has_kinds:
        print_summaries("tokens by kind", by_kind)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LENGTHS_FIGURE).write_bytes(lengths_figure(lengths, list(by_source)[:MAX_SERIES]))
        groups = {"source": by_source, **({"kind": by_kind} if has_kinds else {})}
        (folder / SHARES_FIGURE).write_bytes(shares_figure(groups, padding))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another --stats") from error
    paths = [folder / LENGTHS_FIGURE, folder / SHARES_FIGURE]
    say(f"figures: {', '.join(map(str, paths))}")
    return paths


def source_name(length: SegmentLength) -> str:
    return length.source


def kind_name(length: SegmentLength) -> str:
    return length.kind


def print_summaries(title: str, by_name: Mapping[str, LengthSummary]) -> None:
    """A line for each source or kind."""
    print_table(
        title,
        COLUMNS,
        [
            [name, s.segments, s.tokens, f"{s.trained_share:.1%}", *map(rounded_count, s[3:])]
            for name, s in by_name.items()
        ],
    )


def rounded_count(tokens: float) -> int | str:
    return "–" if np.isnan(tokens) else round(tokens)


def lengths_figure(lengths: Sequence[SegmentLength], sources: Sequence[str]) -> bytes:
    """Histograms of the tokens of a document or conversation and, where there are any, of an answer, by source."""
    measures: dict[str, Callable] = {"tokens a document or conversation": document_lengths}
    if len(answer_lengths(lengths)):
        measures["tokens an answer"] = answer_lengths

    def draw(axes):
        for ax, (label, measure) in zip(np.atleast_1d(axes), measures.items(), strict=True):
            by_source = {source: measure(x for x in lengths if x.source == source) for source in sources}
            by_source = {source: values for source, values in by_source.items() if len(values)}
            everything = np.concatenate(list(by_source.values()))
            low, high = max(everything.min(), 1), everything.max() + 1
            spread = high > 20 * low
            edges = np.geomspace(low, high, HISTOGRAM_BINS) if spread else np.linspace(low, high, HISTOGRAM_BINS)
            for (source, values), color in zip(by_source.items(), SERIES_COLORS):
                ax.hist(values, bins=edges, histtype="stepfilled", alpha=0.3, color=color)
                ax.hist(values, bins=edges, histtype="step", color=color, label=f"{source} ({len(values):,})")
            if spread:
                ax.set_xscale("log")
            ax.set_xlabel(label)
            ax.set_ylabel("how many")
            ax.legend(frameon=False, fontsize=8)
            ax.set_axisbelow(True)

    return png_figure(draw, width=4.2 * len(measures), height=3.0, ncols=len(measures))


def shares_figure(groups: Mapping[str, Mapping[str, LengthSummary]], padding: float) -> bytes:
    """The tokens of each source and kind, with the trained ones in another colour; and the share of padding."""

    def draw(axes):
        for ax, (title, by_name) in zip(np.atleast_1d(axes), groups.items(), strict=True):
            places = np.arange(len(by_name))
            tokens = np.array([s.tokens for s in by_name.values()])
            trained = np.array([s.trained for s in by_name.values()])
            ax.set_axisbelow(True)
            ax.barh(places, trained, 0.6, color=SERIES_COLORS[2], label="trained")
            ax.barh(places, tokens - trained, 0.6, left=trained, color=TEXT_COLOR, alpha=0.45, label="context")
            for place, s in zip(places, by_name.values()):
                ax.text(s.tokens, place, f" {s.trained_share:.0%} trained", va="center", fontsize=8)
            ax.set_yticks(places, list(by_name))
            ax.invert_yaxis()
            ax.set_xlim(0, 1.3 * tokens.max())
            ax.grid(visible=False, axis="y")
            ax.grid(visible=True, axis="x")
            ax.set_xlabel(f"tokens by {title}; padding {padding:.1%} of all positions")
            ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)

    height = 1.3 + 0.35 * max(len(by_name) for by_name in groups.values())
    return png_figure(draw, width=5.6 * len(groups), height=height, ncols=len(groups))
