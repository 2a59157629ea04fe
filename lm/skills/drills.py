"""A corpus made of the tasks: pages of drill lines, in which no held-out item stands."""

import random

from lm.skills.tasks import FACTS_A_LEVEL, TOLD, Item, brackets, copying, facts, held_out, sums

PAGES = 12_000
LINES = 24  # of a page
SHARES = {"copying": 0.2, "sums": 0.45, "brackets": 0.15, "facts": 0.2}  # of the lines
LONGEST, DEEPEST = 16, 8  # letters, open brackets
DIGITS = (1, 2, 2, 3, 3, 3, 4, 4, 4)  # drawn from: there is less to learn from sums of one digit


def pages() -> list[str]:
    """The whole corpus, the same for ever: 7.1 million characters."""
    known = [item for level in TOLD for item in facts(level)]
    often = [times for times in TOLD.values() for _ in range(FACTS_A_LEVEL)]
    return [page(random.Random(f"drills {number}"), known, often) for number in range(PAGES)]


def page(draw: random.Random, known: list[Item], often: list[int]) -> str:
    """`LINES` lines of all kinds."""
    kinds = draw.choices(list(SHARES), list(SHARES.values()), k=LINES)
    return "".join(draw.choices(known, often)[0].line if kind == "facts" else line(draw, kind) for kind in kinds)


def line(draw: random.Random, kind: str) -> str:
    """One line of a kind that has a rule, drawn again while it is a held-out one."""
    while True:
        if kind == "copying":
            item = copying(draw, draw.randint(1, LONGEST))
        elif kind == "sums":
            item = sums(draw, draw.choice(DIGITS))
        else:
            item = brackets(draw, draw.randint(1, DEEPEST))
        if not held_out(item):
            return item.line
