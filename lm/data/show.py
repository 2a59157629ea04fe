"""Shows what a source holds: the format of its rows, how many and how long, five of them, and what would be refused.

    python -m lm data conversations.jsonl
    python -m lm data 'prompts/*.parquet' --columns=prompt=question,answer=gold --tokenizer=runs/quickstart/tokenizer

A source is a file, a folder, a glob or hf:NAME (lm.data.files); its formats are those of lm.data.formats. The exit
status is 1 if a row would be refused.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.data.conversations import Conversation
from lm.data.files import source_rows
from lm.data.formats import RecognizedRow, recognized_row
from lm.data.loading import row_digest
from lm.data.messages import RowFault
from lm.data.preferences import DESIRABLE, LABEL_AXIS, UNDESIRABLE
from lm.tokenizer import encode_chats, load_tokenizer

SHOWN_ROWS, SHOWN_FAULTS, WIDTH = 5, 10, 100
TOKENIZER_FILES = ("", "tokenizer.model")  # a file, or the one in a workdir
QUANTILES = (0, 50, 90, 99, 100)
FLAGS = {
    "columns": dict(default="", metavar="A=B,...", help="our name of a field = its name in the rows"),
    "tokenizer": dict(
        default="", metavar="FILE", help="a tokenizer, or the workdir of a run: lengths in its tokens too"
    ),
    "rows": dict(type=int, default=0, help="rows to read; default 0: all"),
}


def program(argv: Sequence[str]) -> None:
    """The program: see this module's docstring."""
    flags = parsed_flags(argv, __doc__ or "", FLAGS, {"source": dict(metavar="SOURCE", help="what to read")})
    formats, faults, shown, lengths, copies = _source_summary(flags.source, columns_of(flags.columns), flags)
    total = sum(formats.values()) + len(faults)
    print(f"{flags.source}: {total:,} rows")
    for name, count in formats.most_common():
        print(f"  {count:>9,}  {name}")
    if copies:
        print(f"  {copies:>9,}  of them copies of others; each counts as often as it comes")
    for unit, values in lengths.items():
        if values:
            at = ", ".join(f"{q} % {v:,.0f}" for q, v in zip(QUANTILES, np.percentile(values, QUANTILES)))
            print(f"length in {unit}: {at}; {sum(values):,} in all")
    for row in shown:
        print(f"\n{row.format}\n{row_text(row)}")
    if faults:
        print(f"\n{len(faults):,} rows would be refused (data.skip_bad_rows={len(faults)} passes over them):")
        for fault in faults[:SHOWN_FAULTS]:
            print(f"  {fault}")
        raise SystemExit(1)


def columns_of(text: str) -> dict[str, str]:
    """{"prompt": "question"} from "prompt=question". UserError for anything else."""
    pairs = [pair.split("=") for pair in text.split(",") if pair]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"--columns={text}: give pairs such as prompt=question, with commas between them")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}


def row_text(row: RecognizedRow) -> str:
    """A row for people, a line a message or answer."""
    value = row.value
    if isinstance(value, str):
        return _line("text", value)
    if isinstance(value, Conversation):
        lines = [_message_line(message) for message in value.messages]
        return "\n".join([*lines, *(_line(f"{name} =", str(field)) for name, field in value.fields.items())])
    axes = dict(value.axes)
    labels = axes.pop(LABEL_AXIS, [None] * len(value.responses))
    said = {DESIRABLE: "good", UNDESIRABLE: "bad"}
    answers = [
        _line(f"rank {rank}" if label is None else said[label], text)
        for rank, label, text in zip(value.ranking, labels, value.responses)
    ]
    scores = [_line(f"{name} =", str(axis)) for name, axis in axes.items()]
    return "\n".join([*map(_message_line, value.prompt), *answers, *scores])


def _source_summary(source: str, columns: Mapping[str, str], flags: Any):
    """How often each format comes, the faults, the first rows, the lengths by unit, and how many are copies."""
    formats, faults, shown, digests = Counter(), [], [], set()
    lengths: dict[str, list[int]] = {"characters": [], "tokens": []}
    tokenizer = load_tokenizer(_tokenizer_file(flags.tokenizer)) if flags.tokenizer else None
    for number, row in enumerate(source_rows(source)):
        if flags.rows and number == flags.rows:
            break
        try:
            recognized = recognized_row(row, columns)
        except RowFault as fault:
            faults.append(f"{row.place}: {fault}")
            continue
        formats[recognized.format] += 1
        digests.add(row_digest(recognized.value))
        if len(shown) < SHOWN_ROWS:
            shown.append(recognized)
        lengths["characters"].append(sum(len(text) for text in _texts(recognized)))
        if tokenizer:
            lengths["tokens"].append(_token_count(tokenizer, recognized))
        if number % 10_000 == 9_999 and sys.stderr.isatty():
            print(f"\r{number + 1:,} rows", end="", file=sys.stderr)
    return formats, faults, shown, lengths, sum(formats.values()) - len(digests)


def _tokenizer_file(given: str) -> Path:
    return next((path for name in TOKENIZER_FILES if (path := Path(given) / name).is_file()), Path(given))


def _texts(row: RecognizedRow) -> list[str]:
    if isinstance(row.value, str):
        return [row.value]
    if isinstance(row.value, Conversation):
        return [message["content"] for message in row.value.messages]
    return [*(message["content"] for message in row.value.prompt), *row.value.responses]


def _token_count(tokenizer, row: RecognizedRow) -> int:
    if isinstance(row.value, Conversation):
        return len(encode_chats(tokenizer, [row.value.messages])[0].ids)
    return sum(map(len, tokenizer.encode_batch(_texts(row))))


def _message_line(message: Mapping[str, Any]) -> str:
    weight = f" (weight {message['weight']:g})" if "weight" in message else ""
    return _line(message["role"] + weight, message["content"])


def _line(label: str, text: str) -> str:
    text = " ".join(text.split())
    return f"  {label:<10} {text if len(text) <= WIDTH else text[: WIDTH - 3] + '...'}"
