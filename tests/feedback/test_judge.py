"""A model or a rule as a rater: both orders are asked, nothing judged is lost, and what cannot be trusted shows.

The endpoints are real HTTP servers on this machine; the model of our own is the SFT policy of the finished run.
"""

import dataclasses
import itertools
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from runs import finished, started

from lm.core.errors import UserError
from lm.core.statistics import success_rate
from lm.data.annotations import Annotation, AnnotationStore
from lm.feedback import judge as programs
from lm.feedback.agreement import cohen_kappa
from lm.feedback.auto_rank import ranks_from_scores
from lm.model import make_model
from lm.rewards import REWARDS, llm_judge
from lm.rewards.llm_judge import (
    RUBRIC,
    JudgeChoice,
    PairQuestion,
    endpoint_judge,
    model_judge,
    pair_questions,
    pair_verdict,
    parsed_reply,
    win_counts,
)
from lm.runs.workdir import load_trained_model
from lm.tokenizer import encode_prompt

__all__ = ["finished"]

ASKED = [{"role": "user", "content": "What is a list?"}]
OLD = {"role": "assistant", "content": "yes " * 600}
NONSENSE = "As a language model, I like both."


class Endpoint:
    """A chat endpoint: `reply(first, second)` is the text it answers with, or (status, body)."""

    def __init__(self, reply):
        self.bodies, self.keys = [], []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.bodies.append(body)
                endpoint.keys.append(self.headers["Authorization"])
                shown = re.split(r"\n\n(?:Answer [AB]:\n\n|Which answer)", body["messages"][-1]["content"])
                said = reply(*shown[1:3])
                status, text = said if isinstance(said, tuple) else (200, completion(said))
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # the client was killed
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def completion(text: str | None) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def serve():
    """serve(reply) -> a running Endpoint, closed when the test ends."""
    endpoints = []

    def start(reply) -> Endpoint:
        endpoints.append(Endpoint(reply))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The seconds that a judge would have waited between attempts; none are."""
    waited = []
    monkeypatch.setattr(llm_judge, "time", SimpleNamespace(sleep=waited.append))
    return waited


def longer(first: str, second: str) -> str:
    """An honest judge: it looks at the answers alone."""
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


@pytest.fixture
def people(tmp_path):
    """A folder with ten pairs, the second response longer in six, and then three responses of lengths 1, 3 and 2.

    ann prefers the longer response of the first eight pairs and the shorter one of the last two; bob skipped one.
    """
    pairs = [["x", "xxx"] if i < 6 else ["xxx", "x"] for i in range(10)]
    with AnnotationStore(tmp_path / "people.db") as store:
        store.add_items((f"item {i}", ASKED, [f"{i}{text}" for text in pair], []) for i, pair in enumerate(pairs))
        store.add_items([("three", ASKED, ["t", "ttt", "tt"], [])])
        for i, item in enumerate(store.items()[:10]):
            longest = ranks_from_scores(np.array([len(text) for text in item.responses]))
            store.record_verdict(Annotation(f"ann {i}", item.id, "ann", longest if i < 8 else longest[::-1]))
        store.record_verdict(Annotation("bob 0", item.id, "bob", [1, 1], "skipped"))
    return tmp_path


def run(people, *flags: str) -> None:
    programs.program([f"--workdir={people}", *flags])


def verdicts_of(people, rater: str) -> dict[str, tuple[str, list[int]]]:
    with AnnotationStore(people / "people.db") as store:
        return {r.name: (r.verdict, r.ranking) for r in store.rankings() if r.rater == rater}


def printed(capsys) -> dict[str, str]:
    """The rows of the tables: first column to the others."""
    lines = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines())
    return dict(line for line in lines if len(line) == 2)


@pytest.mark.parametrize("said", ["A", "a", "A.", " A\n", "Answer: A", "[[A]]", "(A)", "**A**", "The answer is A."])
def test_kindly_understood(said):
    assert parsed_reply(said) == 1
    assert parsed_reply(re.sub(r"A\b|\ba\b", "B", said)) == 0
    assert parsed_reply(re.sub(r"A\b|\ba\b", "Tie", said)) == 0.5


@pytest.mark.parametrize("said", ["", "C", "AB", "A or B", "Answer", "A, because B is rude", "I like A", NONSENSE])
def test_strictly_understood(said):
    assert parsed_reply(said) is None


def test_verdict():
    """Both orders must say the same: P(a) is `forward`, and 1 - `backward`."""
    assert pair_verdict(1, 0) == 1 and pair_verdict(0, 1) == -1
    assert pair_verdict(1, 1) == pair_verdict(0, 0) == 0  # the first whatever it is, and the second
    assert pair_verdict(1, 0.5) == pair_verdict(0.5, 0) == pair_verdict(0.5, 0.5) == 0
    assert pair_verdict(0.8, 0.6) == 0  # 0.8 and 0.4
    assert pair_verdict(0.54, 0.48) == 0 and pair_verdict(0.54, 0.42) == 1  # means of 0.53 and 0.56, margin 0.05
    assert pair_verdict(0.54, 0.48, margin=0.01) == 1


def choices(*probabilities: float | None) -> list[JudgeChoice]:
    return [JudgeChoice(p, "") for p in probabilities]


def test_wins():
    """Of a, b, c: a beats b, a and c tie as the orders disagree, c beats b: 1.5, 0 and 1.5."""
    asked = pair_questions(ASKED, ["a", "b", "c"])
    assert [(q.first, q.second) for q in asked] == [tuple(pair) for pair in "ab ba ac ca bc cb".split()]
    assert win_counts(choices(1, 0, 1, 1, 0, 1), 3) == pytest.approx([1.5, 0, 1.5])
    assert win_counts(choices(1, 0, 1, None, 0, 1), 3) is None


def test_bias_and_consistency():
    """First in 3 of the 5 that decide; of three pairs without nonsense the first two agree, one of them on a tie."""
    said = choices(1, 0, 0.5, 0.5, 1, 1, 0, None)
    assert llm_judge.position_bias(said) == success_rate([True, False, True, True, False])
    assert llm_judge.order_consistency(said) == success_rate([True, True, False])
    assert np.isnan(llm_judge.position_bias(choices(0.5, None))).all()


def test_what_is_asked(serve):
    """The rubric, the conversation and both answers; no warmth; the key if there is one."""
    endpoint = serve(longer)
    asked = [PairQuestion([*ASKED, {"role": "assistant", "content": "Guess."}, *ASKED], "short", "longer")]
    assert list(endpoint_judge(endpoint.url, "m", "Be fair.", api_key="secret")(asked)) == [JudgeChoice(0.0, "B")]
    [body] = endpoint.bodies
    assert (body["model"], body["temperature"], endpoint.keys) == ("m", 0, ["Bearer secret"])
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be fair."}
    assert "user: What is a list?\n\nassistant: Guess.\n\nuser: What is a list?" in user["content"]
    assert user["content"].index("short") < user["content"].index("longer")


def test_choices_come_in_order_however_long_they_take(serve):
    endpoint = serve(lambda first, _: time.sleep(0.002 * int(first)) or "AB"[int(first) % 2])
    asked = [PairQuestion(ASKED, str(i), "x") for i in range(20, 0, -1)]
    assert [c.reply for c in endpoint_judge(endpoint.url, "m", requests_at_once=5)(asked)] == ["A", "B"] * 10
    assert endpoint.keys == [None] * 20


def test_an_honest_judge(serve, people, capsys):
    """It agrees with ann on 8 of 10: p_e = 0.6 * 0.8 + 0.4 * 0.2 = 0.56, so kappa = (0.8 - 0.56) / 0.44 = 0.545."""
    endpoint = serve(longer)
    run(people, f"--judge={endpoint.url}", "--model=honest")
    found = verdicts_of(people, "judge honest")
    assert len(found) == 11 and len(endpoint.bodies) == 10 * 2 + 3 * 2
    assert found["item 0"] == ("ranked", [2, 1]) and found["item 9"] == ("ranked", [1, 2])
    assert found["three"] == ("ranked", [3, 1, 2])
    shown = printed(capsys)
    assert (shown["items"], shown["pairs"], shown["ties"]) == ("11", "13", "0")
    assert shown["answers that were nonsense"] == shown["items skipped for nonsense"] == "0"
    assert shown["first answer chosen (0.5: no position bias)"].startswith("0.50 [")
    assert shown["both orders agree"].startswith("1.00 [")
    assert re.fullmatch(r"10\s+0\.80 \[0\.49, 0\.94\]\s+0\.55 \[.*\]", shown["ann"])
    assert "bob" not in shown
    assert cohen_kappa([-1] * 6 + [1] * 4, [-1] * 6 + [1] * 2 + [-1] * 2) == pytest.approx(0.24 / 0.44)

    run(people, f"--judge={endpoint.url}", "--model=honest")  # again: nothing is left to ask, and all is known
    assert len(endpoint.bodies) == 26 and printed(capsys) == {k: v for k, v in shown.items() if "judge item" not in k}


def test_a_judge_that_only_sees_the_first(serve, people, capsys):
    run(people, f"--judge={serve(lambda *_: 'A').url}", "--model=first")
    assert {tuple(ranking) for _, ranking in verdicts_of(people, "judge first").values()} == {(1, 1), (1, 1, 1)}
    shown = printed(capsys)
    assert (shown["pairs"], shown["ties"]) == ("13", "13")
    assert shown["first answer chosen (0.5: no position bias)"].startswith("1.00 [0.8")
    assert shown["both orders agree"].startswith("0.00 [")


def test_some_nonsense_skips_its_items(serve, people, capsys):
    """Nonsense for one order of item 3 and for one pair, both orders, of the item of three."""
    odd = {("3x", "3xxx"), ("t", "ttt"), ("ttt", "t")}
    endpoint = serve(lambda *pair: NONSENSE if pair in odd else longer(*pair))
    run(people, f"--judge={endpoint.url}", "--model=odd")
    found = verdicts_of(people, "judge odd")
    assert {name for name, (kind, _) in found.items() if kind == "skipped"} == {"item 3", "three"}
    shown = printed(capsys)
    assert (shown["items skipped for nonsense"], shown["answers that were nonsense"]) == ("2", "3")
    assert shown["ann"].startswith("9 ")


def test_nothing_but_nonsense(serve, people):
    endpoint = serve(lambda *_: NONSENSE)
    for _ in range(2):  # the second time nothing is asked, but it is known
        with pytest.raises(
            UserError, match=f"gave no readable verdict, such as '{NONSENSE}': all 11 items are recorded"
        ):
            run(people, f"--judge={endpoint.url}", "--model=mad")
    assert {kind for kind, _ in verdicts_of(people, "judge mad").values()} == {"skipped"}
    assert len(endpoint.bodies) == 26


def test_a_fault_that_passes_is_waited_out(serve, people, pauses):
    faults = iter([(500, "oh"), (503, "busy")])
    endpoint = serve(lambda *pair: next(faults, None) or longer(*pair))
    asked = pair_questions(ASKED, ["a", "bb"])
    assert [c.first_probability for c in endpoint_judge(endpoint.url, "m", requests_at_once=1, backoff=0.5)(asked)] == [
        0,
        1,
    ]
    assert pauses == [0, 0.5, 1.0, 0] and len(endpoint.bodies) == 4


@pytest.mark.parametrize(
    "reply, attempts, fault",
    [
        ((401, '{"error": "no\\nkey"}'), 1, r"answered 401 Unauthorized: '{\"error\": \"no.*; check --judge, --model"),
        ((404, "no such model"), 1, "answered 404 Not Found: 'no such model'"),
        ((500, "<html>\noh\n</html>"), 5, "answered 500 Internal Server Error: '<html> oh </html>'"),
        ((200, "<html>"), 5, "gave no chat completion but '<html>'"),
        ((200, '{"choices": []}'), 5, "gave no chat completion but"),
    ],
)
def test_a_fault_that_stays(serve, pauses, reply, attempts, fault):
    endpoint = serve(lambda *_: reply)
    with pytest.raises(UserError, match=fault) as error:
        list(endpoint_judge(endpoint.url, "m")([PairQuestion(ASKED, "a", "b")]))
    assert len(endpoint.bodies) == attempts and "\n" not in str(error.value)
    assert pauses == [0, 1, 2, 4, 8][:attempts]


def test_an_endpoint_that_is_not_there(serve, people, pauses):
    gone = serve(longer)
    gone.server.server_close()
    with pytest.raises(UserError, match=rf"the judge at {gone.url} cannot be reached \(.*refused\); check --judge"):
        run(people, f"--judge={gone.url}", "--model=m")
    assert verdicts_of(people, "judge m") == {}


def test_an_empty_reply_is_nonsense(serve):
    endpoint = serve(lambda *_: (200, completion(None)))
    assert list(endpoint_judge(endpoint.url, "m")([PairQuestion(ASKED, "a", "b")])) == [JudgeChoice(None, "")]


def test_a_failure_loses_nothing_that_was_judged(serve, people, capsys):
    """The tenth question fails: the items that are whole by then are kept, and not asked about again."""
    number = itertools.count()
    endpoint = serve(lambda *pair: (400, "broken") if next(number) == 9 else longer(*pair))
    with pytest.MonkeyPatch.context() as patch:
        one_by_one = lambda *args, **options: endpoint_judge(
            *args, requests_at_once=1, **options
        )  # so that the tenth is the tenth
        patch.setattr(programs, "endpoint_judge", one_by_one)
        with pytest.raises(UserError, match="answered 400"):
            run(people, f"--judge={endpoint.url}", "--model=m")
        before = verdicts_of(people, "judge m")
        kept = sum(len(ranking) * (len(ranking) - 1) for _, ranking in before.values())
        assert 8 <= kept < 10
        run(people, f"--judge={endpoint.url}", "--model=m")
    assert len(endpoint.bodies) == 10 + 26 - kept
    found = verdicts_of(people, "judge m")
    assert len(found) == 11 and before.items() <= found.items()
    assert printed(capsys)["first answer chosen (0.5: no position bias)"].startswith("0.50 [")


def test_a_kill_loses_nothing_that_was_judged(serve, people):
    """SIGKILL in the midst of it; the log is torn as well; the same command brings it to what it would have been."""
    number, gate = itertools.count(), threading.Event()
    endpoint = serve(lambda *pair: (next(number) < 16 or gate.wait(60)) and longer(*pair))  # stops at 16 of 26
    flags = [f"--judge={endpoint.url}", "--model=m"]
    with started("lm.feedback.judge", f"--workdir={people}", *flags) as process:
        deadline = time.monotonic() + 60
        while len(verdicts_of(people, "judge m")) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    gate.set()
    before = verdicts_of(people, "judge m")
    assert 2 <= len(before) < 11
    log = people / "judges" / "judge m.jsonl"
    with log.open("a") as file:
        file.write('{"item": 11, "choices": [[1.0, "é')
    run(people, *flags)
    found = verdicts_of(people, "judge m")
    assert len(found) == 11 and before.items() <= found.items()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["item"] for line in lines} == set(range(1, 12))
    assert all(choice[1:] in (["A", False], ["B", False]) for line in lines for choice in line["choices"])


def test_a_limit_and_another_rubric(serve, people, tmp_path):
    """--limit counts the items of one run; another rubric makes another rater."""
    endpoint = serve(longer)
    flags = f"--judge={endpoint.url}", "--model=m"
    run(people, *flags, "--limit=3")
    run(people, *flags, "--limit=3")
    assert len(verdicts_of(people, "judge m")) == 6
    (tmp_path / "strict.txt").write_text("Be strict.\n")
    run(people, *flags, "--limit=3", f"--rubric={tmp_path / 'strict.txt'}")
    assert len(verdicts_of(people, "judge m (strict)")) == 3
    rubrics = [body["messages"][0]["content"] for body in endpoint.bodies]
    assert rubrics == [RUBRIC] * (6 + 5 * 2) + ["Be strict."] * 6


def test_a_rule(people, capsys):
    """Its scores give the ranks; there are no orders to compare."""
    run(people, "--judge=rule")
    with AnnotationStore(people / "people.db") as store:
        found = [r for r in store.rankings() if r.rater == "rule"]
    assert len(found) == 11
    for r in found:
        assert r.ranking == ranks_from_scores(REWARDS["rule"]([{"messages": r.prompt}] * len(r.responses), r.responses))
    shown = printed(capsys)
    assert shown["items"] == "11" and "ann" in shown and "both orders agree" not in shown
    assert not (people / "judges").exists()


def test_nobody_else(tmp_path, capsys):
    with AnnotationStore(tmp_path / "people.db") as store:
        store.add_items([("one", ASKED, ["a", "b"], [])])
    run(tmp_path, "--judge=rule")
    assert "nobody else has ranked these items yet" in capsys.readouterr().out


def by_sft(finished, rubric: str, **options):
    """The SFT policy as a judge, its context widened from 64 tokens, which the bare question alone would fill."""
    trained = load_trained_model(finished / "sft", backend="cpu")
    model = make_model(dataclasses.replace(trained.model.config, context=256))
    return trained, model_judge(model, trained.params["lm"], trained.tokenizer, rubric, jit=jax.jit, **options)


def test_a_model_weighs_its_own_replies(finished):
    """P(first) = p("A<|end|>") / (p("A<|end|>") + p("B<|end|>")), whatever else is in the batch."""
    trained, ask = by_sft(finished, "", questions_at_once=4)
    tokenizer, model, lm = trained.tokenizer, trained.model, trained.params["lm"]
    short = [PairQuestion([{"role": "user", "content": "?"}], *pair) for pair in ("ab", "ba", "ac", "cb", "bb")]
    with jax.default_matmul_precision("float32"):
        found = list(ask(short))
    assert len(found) == 5 and not any(choice.is_truncated for choice in found)
    for question, choice in zip(short, found):
        ids = encode_prompt(tokenizer, llm_judge.judge_messages("", question))
        totals = []
        for letter in "AB":
            reply = [*tokenizer.encode(letter), tokenizer.end_of_message]
            row = np.array([[*ids, *reply]], np.int32)
            x = model.hidden_states(lm, row[:, :-1], np.arange(row.shape[1] - 1)[None], np.ones_like(row[:, :-1]))
            logprobs = jax.nn.log_softmax(model.logits(lm, x[:, -len(reply) :]))[0]
            totals.append(float(sum(logprobs[i, token] for i, token in enumerate(reply))))
        a, b = np.exp(np.array(totals) - max(totals))
        assert choice.first_probability == pytest.approx(a / (a + b), abs=1e-4)


def test_a_long_question_loses_its_oldest_turns(finished):
    """A conversation that does not fit is judged as its last turns are, and says so."""
    _, ask = by_sft(finished, "")
    last = [{"role": "user", "content": "?"}]
    long = [{"role": "user", "content": "an old question " * 9}, {"role": "assistant", "content": "yes " * 300}, *last]
    whole, cut = ask([PairQuestion(last, "a", "b"), PairQuestion(long, "a", "b")])
    assert (whole.is_truncated, cut.is_truncated) == (False, True) and cut.first_probability == pytest.approx(
        whole.first_probability, abs=1e-5
    )


def test_answers_that_a_judge_cannot_see_are_not_judged(finished):
    """Two that differ only in what the context has no room for: no choice, whatever else is asked with them."""
    _, ask = by_sft(finished, "", questions_at_once=2)
    last = [{"role": "user", "content": "?"}]
    whole, endless = ask([PairQuestion(last, "a", "b"), PairQuestion(last, "a " * 200, "a " * 200 + "b")])
    assert 0 <= whole.first_probability <= 1 and endless == JudgeChoice(None, llm_judge.TOO_LONG_REPLY, True)
    assert list(ask([PairQuestion(last, "a " * 200, "b")] * 3)) == [endless] * 3
    [alone] = ask([PairQuestion(last, "a", "b")])
    assert alone.first_probability == pytest.approx(whole.first_probability, abs=1e-5)


@pytest.fixture
def wide(finished, tmp_path):
    """The pipeline's last policy with a context that the rubric and short answers fit: rotary positions have no end."""
    workdir = shutil.copytree(finished / "ppo", tmp_path / "wide" / "ppo")
    for path in workdir.glob("checkpoints/*/meta/metadata"):
        record = json.loads(path.read_text())
        record["meta"]["model"]["context"] = 640
        path.write_text(json.dumps(record))
    return workdir


def test_a_model_of_ours_as_judge(wide, people, capsys):
    with AnnotationStore(people / "people.db") as store:
        store.add_items([("endless", ASKED, ["a " * 600, "b"], []), ("talk", [*ASKED, OLD, *ASKED], ["a", "b"], [])])
    run(people, f"--judge={wide}")
    found = verdicts_of(people, "judge wide/ppo")
    assert len(found) == 13 and found.pop("endless")[0] == "skipped"
    assert {kind for kind, _ in found.values()} == {"ranked"}
    shown = printed(capsys)
    assert shown["questions cut to the context"] == "2"  # those of the long conversation
    assert shown["questions whose answers do not fit it"] == "2" and shown["answers that were nonsense"] == "0"
    assert "ann" in shown


def test_a_judge_whose_context_the_rubric_fills_is_refused(finished, people):
    with pytest.raises(UserError, match=r"the judge's context is 64 tokens, but the rubric and a question without any"):
        run(people, f"--judge={finished}")
    assert verdicts_of(people, f"judge {finished.name}/ppo") == {}


@pytest.mark.parametrize(
    "flags, fault",
    [
        (["--judge=rule", "--limit=0"], "--limit is 0; it must be at least 1"),
        (["--judge=http://127.0.0.1:9/v1"], "name one with --model"),
        (["--judge=127.0.0.1:9/v1", "--model=m"], "--judge=127.0.0.1:9/v1 is no URL: begin it with http://"),
        (["--judge=rule", "--rubric=r.txt"], "--rubric is for a model, but rule is a rule"),
        (["--judge=nowhere"], "there is no workdir nowhere"),
        (
            ["--judge=http://h/v1", "--model=m", "--rubric=/none.txt"],
            "no rubric at /none.txt .No such file or directory.",
        ),
        (["--judge=http://h:x/v1", "--model=m"], "the judge at http://h:x/v1 cannot be reached .Invalid port"),
    ],
)
def test_bad_flags(people, pauses, flags, fault):
    with pytest.raises(UserError, match=fault):
        run(people, *flags)


def test_no_items(tmp_path):
    with pytest.raises(UserError, match="there is no .*people.db: rank some answers there first"):
        run(tmp_path, "--judge=rule")
    assert not list(tmp_path.iterdir())  # it was not made by asking


def test_rubrics_that_will_not_do(people, tmp_path):
    for content, fault in ((b"\xff", "is not UTF-8 text"), (b" \n", "is empty")):
        (tmp_path / "rubric.txt").write_bytes(content)
        with pytest.raises(UserError, match=fault):
            run(people, "--judge=http://h/v1", "--model=m", f"--rubric={tmp_path / 'rubric.txt'}")


def test_a_reward_model_is_no_judge(finished, people):
    with pytest.raises(UserError, match="is a reward model, which reads no rubric and writes no answer"):
        run(people, f"--judge={finished / 'reward'}")
