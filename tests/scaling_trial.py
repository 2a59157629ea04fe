"""What the tests of lm scaling run in the place of lm train: a run that costs nothing and obeys a known law.

Its loss is that of LAW at its parameters, counted here by hand, and its tokens, but for a spread of SPREAD.
"""

import json
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from lm.core.config import flags_and_config, to_dict
from lm.core.errors import UserError

LAW = {"E": 1.5, "A": 40.0, "B": 90.0, "alpha": 0.4, "beta": 0.4}
SPREAD = 0.002
FLAGS = {"workdir": dict(required=True)}


def program(argv: list[str]) -> None:
    flags, config = flags_and_config(argv, __doc__, FLAGS)
    workdir, m = Path(flags.workdir), config.model
    workdir.mkdir(exist_ok=True)
    if (workdir / "torn").exists():
        raise UserError("the disk is torn: mend it")
    with (workdir / "starts").open("a") as starts:
        starts.write("1\n")
    started = {"time": datetime.now(UTC).isoformat(timespec="microseconds")}
    (workdir / "record.json").write_text(json.dumps([started]))
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    time.sleep(float((workdir.parent.parent.parent / "pause").read_text()))
    # query, key, value and attention_out; gate, up and down; two norms of the width and two of a head
    layer = 4 * m.width**2 + 3 * m.width * m.hidden + 2 * m.width + 2 * m.head_size
    table = config.vocabulary.vocab_size * m.width
    parameters = m.layers * layer + table + m.width
    tokens = config.train.steps * config.data.batch_size * config.data.length
    loss = LAW["E"] + LAW["A"] / parameters ** LAW["alpha"] + LAW["B"] / tokens ** LAW["beta"]
    loss *= 1 + SPREAD * random.Random(parameters * tokens).gauss(0, 1)
    # 6 for each weight in a product, and two products of an average of (length + 1) / 2 keys a head, times three
    each = 6 * (m.layers * (layer - 2 * m.width - 2 * m.head_size) + table)
    each += 6 * m.layers * m.width * (config.data.length + 1)
    held_out = {"loss": loss, "bits_per_byte": loss / 2}
    row = {"step": config.train.steps, **{f"held_out/{name}": value for name, value in held_out.items()}}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    summary = {
        "steps": config.train.steps,
        "parameters": parameters,
        "tokens": tokens,
        "model_flops": each * tokens,
        "held_out": held_out,
        "about": {"tokens": 1_000_000},
    }
    (workdir / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    try:
        program(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
