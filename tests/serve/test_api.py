"""The server over HTTP, around an engine whose answers are written down: forms, streams, limits, errors, hang-ups."""

import json
import socket
import threading
import time

import httpx
import pytest
from scripted import ScriptedEngine, loaded, scripted_model, serving, tiny_workdir

from lm.data.annotations import AnnotationStore
from lm.tokenizer import train_tokenizer

TEXT = "Hello you there! How are you today? I am fine, thank you. Grüße! 日本 😀 1234567890\n"
SAID = "I am fine 😀, thank you."
HELLO = [{"role": "user", "content": "Hello you"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], vocab_size=320)


@pytest.fixture(scope="module")
def workdir(tokenizer, tmp_path_factory):
    return tiny_workdir(tmp_path_factory.mktemp("runs") / "sft", tokenizer)


class Served:
    """A running server with one scripted model, and how to ask it."""

    def __init__(self, url, api, engine, rankings):
        self.url, self.api, self.engine, self.rankings = url, api, engine, rankings

    def post(self, path="/v1/chat/completions", **body):
        given = body if "messages" in body or "chat" not in path else {"messages": HELLO, **body}
        return httpx.post(self.url + path, json=given, timeout=20)

    def streamed(self, path="/v1/chat/completions", **body) -> list[dict]:
        """The events of a stream, which must end as it should."""
        response = self.post(path, stream=True, **body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, last, rest = response.text.split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def wait_idle(self):
        limit = time.monotonic() + 10
        while self.api.open_requests and time.monotonic() < limit:
            time.sleep(0.01)
        assert self.api.open_requests == 0 and self.engine.is_idle


@pytest.fixture
def served(workdir, tokenizer, tmp_path):
    engine = ScriptedEngine(lambda request: tokenizer.encode(SAID), tokenizer.end_of_message)
    with serving([scripted_model("tiny", loaded(workdir), engine)], tmp_path / "people.db") as (url, api):
        yield Served(url, api, engine, tmp_path / "people.db")


def refused(response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) - {"room"} == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error["message"]


def test_a_chat_completion(served, tokenizer):
    answer = served.post(model="tiny", max_tokens=40, seed=7, temperature=0.5, top_k=5, min_p=0.1).json()
    [choice] = answer["choices"]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": SAID}, "stop")
    prompt = tokenizer.encode_prompts([HELLO])[0].tolist()
    count = len(tokenizer.encode(SAID)) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count
    }  # fmt: skip
    [request] = served.engine.requests
    assert (request.ids, request.seed, request.sampling.max_new) == (prompt, 7, 40)
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.min_p) == (0.5, 5, 0.1)
    assert set(request.sampling.stop) == set(tokenizer.stop_ids)


def test_a_stream_holds_whole_characters_and_adds_up(served):
    events = served.streamed(stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)
    *parts, final, usage = events
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""}
    texts = [delta["content"] for delta in deltas[1:]]
    assert "".join(texts) == SAID and "😀" in "".join(t for t in texts if "😀" in t) and "\ufffd" not in "".join(texts)
    assert final["choices"][0]["finish_reason"] == "stop" and usage["choices"] == []
    tokens = [token for part in parts[1:] for token in part["choices"][0]["logprobs"]["content"]]
    assert usage["usage"]["completion_tokens"] == len(tokens) + 1  # the stop token has no text
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == SAID
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] == -0.5 for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_never_seen(served, stream):
    """Not even its beginning, though it comes over several tokens."""
    given = dict(stop=["thank", "never"], logprobs=True)
    if stream:
        parts = [event["choices"][0] for event in served.streamed(**given)]
        text = "".join(part["delta"].get("content", "") for part in parts)
        tokens = [token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]]
    else:
        [choice] = served.post(**given).json()["choices"]
        text, tokens = choice["message"]["content"], choice["logprobs"]["content"]
    assert text == "I am fine 😀, "
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode().startswith(text.rstrip())
    assert served.engine.requests[0].stop_strings == ("thank", "never")


def test_n_choices_draw_with_seeds_of_their_own(served):
    answer = served.post(n=3, seed=2**32 - 1).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.seed for request in served.engine.requests] == [2**32 - 1, 0, 1]
    openings = [e["choices"][0]["index"] for e in served.streamed(n=2) if "role" in e["choices"][0]["delta"]]
    assert openings == [0, 1]


def test_completions(served, tokenizer):
    answer = served.post("/v1/completions", prompt=["Hello", [30, 31]], logprobs=1).json()
    assert [choice["text"] for choice in answer["choices"]] == [SAID, SAID]
    assert served.engine.requests[0].ids == [*tokenizer.start_ids, *tokenizer.encode("Hello")]
    assert served.engine.requests[1].ids == [30, 31] and served.engine.requests[0].sampling.max_new == 16
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])] and len(logprobs["top_logprobs"][0]) == 1
    parts = served.streamed("/v1/completions", prompt="Hello")
    assert "".join(part["choices"][0]["text"] for part in parts) == SAID


def test_what_llama_cpp_users_send(served):
    """The curl of llama.cpp's server README, and its stream, which has no [DONE]."""
    answer = served.post("/completion", prompt="Hello", n_predict=12, cache_prompt=True, seed=-1).json()
    assert (answer["tokens_predicted"], answer["stop"], answer["stop_type"]) == (12, True, "limit")
    assert SAID.startswith(answer["content"].rstrip("\ufffd"))
    lines = served.post("/completion", prompt="Hello", n_predict=-1, stream=True).text.split("\n\n")[:-1]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(part["content"] for part in parts) == SAID and [part["stop"] for part in parts][-1] is True
    chat = httpx.post(
        f"{served.url}/v1/chat/completions",
        headers={"Authorization": "Bearer no-key"},
        json={"messages": [{"role": "system", "content": "Be kind."}, *HELLO]},
    )
    assert chat.json()["choices"][0]["message"]["content"] == SAID


@pytest.mark.parametrize(
    "body, said",
    [
        (dict(temperature=-1), "temperature is -1; it must be a number from 0 to 100"),
        (dict(top_p="a"), "top_p is 'a'"),
        (dict(n=0), "n is 0; it must be a whole number from 1 to 16"),
        (dict(n=7), "7 answers were asked for at once, and 6 may run or wait here"),
        (dict(top_k=2**40), "top_k is 1099511627776; it must be a whole number from 0 to"),
        (dict(max_tokens=True), "max_tokens is True"),
        (dict(max_tokens=1000), "lower max_tokens to"),
        (dict(messages=[]), "messages: a conversation without messages"),
        (dict(messages=[{"role": "user"}]), "message 1 has None for content"),
        (dict(messages=[*HELLO, {"role": "assistant", "content": "x"}]), "the last must be the user's"),
        (dict(messages=[{"role": "user", "content": "Hello " * 200}]), "shorten the prompt"),
        (dict(temprature=1), "did you mean temperature?"),
        (dict(frequency_penalty=0.5), "use repetition_penalty"),
        (dict(tools=[{"type": "function", "function": {"name": "f"}}]), "shows no tools"),
        (dict(tool_choice="required"), "no call can be forced"),
        (dict(response_format={"type": "xml"}), "its type must be text, json_object or json_schema"),
        (
            dict(response_format={"type": "json_schema", "json_schema": {"schema": {"pattern": "a"}}}),
            "schema has the keyword 'pattern'",
        ),
        (dict(top_logprobs=2), "logprobs is not true"),
        (dict(stop=[""]), "none of them empty"),
    ],
)
def test_what_is_invalid_is_named(served, body, said):
    assert said in refused(served.post(**body), 400)
    assert served.engine.requests == []


def test_other_refusals(served):
    assert "there are: tiny" in refused(served.post(model="other"), 404)
    assert refused(httpx.get(f"{served.url}/v1/models/other"), 404)
    assert "not JSON" in refused(
        httpx.post(f"{served.url}/v1/completions", content="{", headers={"content-type": "application/json"}), 400
    )
    half = {"content-type": "application/json"}
    response = httpx.post(f"{served.url}/v1/completions", content='{"prompt": "\\ud800"}', headers=half)
    assert "half a character" in refused(response, 400)
    assert "10,000 bytes" in refused(served.post("/v1/completions", prompt="x" * 20_000), 413)
    assert "not 'evil.example'" in refused(httpx.get(served.url, headers={"Host": "evil.example"}), 403)
    evil = {"Origin": "http://evil.example"}
    assert "evil.example" in refused(httpx.post(f"{served.url}/rankings", headers=evil), 403)
    assert refused(httpx.post(f"{served.url}/v1/completions", content="prompt=x"), 415)
    assert refused(httpx.get(f"{served.url}/nowhere"), 404) and refused(httpx.get(f"{served.url}/completion"), 405)


def test_a_model_that_was_only_pretrained_holds_no_conversation(tokenizer, tmp_path):
    engine = ScriptedEngine(lambda request: tokenizer.encode(SAID), tokenizer.end_of_message)
    base = scripted_model("base", loaded(tiny_workdir(tmp_path / "base", tokenizer, stage="pretrain")), engine)
    with serving([base], tmp_path / "people.db") as (url, api):
        served = Served(url, api, engine, None)
        assert "use /v1/completions" in refused(served.post(), 400)
        assert served.post("/v1/completions", prompt="a").json()["choices"][0]["text"] == SAID


def test_a_full_queue_answers_at_once(served):
    """Two slots and four that may wait: the seventh is refused while the engine is busy with a step."""
    served.engine.gate.clear()
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(served.post(n=3).status_code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + 10
    while served.api.open_requests < 6 and time.monotonic() < limit:
        time.sleep(0.01)
    began = time.monotonic()
    response = served.post()
    assert "try again later" in refused(response, 429) and time.monotonic() - began < 2
    assert response.headers["retry-after"] == "1"
    served.engine.gate.set()
    for thread in threads:
        thread.join()
    assert answers == [200, 200]
    served.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(served, stream):
    served.engine._seconds = 0.05
    body = json.dumps({"messages": HELLO, "n": 2, "stream": stream}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        else:
            limit = time.monotonic() + 10
            while not served.engine.requests and time.monotonic() < limit:
                time.sleep(0.01)
    served.wait_idle()
    assert served.engine.cancelled == [0, 1]
    assert served.post().status_code == 200


def test_an_engine_that_fails_ends_its_requests_with_an_error(served):
    served.engine.fail_next = True
    assert "the engine failed: RuntimeError" in refused(served.post(), 500)
    assert served.post().status_code == 200
    served.engine.fail_next = True
    last = served.post(stream=True).text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_draining_server_refuses_and_finishes(served):
    served.api.draining = True
    assert "the server stops" in refused(served.post(), 503)
    assert httpx.get(f"{served.url}/health").status_code == 503


def test_models_health_and_metrics(served):
    served.post()
    models = httpx.get(f"{served.url}/v1/models").json()
    assert [card["id"] for card in models["data"]] == ["tiny"] and models["data"][0]["context_length"] == 64
    assert httpx.get(f"{served.url}/v1/models/tiny").json() == models["data"][0]
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    count = len(served.engine._answer(None)) + 1
    assert f'lm_generated_tokens_total{{model="tiny"}} {count}' in lines
    assert 'lm_answers_total{finish="stop",model="tiny"} 1' in lines
    assert 'lm_time_to_first_token_seconds_count{model="tiny"} 1' in lines
    assert 'lm_time_to_first_token_seconds_bucket{model="tiny",le="+Inf"} 1' in lines
    assert 'lm_engine_slots{model="tiny"} 2' in lines and "# TYPE lm_engine_slots gauge" in lines


def test_a_token_opens_all_but_health(workdir, tokenizer, tmp_path):
    engine = ScriptedEngine(lambda request: tokenizer.encode(SAID), tokenizer.end_of_message)
    models = [scripted_model("tiny", loaded(workdir), engine)]
    with serving(models, tmp_path / "people.db", token="secret", hosts=()) as (url, _):
        assert refused(httpx.get(f"{url}/v1/models"), 401) and refused(httpx.get(f"{url}/metrics"), 401)
        assert refused(httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"}), 401)
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        with httpx.Client(base_url=url) as browser:
            entered = browser.get("/?token=secret")
            assert entered.status_code == 200 and "default-src 'none'" in entered.headers["content-security-policy"]
            assert browser.get("/v1/models").status_code == 200


def test_rankings_reach_the_store_of_lm_rank(served):
    verdict = {
        "key": "k1",
        "rater": "ann",
        "messages": HELLO,
        "answers": [{"model": "tiny", "text": "one", "temperature": 0.7}, {"model": "tiny", "text": "two"}],
        "verdict": "b",
    }
    for _ in range(2):
        assert served.post("/rankings", **verdict).json() == {"recorded": "k1"}
    with AnnotationStore(served.rankings) as store:
        [ranking] = store.rankings()
    assert (ranking.prompt, ranking.responses, ranking.ranking) == (HELLO, ["one", "two"], [2, 1])
    source = {"model": "tiny", "fingerprint": "print of tiny", "sampler": {"temperature": 0.7}}
    assert list(ranking.sources) == [source, {**source, "sampler": {}}] and ranking.rater == "ann"
    assert "has judged these two answers before" in refused(served.post("/rankings", **{**verdict, "key": "k2"}), 400)
    assert served.post("/rankings/undo", rater="ann").json() == {"undone": "ann"}
    with AnnotationStore(served.rankings) as store:
        assert store.rankings() == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"verdict": "c"}, "must be one of a, b, tie"),
        ({"rater": ""}, "rater is ''"),
        ({"answers": [{"model": "other", "text": "x"}] * 2}, "give a model of this server"),
        ({"answers": []}, "must be a list of two"),
        ({"messages": []}, "without messages"),
        ({"key": 1}, "key is 1"),
        ({"more": 1}, "a verdict has the fields"),
    ],
)
def test_a_verdict_that_is_none_is_refused(served, change, said):
    verdict = {"key": "k", "rater": "ann", "messages": HELLO, "answers": [{"model": "tiny", "text": "x"}] * 2}
    assert said in refused(served.post("/rankings", **{**verdict, "verdict": "tie", **change}), 400)
    assert not served.rankings.exists()
