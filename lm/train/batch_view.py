"""A batch for people: its rows as the loop gets them, what a stage adds to them, as lines of text and as a page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.core.sharding import put_batch
from lm.core.types import RankedAnswers, Rollouts, Tokens, TrainState
from lm.data.inspect import TokenView, flat_rows, group_label, is_chat, row_views, token_ids, token_parts
from lm.data.origins import RowOrigin, SegmentOrigin
from lm.optim.combinators import inference_state
from lm.runs.html import template_environment, visible_text
from lm.train.setup import TrainingSetup

# Trained tokens have two shades in turn, so that neighbours can be told apart.
TRAINED_COLORS, CONTEXT_COLOR, PADDING_COLOR, RESET = ("\033[32m", "\033[92m"), "\033[90m", "\033[2;90m", "\033[0m"
ADVANTAGE = "advantage"


class SegmentView(NamedTuple):
    title: str
    tokens: Sequence[TokenView]


class RowView(NamedTuple):
    label: str
    facts: Sequence[tuple[str, str]]
    segments: Sequence[SegmentView]

    def advantages(self) -> list[tuple[str, float]]:
        """(text, advantage) of each trained token; none where the stage gives no advantage."""
        tokens = [token for segment in self.segments for token in segment.tokens]
        return [(t.text, t.values[ADVANTAGE]) for t in tokens if t.kind == "trained" and ADVANTAGE in t.values]


class BatchView(NamedTuple):
    title: str
    state: str  # which state drew the batch
    rows: Sequence[RowView]
    hidden: int  # rows that are not shown


def batch_view(
    r: TrainingSetup,
    state: TrainState,
    batch: Any,
    origins: Sequence[RowOrigin] | None,
    *,
    rows: int,
    step: int,
    done: int,
) -> BatchView:
    """The first `rows` rows of batch `step`, or prompts with all their answers, in the state after `done` steps."""
    annotated = annotated_batch(r, state, batch)
    if origins is not None and len(jax.tree.leaves(annotated)[0]) < len(origins):  # the stage keeps some of its answers
        origins = origins[:: len(origins) // len(jax.tree.leaves(annotated)[0])]
    parts = {
        **token_parts(batch),
        **token_parts(annotated),
    }  # tokens that the stage drops after reading them are shown too
    views: list[RowView] = []
    for name, tokens in parts.items():
        main = name == "tokens"
        shape = (
            np.shape(annotated.ranks)[:2] if isinstance(annotated, RankedAnswers) and main else (len(tokens.inputs),)
        )
        count = min(rows * (shape[1] if len(shape) > 1 else 1), len(tokens.inputs))
        part = jax.tree.map(lambda x: x[:count], tokens)  # noqa: B023  read at once
        values = target_values(r, state, annotated, part, main=main) if count else {}
        for row in range(count):
            if not (part.segments[row] > 0).any() and isinstance(annotated, RankedAnswers):
                continue  # an answer that is not there
            place = row // shape[1] if len(shape) > 1 else row
            origin = origins[place] if origins is not None and place < len(origins) and name != "text_tokens" else None
            label = group_label(row, shape) if main else f"{name.removesuffix('_tokens')} row {row + 1}"
            facts = [*row_facts(part, row, origin), *(batch_facts(annotated, row, values) if main else ())]
            views.append(RowView(label, facts, segment_views(r, part, row, values, origin)))
    hidden = sum(int((tokens.segments > 0).any(axis=1).sum()) for tokens in parts.values()) - len(views)
    at = f"after {done} steps" if done else "that the run starts from"
    return BatchView(f"batch {step} of stage {r.stage.name}", f"in the state {at}", views, hidden)


def annotated_batch(r: TrainingSetup, state: TrainState, batch: Any) -> Any:
    """The batch as the stage's own update completes it before it learns, on the host; a batch of rows [B,...]."""
    update = r.build_update({})
    if update.annotated_batch is None:
        return batch
    annotated = jax.device_get(jax.jit(update.annotated_batch)(state, put_batch(batch, r.mesh)))
    if isinstance(annotated, Rollouts) and annotated.rewards.ndim > 1:  # grouped by prompts
        annotated = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), annotated)
    return annotated


def target_values(
    r: TrainingSetup, state: TrainState, batch: Any, tokens: Tokens, *, main: bool
) -> dict[str, np.ndarray]:
    """What is known of each target, f32[N,T] by name: of rollouts what the stage notes, else the model's log-prob."""
    count = len(tokens.inputs)
    if main and isinstance(batch, Rollouts):
        noted = {
            "logprob": batch.old_logprobs if batch.old_logprobs is not None else batch.sampler_logprobs,
            "sampler logprob": batch.sampler_logprobs,
            "reference logprob": batch.ref_logprobs,
            ADVANTAGE: batch.advantages,
            "value": batch.old_values,
            "return": batch.returns,
        }
        values = {name: flat_rows(x)[:count] for name, x in noted.items() if x is not None}
        if "reference logprob" in values:
            values["KL to the reference"] = (values["logprob"] - values["reference logprob"]) * (tokens.weights > 0)
        return values
    if r.stage.trains_reward_model:
        return {}
    model, lm = r.context.model, inference_state(state).params["lm"]
    logprobs = r.context.jit(lambda lm, tokens: model.token_logprobs(lm, tokens))(lm, put_batch(tokens, r.mesh))
    return {"logprob": np.asarray(logprobs)}


def row_facts(tokens: Tokens, row: int, origin: RowOrigin | None) -> Iterator[tuple[str, str]]:
    """What is true of any row."""
    if origin is not None:
        epoch = f", epoch {origin.epoch}" if origin.epoch else ""
        yield "training row", f"{origin.number:,}{epoch}"
        if origin.writer:
            yield "written by", f"the {origin.writer}" if origin.writer != "people" else origin.writer
    yield "weight sum", f"{tokens.weights[row].sum():g}"
    if padding := int((tokens.segments[row] == 0).sum()):
        yield "padding", f"{padding} of {tokens.segments.shape[1]}"


def batch_facts(batch: Any, row: int, values: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """What the kind of batch says of a row: ranks of an answer; the reward, and what the stage makes of it."""
    if isinstance(batch, RankedAnswers):
        ranks = np.asarray(batch.ranks).reshape(-1, np.shape(batch.ranks)[-1])
        judged = (ranks > 0).any(axis=0)  # axes on which some answer of the batch is: KTO's labels may be absent
        yield "rank", ", ".join(str(rank) if rank else "none" for rank in ranks[row, judged])
        if batch.baseline is not None:
            yield "baseline", f"{float(batch.baseline[row // np.shape(batch.ranks)[1]]):.3g}"
    if isinstance(batch, Rollouts):
        trained = np.asarray(batch.tokens.weights)[row] > 0
        yield "reward", f"{float(batch.rewards[row]):.3g}"
        for name, value in batch.row_metrics.items():
            yield name, f"{float(value[row]):.3g}"
        yield "ended", "by itself" if bool(batch.stopped[row]) else "cut off by the limit"
        if ADVANTAGE in values:
            low, high = values[ADVANTAGE][row][trained].min(), values[ADVANTAGE][row][trained].max()
            yield ADVANTAGE, f"{low:+.3g} on each token" if high - low < 1e-6 else f"{low:+.3g} to {high:+.3g}"
        if "KL to the reference" in values:
            yield "KL to the reference", f"{values['KL to the reference'][row].sum():.3g}"


def segment_views(
    r: TrainingSetup, tokens: Tokens, row: int, values: Mapping[str, np.ndarray], origin: RowOrigin | None
) -> list[SegmentView]:
    """The segments of a row with their titles, the padding last."""
    known = origin.segments if origin is not None else ()
    unit = "message" if is_chat(tokens, token_ids(r.context.tokenizer)) else "token"
    views = []
    for k, segment in enumerate(row_views(r.context.tokenizer, tokens, row, values)):
        if segment[0].kind == "padding":
            views.append(SegmentView("padding", segment))
            continue
        places = tokens.positions[row][tokens.segments[row] == segment[0].segment]
        title = f"segment {segment[0].segment}, positions {places[0]} to {places[-1]}"
        views.append(SegmentView(f"{title}{segment_name(known[k], unit) if k < len(known) else ''}", segment))
    return views


def segment_name(origin: SegmentOrigin, unit: str) -> str:
    """Where a segment is from, as the end of its title; `unit` is what its start counts."""
    what = ", ".join(part for part in (origin.source, origin.kind) if part)
    place = f", from {unit} {origin.start:,} on" if origin.start else ""
    return f": {origin.name}{f' ({what})' if what and what != origin.name else ''}{place}"


def text_lines(view: BatchView, *, in_color: bool) -> Iterator[str]:
    """The batch for a terminal: trained tokens in green, two shades in turn, or between ⟦ and ⟧ without colour."""
    yield f"{view.title}, {view.state}"
    for row in view.rows:
        yield ""
        yield f"{row.label}: {', '.join(f'{name} {value}' for name, value in row.facts)}"
        for segment in row.segments:
            if segment.tokens[0].kind == "padding":
                text = f"· × {len(segment.tokens)}"
                yield f"  {PADDING_COLOR}{text}{RESET}" if in_color else f"  {text}"
                continue
            yield f"  {segment.title}"
            text = colored_text(segment.tokens) if in_color else bracketed_text(segment.tokens)
            yield from (f"    {line}" for line in text.split("\n"))
        advantages = row.advantages()
        if len({round(value, 6) for _, value in advantages}) > 1:
            listed = "  ".join(f"{one_line(text)} {value:+.2f}" for text, value in advantages)
            yield f"  advantages: {listed}"
    if view.rows and view.hidden:
        yield ""
        yield f"{view.hidden} more rows; --rows={len(view.rows) + view.hidden} shows all"


def bracketed_text(tokens: Sequence[TokenView]) -> str:
    """The text with every run of trained tokens between ⟦ and ⟧."""
    parts, inside = "", False
    for token in tokens:
        if (token.kind == "trained") != inside:
            inside = not inside
            parts += "⟦" if inside else "⟧"
        parts += shown_text(token.text)
    return parts + ("⟧" if inside else "")


def colored_text(tokens: Sequence[TokenView]) -> str:
    """The text in the colours of a terminal, which end and begin again at each line's end."""
    parts = ""
    for i, token in enumerate(tokens):
        color = TRAINED_COLORS[i % 2] if token.kind == "trained" else CONTEXT_COLOR
        parts += "\n".join(f"{color}{line}{RESET}" for line in shown_text(token.text).split("\n"))
    return parts


def shown_text(text: str) -> str:
    """A token's text with a sign at each line's end, and no control character that a terminal would obey."""
    return visible_text(text).replace("\n", "↵\n")


def one_line(text: str) -> str:
    return repr(visible_text(text))


def html_page(view: BatchView, checks: Sequence[Any], notes: Sequence[str], command: str) -> str:
    """The batch as a page of one file; `checks` are lm.data.batch_checks.Check."""
    largest = max((abs(value) for row in view.rows for _, value in row.advantages()), default=0.0)
    template = template_environment().get_template("train/batch.html.jinja")
    return template.render(
        view=view,
        checks=checks,
        notes=notes,
        command=command,
        token_note=token_note,
        token_style=advantage_style(largest),
        breaks=lambda text: text.startswith("<|") and text.removesuffix("|>").removeprefix("<|") in CHAT_ROLES,
        shown_text=shown_text,
    )


CHAT_ROLES = ("system", "user", "assistant", "tool")


def token_note(token: TokenView) -> str:
    """What the pointer shows of a token."""
    parts = [
        f"id {token.id}",
        f"weight {token.weight:g}",
        f"position {token.position}",
        f"segment {token.segment}",
        *(f"{name} {value:.3f}" for name, value in token.values.items()),
    ]
    return "\n".join(parts)


def advantage_style(largest: float) -> Callable[[TokenView], str]:
    """A line under each trained token in the colour of its advantage's sign, as strong as it is large."""

    def style(token: TokenView) -> str:
        if not largest or token.kind != "trained" or ADVANTAGE not in token.values:
            return ""
        value = token.values[ADVANTAGE]
        share = round(100 * abs(value) / largest)
        color = "var(--good)" if value > 0 else "var(--bad)"
        return f"box-shadow: inset 0 -3px color-mix(in srgb, {color} {share}%, transparent)"

    return style
