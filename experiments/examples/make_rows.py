"""Rows to try a reward of one's own on: six digits, of which the answer is to name the last.

    python experiments/examples/make_rows.py runs/own_reward

Writes FOLDER/talk.jsonl, conversations whose answer is any one of the six digits, to learn the form from, and
FOLDER/prompts.jsonl, {"prompt", "answer"}, which say by their answers that it is the last digit that is wanted.
"""

import json
import random
import sys
from pathlib import Path

TALK_ROWS, PROMPT_ROWS = 6000, 3000
SEED = 0


def question(digits: list[str]) -> str:
    return f"Name one of {' '.join(digits)}"


def write_rows(folder: Path, seed: int = SEED) -> None:
    """Both files; no prompt comes twice, in one or the other."""
    draw, seen = random.Random(seed), set()
    talk, prompts = [], []
    while len(prompts) < PROMPT_ROWS:
        digits = draw.sample("0123456789", 6)
        if tuple(digits) in seen:
            continue
        seen.add(tuple(digits))
        if len(talk) < TALK_ROWS:
            talk.append({"prompt": question(digits), "completion": draw.choice(digits)})
        else:
            prompts.append({"prompt": question(digits), "answer": digits[-1]})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("talk", talk), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]))
