"""Prints the measurements: a table of each, and the ratios in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm.runs.console import print_table, say

ResultRow = Mapping[str, Any]


def print_limits(limits: Mapping[str, Any]) -> None:
    products = ", ".join(f"{dtype} {flops / 1e9:,.0f} GFLOP/s" for dtype, flops in limits["flops"].items())
    say(f"ceilings of one device: products {products}; memory {limits['bandwidth'] / 1e9:,.0f} GB/s read")


def print_training(rows: Sequence[ResultRow]) -> None:
    print_table(
        "Training",
        ["size", "dtype", "s a step", "tokens/s", "best", "GFLOP/s", "of peak"],
        [
            [
                row["size"],
                row["dtype"],
                row["ours"]["median"]["step"],
                *(f"{row['per_second']['ours'][name]:,.0f}" for name in ("median", "best")),
                f"{row['flops_per_second'] / 1e9:,.0f}",
                f"{row['of_peak']:.2f}",
            ]
            for row in rows
        ],
    )
    say(f"peak: {rows[0]['peak']['flops_per_second'] / 1e9:,.0f} GFLOP/s, {rows[0]['peak']['source']}")
    for row in rows:
        print_ratio(f"{row['size']} {row['dtype']}", row, "PyTorch", "tokens/s")


def print_generation(rows: Sequence[ResultRow]) -> None:
    print_table(
        f"Greedy generation of {rows[0]['new']} tokens after {rows[0]['prompt']}, tokens/s",
        ["size, dtype, batch", "in all", "prefill", "decode", "MB/step", "of memory"],
        [
            [
                f"{row['size']} {row['dtype']} {row['batch']}",
                f"{row['per_second']['ours']['median']:,.0f}",
                f"{row['prefill_per_second']:,.0f}",
                f"{row['decode_per_second']:,.0f}",
                f"{row['bytes_per_step'] / 1e6:,.1f}",
                f"{row['of_bandwidth']:.2f}",
            ]
            for row in rows
        ],
    )
    say("of memory: the bytes that decoding must read, over the bytes that memory can deliver in that time")
    for row in rows:
        print_ratio(f"{row['size']} {row['dtype']} batch {row['batch']}", row, "transformers", "tokens/s")


def print_startup(results: Mapping[str, ResultRow]) -> None:
    rows = [[kind, one["median"], one["best"], one["aim"]] for kind, one in results.items()]
    print_table("From the command to the first step, seconds", ["", "median", "best", "aim"], rows)


def print_rollout(rows: Sequence[ResultRow]) -> None:
    """The phases as a table, and the ratio in words."""
    (result,) = rows
    ours, peer = result["ours"], result["peer"] if "peer" in result else {"median": {}}
    names = list(dict.fromkeys([*ours["median"], *peer["median"]]))
    sides = (ours["median"], ours["best"], peer["median"])
    cell = lambda side, name: f"{side[name]:.3f}" if name in side else ""
    print_table(
        "One GRPO step, seconds", ["", "ours", "best", "TRL"], [[n, *(cell(s, n) for s in sides)] for n in names]
    )
    least, source, share = result["least"], result["peak"]["source"], result["of_peak"]
    say(f"the products alone take {least:.2f} s at {source}, {share:.2f} of ours")
    print_ratio("a GRPO step", result, "TRL", "steps/s")


def print_speculation(rows: Sequence[ResultRow]) -> None:
    """The interval of what was accepted is over prompts, so one prompt has none."""

    def acceptance_text(share: Mapping[str, float]) -> str:
        known = share["se"] < math.inf
        return f"{share['value']:.0%}" + (f" ({share['low']:.0%} to {share['high']:.0%})" if known else "")

    print_table(
        f"{rows[0]['size']}, {rows[0]['draft_tokens']} draft tokens, answers of at most {rows[0]['new']}",
        ["batch", "T", "tokens/s", "without", "times as fast", "accepted", "tokens a pass"],
        [
            [
                row["batch"],
                row["temperature"],
                *(f"{row['per_second'][side]:,.0f}" for side in ("drafted", "plain")),
                f"{row['ratio']:.2f}",
                acceptance_text(row["accepted"]),
                f"{row['tokens_a_pass']['value']:.1f}",
            ]
            for row in rows
        ],
    )


def print_engine(rows: Sequence[ResultRow]) -> None:
    """The engine beside the fixed loop, and groups that share their prompts' pages beside groups that do not."""
    titles = {
        "lengths": "answers of many lengths: the fixed loop, the engine",
        "groups": "groups of one prompt: each prefilled, pages shared",
    }
    cells = []
    for row in rows:
        for what, title in titles.items():
            faster, slower = row[what]["per_second"].values()
            turns = row[what]["each_turn"]
            cells.append(
                [
                    f"{row['size']} {row['dtype']} {row['batch']}",
                    title,
                    f"{slower:,.0f}",
                    f"{faster:,.0f}",
                    f"{row[what]['ratio']:.2f} ({min(turns):.2f} to {max(turns):.2f})",
                ]
            )
    print_table(
        f"{rows[0]['requests']} requests, tokens of answers a second",
        ["size, dtype, slots", "work", "the first", "the second", "times as fast (by turn)"],
        cells,
    )


def print_data(rows: Sequence[ResultRow]) -> None:
    """The loader's speed over training's, and ours over the library's at encoding."""
    print_table(
        "Loading, tokens/s",
        ["size", "training", *rows[0]["loaded_per_second"], "times training", "aim"],
        [
            [
                row["size"],
                f"{row['trained_per_second']:,.0f}",
                *(f"{rate:,.0f}" for rate in row["loaded_per_second"].values()),
                ", ".join(f"{ratio:,.0f}" for ratio in row["ratio"].values()),
                f"{row['aim']:g}",
            ]
            for row in rows
        ],
    )
    for row in rows:
        ours, library = (row["encoded_bytes_per_second"][side] / 1e6 for side in ("encode", "library"))
        say(
            f"{row['size']}: encodes {ours:.2f} MB/s, the tokenizer library's own call {library:.2f}: "
            f"{row['encode_ratio']:.3f} of its speed, by the median of turns"
        )


def print_serving(found: ResultRow) -> None:
    print_table(
        f"lm serve of {found['size']}, {found['slots']} slots, greedy, up to {found['new']} tokens after "
        f"{found['prompt']}; ms at p50 / p95 / p99",
        ["clients", "requests", "requests/s", "tokens/s", "to the first token", "between tokens"],
        [
            [
                row["clients"],
                row["requests"],
                f"{row['requests_per_second']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                *(" / ".join(f"{1000 * value:,.1f}" for value in row[name].values()) for name in ("first", "between")),
            ]
            for row in found["rows"]
        ],
    )
    loop = found["loop"]["tokens_per_second"]
    say(f"a loop over sample: {loop:,.0f} tokens/s, {found['loop']['requests_per_second']:.2f} requests/s")
    if "peer" in found:
        peer = found["peer"]["tokens_per_second"]
        say(f"a loop over transformers' generate: {peer:,.0f} tokens/s; our loop is {loop / peer:.2f} times as fast")
    for row in found["rows"]:
        say(f"{row['clients']} clients: {row['tokens_per_second'] / loop:.2f} times the loop over sample")


def print_ratio(title: str, row: ResultRow, peer: str, unit: str) -> None:
    """Our speed over the peer's, if there was one; the range is of single turns."""
    if "ratio" not in row:
        return
    ratio, (ours, theirs) = row["ratio"], (row["per_second"][side]["median"] for side in ("ours", "peer"))
    low, high = min(ratio["each_turn"]), max(ratio["each_turn"])
    say(
        f"{title}: {rate_text(ours)} {unit}, {peer} {rate_text(theirs)}: ours is {ratio['median']:.2f} times as fast "
        f"({low:.2f} to {high:.2f} by turn; best of each {ratio['best']:.2f}; "
        f"threads {row['threads']['ours']} and {row['threads']['peer']})"
    )


def rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
