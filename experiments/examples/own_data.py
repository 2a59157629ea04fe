"""Writes seven small files, one in each form that a stage learns from: python experiments/examples/own_data.py DIR

The task in all of them is to say which of two digits is larger. `python -m lm data DIR/messages.jsonl` shows a file;
the README's "Bring your own" says how each is trained on.
"""

import json
import random
import sys
from pathlib import Path

import pyarrow
from pyarrow import parquet

ROWS = 400


def write_files(folder: Path) -> None:
    """The seven files; the same whenever it is called."""
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    pairs = [random.sample(range(10), 2) for _ in range(ROWS)]
    items = [(f"Question {i}: is {a} or {b} larger?", str(max(a, b)), str(min(a, b))) for i, (a, b) in enumerate(pairs)]
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    rows = {
        "messages": [{"messages": [{**user, "content": q}, {**assistant, "content": good}]} for q, good, _ in items],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": good}]} for q, good, _ in items
        ],
        "alpaca": [{"instruction": q, "input": "", "output": good} for q, good, _ in items],
        "preferences": [{"prompt": q, "chosen": good, "rejected": bad} for q, good, bad in items],
        "kto": [
            {"prompt": q, "completion": (bad, good)[i % 2], "label": i % 2 == 1}
            for i, (q, good, bad) in enumerate(items)
        ],
        "prompts": [{"prompt": q, "answer": good} for q, good, _ in items],
    }
    for name, written in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    texts = [f"{q} It is {good}, because {good} is more than {bad}.\n" for q, good, bad in items]
    parquet.write_table(pyarrow.table({"text": texts}), folder / "text.parquet")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
