"""The chat page in a browser: the system's Chromium types and clicks on the real thing, around a scripted engine."""

import pytest
from clicker import CHROMIUM, chromium
from scripted import ScriptedEngine, loaded, scripted_model, serving, tiny_workdir

from lm.data.annotations import AnnotationStore
from lm.tokenizer import train_tokenizer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium"),
]
ATTACK = "<img src=x onerror='window.hacked = 1'>"
SAID = f"I am fine 😀 {ATTACK}"


@pytest.fixture(scope="module")
def browser():
    with chromium() as launched:
        yield launched


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"Hello you there! How are you? {SAID} 日本 1234567890\n" * 20], vocab_size=320)


@pytest.fixture(scope="module")
def workdir(tokenizer, tmp_path_factory):
    return tiny_workdir(tmp_path_factory.mktemp("runs") / "sft", tokenizer, context=128)


@pytest.fixture
def chat(browser, workdir, tokenizer, tmp_path):
    """(page, engines, store's path) of a server with models `one` and `two`; the page may ask nobody else."""
    engines = {
        name: ScriptedEngine(lambda request, name=name: tokenizer.encode(f"{SAID} {name}"), tokenizer.end_of_message)
        for name in ("one", "two")
    }
    models = [scripted_model(name, loaded(workdir), engine) for name, engine in engines.items()]
    with serving(models, tmp_path / "people.db") as (url, _), browser.new_context() as context:
        page, complaints = context.new_page(), []
        page.on("pageerror", lambda error: complaints.append(error.message))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url.startswith(url) else complaints.append(request.url))
        page.set_default_timeout(10_000)
        page.goto(url)
        yield page, engines, tmp_path / "people.db"
        assert [text for text in complaints if "Failed to load resource" not in text] == []


def say(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def answers(page) -> list[str]:
    return page.locator(".text").all_text_contents()


def prompt(tokenizer, *said: str, system: str = "") -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.encode_prompts([messages])[0].tolist()


def test_a_conversation_by_key(chat, tokenizer):
    """Send, retry, edit: each asks what is on the page, and text is text."""
    page, engines, _ = chat
    say(page, "Hello")
    page.get_by_role("button", name="Retry").wait_for()
    assert answers(page) == [f"{SAID} one"]
    assert page.evaluate("window.hacked") is None and page.locator("main img").count() == 0
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.get_by_role("button", name="Retry").wait_for()
    say(page, "How are you?")
    page.get_by_role("button", name="Retry").wait_for()
    asked = [request.ids for request in engines["one"].requests]
    assert asked[0] == asked[1] == prompt(tokenizer, "Hello")
    assert asked[2] == prompt(tokenizer, "Hello", f"{SAID} one", "How are you?")
    page.get_by_label("Message").focus()
    page.keyboard.press("ArrowUp")
    assert page.get_by_label("Message").input_value() == "How are you?"
    say(page, "Hello you")
    page.get_by_role("button", name="Retry").wait_for()
    assert engines["one"].requests[3].ids == prompt(tokenizer, "Hello", f"{SAID} one", "Hello you")
    assert page.locator(".user .said").all_text_contents() == ["Hello", "Hello you"]


def test_an_answer_streams_and_stops(chat):
    page, engines, _ = chat
    engines["one"]._seconds = 0.25
    say(page, "Hello")
    page.locator(".token").nth(2).wait_for()
    assert page.locator(".writing").count() == 1
    page.keyboard.press("Escape")
    page.get_by_text("stopped", exact=True).wait_for()
    [text] = answers(page)
    assert text and f"{SAID} one".startswith(text) and text != f"{SAID} one"
    page.wait_for_timeout(600)
    assert engines["one"].cancelled == [0] and engines["one"].is_idle


def test_settings_reach_the_request(chat, tokenizer):
    page, engines, _ = chat
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_role("slider", name="Temperature").fill("0.2")
    page.get_by_role("slider", name="Top p").fill("0.5")
    page.get_by_role("slider", name="Max tokens").fill("9")
    say(page, "Hello")
    page.get_by_text("cut off at its limit").wait_for()
    [request] = engines["one"].requests
    assert request.ids == prompt(tokenizer, "Hello", system="Be kind.")
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new, request.top_logprobs) == (0.2, 0.5, 9, 4)
    page.reload()
    assert page.get_by_label("System prompt").input_value() == "Be kind."


def test_a_long_conversation_loses_its_oldest_exchanges(chat, tokenizer):
    page, engines, _ = chat
    for text in ("Hello you there! " * 3, "How are you?", "Hello"):
        say(page, text)
        page.get_by_role("button", name="Retry").wait_for()
    assert page.get_by_text("its oldest exchanges are left out").is_visible()
    last = engines["one"].requests[-1]
    assert last.ids == prompt(tokenizer, "How are you?", f"{SAID} one", "Hello") or last.ids == prompt(
        tokenizer, "Hello"
    )


def test_two_models_are_compared_and_the_verdict_is_in_the_store(chat):
    page, _, path = chat
    page.get_by_label("Compare two models").check()
    page.get_by_label("Your name").fill("ann")
    say(page, "Hello")
    better = page.get_by_role("button", name="B is better")
    better.wait_for()
    names = page.locator(".who span:first-child").all_text_contents()
    assert names == ["A", "B"] and sorted(answers(page)) == [f"{SAID} one", f"{SAID} two"]
    page.keyboard.press("b")
    page.get_by_role("button", name="Undo verdict").wait_for()
    names = page.locator(".who span:first-child").all_text_contents()
    models = [name.split(" · ")[1] for name in names]
    with AnnotationStore(path) as store:
        [ranking] = store.rankings()
        assert (ranking.rater, ranking.ranking, ranking.responses) == ("ann", [2, 1], answers(page))
        assert [source["model"] for source in ranking.sources] == models
        assert ranking.prompt == [{"role": "user", "content": "Hello"}]
        page.keyboard.press("Escape")
        page.keyboard.press("u")
        better.wait_for()
        assert store.rankings() == []
        page.keyboard.press("t")
        page.get_by_role("button", name="Undo verdict").wait_for()
        assert [ranking.ranking for ranking in store.rankings()] == [[1, 1]]


def test_each_token_shows_its_probability(chat):
    """By the mouse, and by the arrow keys; exp(-0.5) is 61 %."""
    page, _, _ = chat
    say(page, "Hello")
    page.get_by_role("button", name="Retry").wait_for()
    tip = page.locator("#tip")
    page.locator(".token").nth(1).hover()
    assert "61 %" in tip.text_content() and page.locator("#tip tr").count() >= 2
    page.mouse.move(5, 5)
    assert tip.is_hidden()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    assert tip.is_visible() and page.locator(".token.at").text_content() == page.locator(".token").first.text_content()
    page.keyboard.press("p")
    assert page.locator(".heated .token").count() > 3


def test_errors_are_said(chat):
    page, engines, _ = chat
    engines["one"].fail_next = True
    say(page, "Hello")
    page.locator(".text", has_text="the engine failed: RuntimeError").wait_for()
    page.get_by_role("button", name="Retry").click()
    page.locator(".text", has_text=SAID).wait_for()


@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_its_window(chat, width):
    page, _, _ = chat
    page.set_viewport_size({"width": width, "height": 800})
    if page.get_by_label("Compare two models").is_hidden():
        page.get_by_role("button", name="Settings").click()
    page.get_by_label("Compare two models").check()
    if width == 390:
        page.get_by_role("button", name="Settings").click()
    say(page, "Hello " * 20)
    page.get_by_role("button", name="A is better").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    left, right = (page.locator(".side").nth(i).bounding_box() for i in (0, 1))
    assert (left["y"] == right["y"]) == (width == 1200)
    box = page.get_by_role("button", name="Send").bounding_box()
    assert box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800
