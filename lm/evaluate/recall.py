"""Which facts of a table a model knows: it continues the beginning of each answer greedily, as plain text.

    python -m lm recall --workdir=runs/quickstart/pretrain
    python -m lm recall --workdir=runs/animals/pretrain --table=animals.csv --show=10

"The capital of France is" must go on with " Paris", and then with no other letter or digit. WORKDIR/recall.json keeps
the shares by relation, with Wilson's intervals, and what was said of the facts that are missed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.statistics import estimate_text, success_rate
from lm.data.facts.phrasings import phrasing_of, sentence, text_index
from lm.data.facts.tables import Fact, fact_table
from lm.data.prompts import padded_prompts
from lm.generate.answers import batch_answerer
from lm.generate.sampler import SamplingParams
from lm.runs.console import print_table, run_program, say, warn
from lm.runs.workdir import TrainedModel, require_decoder, write_text
from lm.train.warm_start import load_policy

RESULTS_FILE = "recall.json"
FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help="a stage's own, or a run of the pipeline's"),
    "table": dict(default="", metavar="CSV", help="the facts; default: ours"),
    "facts": dict(type=int, default=0, help="how many are asked, drawn from all; default: all"),
    "show": dict(type=int, default=5, help="how many of those that are missed are shown; default: 5"),
    "rows_at_once": dict(type=int, default=128, help="facts asked together; default: 128"),
}


class RecalledFact(NamedTuple):
    fact: Fact
    beginning: str  # what the model was given
    said: str  # how it went on
    is_right: bool


def recalled_facts(trained: TrainedModel, facts: Sequence[Fact], *, rows_at_once: int = 128) -> list[RecalledFact]:
    """How the model continues the answer about each fact, greedily, up to where the value stands."""
    tokenizer = trained.tokenizer
    beginnings = [fact_beginning(fact) for fact in facts]
    rows = [np.array([*tokenizer.start_ids, *tokenizer.encode(text)], np.int32) for text in beginnings]
    longest = max(len(tokenizer.encode(f" {fact.value}.")) for fact in facts)
    prompts = padded_prompts(rows, [{} for _ in rows], max(map(len, rows)))
    answers = batch_answerer(
        trained.model,
        trained.params["lm"],
        tokenizer,
        SamplingParams(longest, temperature=0.0),
        rows_at_once=rows_at_once,
        jit=jax.jit,
    )
    said = [answer.text for answer in answers(prompts, jax.random.key(0))]
    return [
        RecalledFact(fact, beginning, text, is_continued(text, fact.value))
        for fact, beginning, text in zip(facts, beginnings, said)
    ]


def fact_beginning(fact: Fact) -> str:
    """The answer up to its value: "The capital of France is"."""
    return sentence(phrasing_of(fact.relation).answer.partition("{v}")[0].rstrip(), e=fact.entity, v="")


def is_continued(said: str, value: str) -> bool:
    """Whether the text begins with the value after a space, and no further letter or digit: not 1 where 12 is said."""
    rest = said.removeprefix(f" {value}")
    return rest != said and not rest[:1].isalnum()


def recall_summary(found: Sequence[RecalledFact]) -> dict[str, Any]:
    """{"facts": n, "recall": Estimate, "by_relation": {relation: Estimate}, "missed": [...]}, for JSON."""
    by_relation: dict[str, list[bool]] = {}
    for each in found:
        by_relation.setdefault(each.fact.relation, []).append(each.is_right)
    return {
        "facts": len(found),
        "recall": success_rate([each.is_right for each in found])._asdict(),
        "by_relation": {relation: success_rate(hits)._asdict() for relation, hits in by_relation.items()},
        "missed": [{"beginning": e.beginning, "said": e.said, "right": e.fact.value} for e in found if not e.is_right],
    }


def measured_recall(
    trained: TrainedModel, *, table: str = "", facts: int = 0, rows_at_once: int = 128
) -> dict[str, Any]:
    """`recall_summary` of a model for the table at the path `table`, or ours; `facts` > 0 asks so many at most, always
    the same ones."""
    known = sorted(fact_table(table).facts, key=lambda fact: text_index(f"{fact.relation} of {fact.entity}", 2**64))
    return recall_summary(recalled_facts(trained, known[: facts or None], rows_at_once=rows_at_once))


def print_recall(name: str, summary: Mapping[str, Any], show: int) -> None:
    rows = [[relation, estimate_text(each, "percent")] for relation, each in summary["by_relation"].items()]
    rows.append(["all", estimate_text(summary["recall"], "percent")])
    print_table(f"{name}: {summary['facts']} facts continued, and a 95 % interval", ["relation", "right"], rows)
    for each in summary["missed"][:show]:
        say(f"{each['beginning']} ... {each['said']!r}, not {each['right']!r}")


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    if flags.rows_at_once < 1 or flags.facts < 0:
        raise UserError("rows_at_once must be at least 1, and facts at least 0 (all of them)")
    trained = load_policy(flags.workdir, backend=jax.default_backend(), warn=warn)
    require_decoder(trained, "lm recall")
    summary = measured_recall(trained, table=flags.table, facts=flags.facts, rows_at_once=flags.rows_at_once)
    write_text(Path(flags.workdir) / RESULTS_FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print_recall(flags.workdir, summary, flags.show)


if __name__ == "__main__":
    run_program(program)
