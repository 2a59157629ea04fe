"""A corpus made of the tasks: pages of drill lines, without held-out items."""

import random

from lm.data.tasks.skills import (
    FACT_FREQUENCIES,
    FACTS_PER_LEVEL,
    TaskItem,
    bracket_item,
    copying_item,
    fact_items,
    is_held_out_item,
    sum_item,
)

PAGE_COUNT = 12_000
LINES_PER_PAGE = 24  # of a page
TASK_SHARES = {"copying": 0.2, "sums": 0.45, "brackets": 0.15, "facts": 0.2}  # of the lines
MAX_LETTERS, MAX_DEPTH = 16, 8  # letters, open brackets
DIGIT_CHOICES = (1, 2, 2, 3, 3, 3, 4, 4, 4)  # drawn from: there is less to learn from sums of one digit


def drill_pages() -> list[str]:
    """The whole corpus, always the same: 7.1 million characters."""
    known = [item for level in FACT_FREQUENCIES for item in fact_items(level)]
    often = [times for times in FACT_FREQUENCIES.values() for _ in range(FACTS_PER_LEVEL)]
    return [drill_page(random.Random(f"drills {number}"), known, often) for number in range(PAGE_COUNT)]


def drill_page(draw: random.Random, known: list[TaskItem], often: list[int]) -> str:
    """LINES_PER_PAGE lines of all kinds."""
    kinds = draw.choices(list(TASK_SHARES), list(TASK_SHARES.values()), k=LINES_PER_PAGE)
    return "".join(draw.choices(known, often)[0].line if kind == "facts" else drill_line(draw, kind) for kind in kinds)


def drill_line(draw: random.Random, kind: str) -> str:
    """One line of a kind that has a rule, drawn again if it is held out."""
    while True:
        if kind == "copying":
            item = copying_item(draw, draw.randint(1, MAX_LETTERS))
        elif kind == "sums":
            item = sum_item(draw, draw.choice(DIGIT_CHOICES))
        else:
            item = bracket_item(draw, draw.randint(1, MAX_DEPTH))
        if not is_held_out_item(item):
            return item.line
