"""A rater made of code: looks at the real page in the system's Chromium, and clicks.

python tests/clicker.py URL RATER COUNT      prefers the longer answer
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Choose = Callable[[list[dict], list[str]], Sequence[int]]  # (messages, responses as shown) -> a rank of each, 1 is best

# What a rater sees: null once all is done.
SEEN = """() => document.getElementById("done").hidden ? {
    number: document.body.dataset.shown,
    prompt: [...document.querySelectorAll(".turn")].map(
        (turn) => ({ role: turn.querySelector("b").textContent, content: turn.querySelector("span").textContent })),
    responses: [...document.querySelectorAll(".text")].map((text) => text.textContent),
} : null"""
# Whether the page has gone on from a number, or has come to the end.
GONE_ON = """(number) => !document.getElementById("done").hidden
    || !document.getElementById("ranking").hidden && document.body.dataset.shown !== number"""


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def enter(page: Page, url: str, rater: str) -> None:
    """Opens the page and says who ranks."""
    page.goto(url)
    introduce(page, rater)


def introduce(page: Page, rater: str) -> None:
    page.get_by_label("Your name").fill(rater)
    page.get_by_role("button", name="Start").click()
    page.wait_for_function(GONE_ON, arg=None)


def rank(page: Page, ranks: Sequence[int]) -> None:
    """Clicks what is shown from best to worst. The page saves as soon as one at most has no rank."""
    tie = page.locator("#tie")
    if len(set(ranks)) == 1:
        tie.click()
        return
    worst = max(ranks)
    clicked = sorted((place for place, rank in enumerate(ranks) if rank < worst), key=lambda place: ranks[place])
    for before, place in zip([None, *clicked], clicked):
        if before is not None and ranks[before] == ranks[place]:
            tie.click()
        page.locator(".response").nth(place).click()
    if len(clicked) < len(ranks) - 1:
        page.locator("#save").click()


def rank_all(page: Page, choose: Choose, *, count: int) -> int:
    """Ranks `count` items, or all that are left, as `choose` says; returns how many were saved."""
    for saved in range(count):
        seen = page.evaluate(SEEN)
        if seen is None:
            return saved
        rank(page, choose(seen["prompt"], seen["responses"]))
        page.wait_for_function(GONE_ON, arg=seen["number"])
    return count


def click_through(url: str, rater: str, choose: Choose, *, count: int) -> int:
    """`rank_all` as this rater, in a browser of its own."""
    with chromium() as browser:
        page = browser.new_page(reduced_motion="reduce")  # a click waits until nothing moves
        enter(page, url, rater)
        return rank_all(page, choose, count=count)


if __name__ == "__main__":
    address, name, number = sys.argv[1:]
    longest = lambda prompt, responses: [1 + sum(len(r) > len(text) for r in responses) for text in responses]
    print(click_through(address, name, longest, count=int(number)), "rankings saved")
