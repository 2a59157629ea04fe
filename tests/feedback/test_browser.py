"""The ranking page in a browser: the system's Chromium clicks and types on the real thing."""

import contextlib
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from clicker import CHROMIUM, GONE_ON, chromium, enter, introduce, rank, rank_all
from runs import EXPERIMENTS, finished, small, started

from lm.core.config import load_config
from lm.data.annotations import AnnotationStore, StoreUnavailable, read_rankings
from lm.feedback import rank as program
from lm.feedback.app import make_app
from lm.train import loop

__all__ = ["finished", "small"]

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium")
ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture
def page(browser):
    """A page of a rater's own; whatever the browser complains about fails the test."""
    with browser.new_context(reduced_motion="reduce") as context:
        opened, complaints = context.new_page(), []
        opened.on("pageerror", lambda error: complaints.append(error.message))
        opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        opened.set_default_timeout(10_000)
        yield opened
        assert [text for text in complaints if "Failed to load resource" not in text] == []


@pytest.fixture
def store(tmp_path):
    """Two items of two responses, one of four."""
    with AnnotationStore(tmp_path / "people.db") as opened:
        for number, count in enumerate((2, 4, 2)):
            prompt = [{"role": "user", "content": f"prompt {number} {ATTACK}"}]
            opened.add_items([(f"n{number}", prompt, [f"answer {i} {ATTACK}" for i in range(count)], [])])
        yield opened


@contextlib.contextmanager
def served(store, **options):
    """The address of a server in a thread of this process."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(make_app(store, **options), log_config=None, log_level="warning", lifespan="off")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def press(page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def moved_on(page, action) -> None:
    """Does `action`, and waits for the next item."""
    number = page.evaluate("document.body.dataset.shown")
    action()
    page.wait_for_function(GONE_ON, arg=number)


def as_shown(ranking) -> list[int]:
    """The ranks in the order in which the rater saw the responses."""
    return [ranking.ranking[response] for response in ranking.shown]


def test_text_is_text(page, store):
    with served(store) as url:
        enter(page, url, "ann")
        assert page.locator(".turn.last span").text_content() == f"prompt 0 {ATTACK}"
        assert sorted(page.locator(".text").all_text_contents()) == [f"answer {i} {ATTACK}" for i in range(2)]
        assert page.evaluate("window.hacked") is None
        assert page.locator("main img, main script").count() == 0


def test_four_by_key(page, store):
    """Best to worst, a tie, a choice taken back; the last one gets the rank that is left, and that saves."""
    with served(store) as url:
        enter(page, url, "ann")
        moved_on(page, lambda: press(page, "1"))
        press(page, "3", "2", "2", "=", "4")
        assert page.locator(".rank").all_text_contents() == ["", "", "1st", "1st"]
        moved_on(page, lambda: press(page, "1"))
        moved_on(page, lambda: press(page, "b"))
        assert page.get_by_text("All done. Thank you!").is_visible()
        two, four, bad = store.rankings()
        assert (as_shown(two), as_shown(four), bad.verdict) == ([1, 2], [3, 4, 1, 1], "both bad")
        assert 0 < two.seconds < 10


def test_every_kind_of_ranking_can_be_clicked(page, tmp_path):
    kinds = [[1, 1, 1, 1], [1, 2, 2, 2], [2, 1, 2, 4], [1, 1, 3, 3], [4, 3, 2, 1], [1, 3, 3, 1]]
    with AnnotationStore(tmp_path / "people.db") as store:
        store.add_items((f"n{i}", [{"role": "user", "content": f"{i}"}], list("abcd"), []) for i in range(len(kinds)))
        with served(store) as url:
            enter(page, url, "ann")
            for ranks in kinds:
                moved_on(page, lambda: rank(page, ranks))
        found = [as_shown(ranking) for ranking in store.rankings()]
    assert found == [[1 + sum(other < one for other in ranks) for one in ranks] for ranks in kinds]


def test_details(page, store):
    """While they are open nothing is saved before Enter, and the page remembers that they are."""
    with served(store) as url:
        enter(page, url, "ann")
        press(page, "d")
        second = page.get_by_role("group", name="Details of answer 2")
        second.get_by_label("helpful 4 of 5").click()
        second.get_by_label("clear 2 of 5").click()
        second.get_by_label("clear 2 of 5").click()
        second.get_by_role("button", name="low quality").click()
        press(page, "2")
        assert page.get_by_role("button", name=re.compile("Answer 2, ranked 1st")).is_visible()
        assert store.rankings() == []
        moved_on(page, lambda: press(page, "Enter"))
        [ranking] = store.rankings()
        last = ranking.shown[1]
        assert as_shown(ranking) == [2, 1]
        assert (ranking.axes["helpful"][last], list(ranking.axes)) == (4, ["helpful"])
        assert ranking.flags[last] == ["low quality"] and ranking.flags[ranking.shown[0]] == []
        page.reload()
        page.wait_for_function(GONE_ON, arg=None)
        assert page.locator(".details").first.is_visible()


def test_undo_skip_and_help(page, store):
    with served(store) as url:
        enter(page, url, "ann")
        before = page.locator(".text").all_text_contents()
        moved_on(page, lambda: press(page, "s"))
        moved_on(page, lambda: press(page, "u"))
        assert page.locator(".text").all_text_contents() == before
        assert store.rankings() == []
        press(page, "u")
        page.get_by_text("ann has no verdict to take back").wait_for()
        press(page, "?")
        assert page.get_by_role("dialog", name="Keys").is_visible()
        press(page, "1", "Escape")
        assert store.rankings() == [], "keys are for the dialog while it is open"
        moved_on(page, lambda: press(page, "="))
        assert as_shown(store.rankings()[0]) == [1, 1]


def test_a_double_click_is_one_verdict(page, store):
    with served(store) as url:
        enter(page, url, "ann")
        moved_on(page, lambda: page.locator(".response").first.dblclick())
        page.wait_for_timeout(100)
        assert len(store.rankings()) == 1


def test_a_full_disk_for_a_while(page, store, monkeypatch):
    record, refusals = store.record_verdict, []

    def full(verdict):
        if not refusals:
            refusals.append(verdict)
            raise StoreUnavailable("cannot write people.db: database or disk is full; make room there and try again")
        record(verdict)

    monkeypatch.setattr(store, "record_verdict", full)
    with served(store) as url:
        enter(page, url, "ann")
        page.locator(".response").first.click()
        page.get_by_text("disk is full; make room there and try again Your verdict is kept in this browser").wait_for()
        assert store.rankings() == []
        page.wait_for_function(GONE_ON, arg="1")
        assert len(store.rankings()) == 1 and not page.locator("#notice").is_visible()


def test_named_raters_and_a_token(page, store):
    with served(store, raters=["ann", "ben"], token="secret", hosts=()) as url:
        page.goto(f"{url}?token=secret")
        page.get_by_role("button", name="ben").click()
        page.wait_for_function(GONE_ON, arg=None)
        assert page.url == url, "the token does not stay in the address"
        moved_on(page, lambda: press(page, "1"))
        assert store.rankings()[0].rater == "ben"


def test_on_a_phone(browser, store):
    """Responses are stacked, nothing is wider than the screen, and a thumb hits every button."""
    store.set_priorities({2: 1.0})
    with (
        served(store) as url,
        browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, reduced_motion="reduce") as context,
    ):
        page = context.new_page()
        enter(page, url, "ann")
        page.locator("#details").tap()
        boxes = [card.bounding_box() for card in page.locator(".response").all()]
        assert all(above["y"] + above["height"] <= below["y"] for above, below in zip(boxes, boxes[1:]))
        buttons = [b.bounding_box() for b in page.locator("main button, footer button").all() if b.is_visible()]
        assert len(buttons) > 60 and all(box["height"] >= 44 for box in buttons)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.goto(f"{url}results")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def serving(*flags: str):
    """The program in a process of its own, once it serves."""
    process = started("lm.feedback.rank", *flags)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("rank at "):
            return process
    raise AssertionError("".join(said) + process.stderr.read())


def test_from_clicks_to_a_reward_model(page, finished, small, tmp_path):
    """The whole way: a model answers, somebody clicks, the server dies meanwhile, and a reward model learns from it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("<script>window.hacked = 1</script>\n" + "".join(f"the text item {i}?\n" for i in range(31)))
    workdir, port = tmp_path / "people", free_port()
    flags = [f"--workdir={workdir}", f"--port={port}"]
    asking = [f"--prompts={prompts}", f"--models={finished}/sft", "--max_new_tokens=8"]
    server = serving(*flags, *asking)
    enter(page, f"http://127.0.0.1:{port}/", "ann")
    total = int(page.locator("#counts").text_content().split()[-1])
    assert page.locator(".turn span").text_content() == "<script>window.hacked = 1</script>"
    moved_on(page, lambda: page.locator(".response").nth(1).click())
    moved_on(page, lambda: press(page, "1"))
    threading.Timer(0.4, server.kill).start()
    deadline = time.monotonic() + 30
    while not page.locator("#notice").is_visible():
        assert time.monotonic() < deadline
        press(page, "1")
    notice, kept = page.locator("#notice").text_content(), len(page.evaluate("JSON.parse(localStorage.outbox)"))
    assert "The server does not answer." in notice
    assert ("Your verdict is kept in this browser" in notice) == bool(kept), "unless the server knew of it already"
    server.communicate()
    acknowledged = int(page.locator("#counts").text_content().split()[0])
    assert acknowledged <= len(read_rankings(workdir / program.PEOPLE_DB)) <= acknowledged + 1
    server = serving(*flags)  # what the models have answered is there
    page.wait_for_function("() => document.getElementById('notice').hidden")
    after = int(page.locator("#counts").text_content().split()[0])
    assert after == acknowledged + 1 == len(read_rankings(workdir / program.PEOPLE_DB)), "each verdict once"
    longest = lambda prompt, texts: [1 + sum(len(other) > len(text) for other in texts) for text in texts]
    page.locator("#rater").click()
    introduce(page, "ben")
    assert rank_all(page, longest, count=total + 1) == total
    page.goto(f"http://127.0.0.1:{port}/results")
    assert page.get_by_role("heading", name="How far they agree").is_visible()
    server.send_signal(signal.SIGTERM)
    said, errors = server.communicate(timeout=20)
    assert (server.returncode, errors) == (0, "")
    assert f"stopped: {after + total} verdicts in {workdir}/people.db" in said
    learn_from(workdir, finished, tmp_path)


def learn_from(workdir: Path, finished: Path, folder: Path) -> None:
    """Exports the verdicts, trains on the file and on the database, and finds the same."""
    program.program([f"--workdir={workdir}", f"--export={folder / 'rankings.jsonl'}"])
    losses = []
    for source in (folder / "rankings.jsonl", workdir / program.PEOPLE_DB):
        overrides = [f"init_from={finished}/sft", f"data.rankings={source}", "data.held_out=0.3"]
        config = load_config(f"{EXPERIMENTS / 'reward.py'}:tiny", overrides)
        losses.append(loop.train_stage(config, folder / f"reward {source.suffix}")["held_out"]["loss"])
    assert losses[0] == losses[1]
