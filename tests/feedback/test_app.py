"""The ranking server: what it shows, what it records, whom it lets in; and what the verdicts say."""

import html
import json
import re

import numpy as np
import pytest
from starlette.testclient import TestClient

from lm.core.errors import UserError
from lm.data.annotations import Annotation, AnnotationStore, StoreUnavailable
from lm.data.preferences import Ranking, read_jsonl_rankings
from lm.feedback import prompt_file, results
from lm.feedback.app import COOKIE_NAME, display_order, make_app

BASE = "http://127.0.0.1:8000"
ATTACK = "</script><script>alert('1')</script><b>"


def item(number: int, count: int = 2) -> tuple:
    prompt = [{"role": "user", "content": f"prompt {number} {ATTACK}"}]
    sources = [{"model": ("sft", "ppo")[i % 2], "fingerprint": "f"} for i in range(count)]
    return f"name {number}", prompt, [f"response {i} to {number}" for i in range(count)], sources


@pytest.fixture
def store(tmp_path):
    with AnnotationStore(tmp_path / "people.db") as opened:
        opened.add_items([item(0), item(1, 4), item(2)])
        yield opened


@pytest.fixture
def client(store):
    return TestClient(make_app(store), base_url=BASE)


def said(client, key="k", ranking=(1, 2), rater="ann", **changes) -> dict:
    """A verdict on what is next."""
    shown = client.get("/next", params={"rater": rater}).json()["item"]
    return {
        "key": key,
        "item": shown["id"],
        "digest": shown["digest"],
        "rater": rater,
        "ranking": [*ranking],
        **changes,
    }


def refused(response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert "\n" not in error
    return error


def test_an_item_is_shown_without_its_sources(client, store):
    shown = client.get("/next?rater=ann").json()
    assert (shown["judged"], shown["all"]) == (0, 3)
    assert set(shown["item"]) == {"id", "digest", "prompt", "responses", "shown"}
    assert (shown["item"]["prompt"], shown["item"]["responses"]) == item(0)[1:3]
    assert "sft" not in client.get("/next?rater=ann").text


def test_a_verdict_is_recorded_once(client, store):
    details = {"axes": {"safe": [1, None]}, "flags": [["toxic"], []], "seconds": 2.5, "verdict": "ranked"}
    verdict = said(client, **details)
    for _ in range(2):
        assert client.post("/verdict", json=verdict).json() == {"recorded": "k"}
    [ranking] = store.rankings()
    assert (ranking.axes, ranking.flags, ranking.seconds) == (details["axes"], details["flags"], 2.5)
    assert ranking.shown == display_order(store.item(1), "ann")
    assert client.get("/next?rater=ann").json()["item"]["id"] == 2
    assert client.get("/next?rater=ann").json()["judged"] == 1
    assert "duplicate verdict: ann has judged item 1" in refused(
        client.post("/verdict", json={**verdict, "key": "l"}), 400
    )


def test_undo_shows_the_same_item_in_the_same_order(client):
    before = client.get("/next?rater=ann").json()
    client.post("/verdict", json=said(client))
    assert client.post("/undo", json={"rater": "ann"}).json() == before
    assert refused(client.post("/undo", json={"rater": "ann"}), 400) == "ann has no verdict to take back"


def test_the_order_is_random_and_fixed(store):
    four = store.item(2)
    orders = [display_order(four, f"rater {i}") for i in range(400)]
    assert orders == [display_order(four, f"rater {i}") for i in range(400)]
    first = np.bincount([o[0] for o in orders], minlength=4)
    assert all(60 <= count <= 140 for count in first), "100 of 400 on average; the deviation is 8.7"


def test_when_all_is_done(client):
    for number, ranking in enumerate([(1, 2), (1, 2, 3, 3), (2, 1)]):
        client.post("/verdict", json=said(client, f"k{number}", ranking))
    assert client.get("/next?rater=ann").json() == {"item": None, "judged": 3, "all": 3}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"item": 99}, "there is no item 99"),
        ({"item": "1"}, "item is '1', not a number of one"),
        ({"item": 2**70}, "not a number of one"),
        ({"digest": "x"}, "item 1 is not what was shown: the page is of another database, reload it"),
        ({"ranking": [1, 2, 3]}, "gives no rank to each of 2 texts"),
        ({"ranking": [1, None]}, "something other than whole numbers"),
        ({"ranking": "12"}, "gives no rank"),
        ({"key": ""}, "key is '', not a text"),
        ({"key": ["k"]}, "not a text of the client's own"),
        ({"rater": " "}, "a name has 1 to 64 printable characters"),
        ({"rater": "a\nb"}, "a name has 1 to 64 printable characters"),
        ({"rater": 7}, "rater is 7"),
        ({"verdict": "fine"}, "verdict is 'fine'"),
        ({"axes": [1]}, "axes is"),
        ({"flags": [["rude"], []]}, "flags is"),
        ({"shown": [0, 1]}, "not an object with the keys digest, item, key, ranking, rater and, of the others, only"),
    ],
)
def test_what_is_no_verdict(client, store, change, message):
    assert message in refused(client.post("/verdict", json={**said(client), **change}), 400)
    assert store.rankings() == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"rater": "ann", "item": NaN}'])
def test_malformed_json(client, body):
    refused(client.post("/verdict", content=body, headers={"content-type": "application/json"}), 400)


def test_paths_and_methods(client):
    assert refused(client.get("/nowhere"), 404) == "Not Found"
    assert refused(client.get("/verdict"), 405) == "Method Not Allowed"
    assert "rater is None" in refused(client.get("/next"), 400)


def test_only_named_raters(store):
    client = TestClient(make_app(store, raters=["ann", "ben"]), base_url=BASE)
    assert client.get("/next?rater=ann").status_code == 200
    assert refused(client.get("/next?rater=eve"), 403) == "rater 'eve' is not admitted here; who is: ann, ben"
    verdict = {**said(client), "rater": "eve"}
    assert "not admitted" in refused(client.post("/verdict", json=verdict), 403)
    assert "not admitted" in refused(client.post("/undo", json={"rater": "eve"}), 403)


def test_a_database_that_cannot_be_written_for_now(client, store, monkeypatch):
    def full(verdict):
        raise StoreUnavailable("cannot write people.db: database or disk is full; make room there and try again")

    verdict = said(client)
    with monkeypatch.context() as patch:
        patch.setattr(store, "record_verdict", full)
        assert "make room there" in refused(client.post("/verdict", json=verdict), 503)
    assert client.post("/verdict", json=verdict).status_code == 200


def test_every_answer_has_the_headers(client):
    nonces = set()
    for path in ("/", "/next?rater=ann", "/results", "/export", "/nowhere"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'nonce-") and "http" not in policy
        nonces.add(re.search("nonce-([^']+)", policy)[1])
    assert len(nonces) == 5


def test_the_page_is_one_file_and_its_script_the_only_one(store):
    client = TestClient(make_app(store, title=f"Title {ATTACK}", raters=["o'neil"]), base_url=BASE)
    response = client.get("/")
    page, nonce = response.text, re.search("nonce-([^']+)", response.headers["content-security-policy"])[1]
    assert re.findall("<script[^>]*>", page) == [f'<script nonce="{nonce}">']
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|url\(|innerHTML|insertAdjacent|\son\w+=["']""", page)
    setup = re.search("data-setup='([^']*)'", page)[1]
    assert json.loads(html.unescape(setup))["raters"] == ["o'neil"]
    assert ATTACK not in page and str(html.escape(ATTACK, quote=False))[:20] in page


def test_other_machines_need_the_token(store):
    client = TestClient(make_app(store, token="secret", hosts=()), base_url="http://ranker.example:8000")
    for path in ("/", "/next?rater=ann", "/results", "/export", "/?token=secre", "/?token=", "/?token=sécret"):
        assert "with its ?token=" in refused(client.get(path), 401)
    assert refused(client.post("/undo", json={"rater": "ann"}), 401)
    assert "set-cookie" not in client.get("/").headers
    entered = client.get("/?token=secret")
    assert entered.status_code == 200
    assert entered.headers["set-cookie"] == f"{COOKIE_NAME}=secret; HttpOnly; SameSite=Strict; Path=/"
    assert client.get("/next?rater=ann").status_code == 200, "the cookie does from now on"
    assert client.post("/verdict", json=said(client)).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000"])
def test_this_machine_s_own_names(client, host):
    assert client.get("/next?rater=ann", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil:80", "[", "[::1"])
def test_a_name_that_somebody_has_pointed_here(client, host):
    assert "open the address that it printed" in refused(client.get("/", headers={"host": host}), 403)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9000", "http://127.0.0.1:8000.evil"]
)
def test_another_page_cannot_send(client, store, origin):
    verdict = said(client)
    assert "may not send anything here" in refused(
        client.post("/verdict", json=verdict, headers={"origin": origin}), 403
    )
    assert store.rankings() == []
    assert client.post("/verdict", json=verdict, headers={"origin": BASE}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_cannot_send(client, kind):
    content = json.dumps(said(client))
    assert "send JSON" in refused(client.post("/verdict", content=content, headers={"content-type": kind}), 415)


def test_export_is_what_the_reward_stage_reads(client, store, tmp_path):
    client.post("/verdict", json=said(client))
    response = client.get("/export")
    assert 'filename="rankings.jsonl"' in response.headers["content-disposition"]
    (tmp_path / "rankings.jsonl").write_bytes(response.content)
    assert read_jsonl_rankings(tmp_path / "rankings.jsonl") == store.rankings()


def judged(number: int, rater: str, ranking: list[int], count: int = 2, **more) -> Ranking:
    name, prompt, responses, sources = item(number, count)
    time = f"2024-05-01T12:00:{number % 60:02}+00:00"
    return Ranking(name, prompt, responses, ranking, rater, time, **{"sources": sources, "shown": [0, 1], **more})


def test_results_by_hand():
    """Of 12 items ann prefers sft, the first, in 9 and ppo in 3; ben says the same, but of two the opposite."""
    ann = [judged(i, "ann", [1, 2] if i < 9 else [2, 1], seconds=float(i)) for i in range(12)]
    ben = [r._replace(rater="ben", ranking=r.ranking[::-1] if i < 2 else r.ranking) for i, r in enumerate(ann)]
    skipped = judged(12, "ben", [1, 1], verdict="skipped")
    bad = judged(13, "ann", [1, 1], verdict="both bad")
    tied = judged(14, "ann", [1, 1], axes={"safe": [4, None]}, flags=[["toxic"], []])
    found = results.ranking_results([*ann, *ben, skipped, bad, tied])
    first, second = found.raters
    assert (first.name, first.verdicts, first.ties, first.both_bad, first.skipped) == ("ann", 14, 1, 1, 0)
    assert (second.verdicts, second.skipped, first.seconds) == (13, 1, 5.5)
    assert first.first_shown_preferred.value == 9 / 12 and first.first_shown_chance == 0.5
    assert second.reliability.value == 10 / 12
    # Of 12 shared pairs they agree on 10; by chance on 9/12 * 7/12 + 3/12 * 5/12 = 78/144: kappa 42/66.
    assert found.kappas == {("ann", "ben"): pytest.approx(42 / 66)}
    # Nominal alpha: 24 values, 16 of 1 and 8 of -1; observed disagreement 2 * 2 / 24, expected 2 * 16 * 8 / (24 * 23).
    assert found.alpha.value == pytest.approx(1 - (4 / 24) / (256 / 552))
    assert found.alpha.low < found.alpha.value < found.alpha.high
    assert [model.name for model in found.models] == ["sft", "ppo"]
    sft, ppo = found.models
    assert sft.strength.value == pytest.approx(-ppo.strength.value) and sft.responses == 26
    # sft won 9 + 7 of 26 games and tied 2: its odds are 17 to 9.
    assert 2 * sft.strength.value == pytest.approx(np.log(17 / 9), abs=0.01)
    assert sft.axes["safe"].value == 4 and np.isnan(ppo.axes["safe"].value) and sft.flags["toxic"] == 1
    assert [one.item.name for one in found.contested] == ["name 0", "name 1"]
    assert found.contested[0].ranks == {"ann": [1, 2], "ben": [2, 1]}


def test_a_rater_s_last_verdict_on_an_item_counts():
    found = results.ranking_results([judged(0, "ann", [1, 2]), judged(0, "ann", [2, 1])])
    assert [r.ranking for r in found.rankings] == [[2, 1]]


def test_the_results_page(client, store):
    assert "Nobody has judged anything yet." in client.get("/results").text
    for i, rater in enumerate(["ann", "ben", "<i>eve</i>"]):
        for number, ranking in ((1, [1, 2]), (2, [1, 2, 3, 3 + i]), (3, [1 + i % 2, 1])):
            store.record_verdict(
                Annotation(f"{rater} {number}", number, rater, ranking, axes={"clear": [1 + i] * len(ranking)})
            )
    page = client.get("/results").text
    assert "<script" not in page and "<i>" not in page and ATTACK not in page, "all text is escaped"
    assert "&lt;i&gt;eve&lt;/i&gt;" in page and page.count("<svg") == 3
    for heading in ("The models", "The raters", "How far they agree", "Most contested", "Scores from 1 to 5"):
        assert heading in page
    assert not re.search(r"""(src|href)=["']?(http|//)""", re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))


def test_results_of_one_rater_without_sources(store):
    bare = [judged(i, "rule", [1, 2], sources=(), shown=()) for i in range(3)]
    page = results.results_page(bare, title="t")
    assert "No two models were compared." in page and "Nobody disagrees about anything." in page
    assert results.results_page([judged(0, "ann", [1, 1], verdict="skipped")], title="t")


def test_prompts_from_files(tmp_path):
    warned = []
    text = tmp_path / "p.txt"
    text.write_bytes("How are you?\n\n  Wie geht's?  \r\nHow are you?\n\xff\n".encode("latin-1"))
    found = prompt_file.read_prompts(str(text), warned.append)
    assert [c.messages for c in found] == [
        [{"role": "user", "content": "How are you?"}],
        [{"role": "user", "content": "Wie geht's?"}],
    ]
    assert warned == [f"2 of 4 lines are not valid and are left out; the first: {text}:4: a prompt that came before"]
    assert found[0].name.startswith("prompt/") and found[0].name != found[1].name

    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = tmp_path / "p.jsonl"
    lines.write_text(
        "\n".join(map(json.dumps, [{"prompt": "hi"}, {"messages": said, "name": "n"}, {"prompt": said[2:]}]))
    )
    assert [c.messages[-1]["content"] for c in prompt_file.read_prompts(str(lines), pytest.fail)] == ["hi", "c", "c"]
    assert prompt_file.read_prompts(str(lines), pytest.fail)[1][:2] == ("n", said)


@pytest.mark.parametrize(
    "line, fault",
    [
        ("{", "Expecting property name"),
        ("[1]", "not an object with a prompt or messages"),
        ('{"text": "x"}', "not an object with a prompt or messages"),
        ('{"prompt": 3}', "the prompt is neither a text nor a list of messages"),
        ('{"prompt": []}', "the prompt is neither a text nor a list of messages"),
        ('{"prompt": [{"role": "king", "content": "x"}]}', "the prompt is neither a text nor a list of messages"),
        ('{"prompt": " "}', "the prompt does not end with something that a user says"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "does not end with something that a user says"),
        ('{"prompt": "x", "name": 1}', "name is 1, not text"),
    ],
)
def test_lines_that_are_no_prompt(tmp_path, line, fault):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=f"no prompt in {path}, as {path}:1: .*{fault}"):
        prompt_file.read_prompts(str(path), pytest.fail)
    warned = []
    path.write_text(f'{line}\n{{"prompt": "one usable line works"}}\n')
    assert len(prompt_file.read_prompts(str(path), warned.append)) == 1
    assert "1 of 2 lines are not valid" in warned[0] and fault in warned[0]
