"""lm serve as a program: real models, real answers, signals; and the openai package as its client."""

import json
import re
import signal
import subprocess
import threading
import time

import httpx
import jsonschema
import pytest
from scripted import sampled_text, started, tiny_workdir

from lm.core.errors import UserError
from lm.serve import server
from lm.tokenizer import train_tokenizer

TEXT = 'Hello you there! How are you today? I am fine. Grüße! 日本 😀 {"name": "a", "age": 12, "ok": true}\n'
HELLO = [{"role": "user", "content": "Hello you"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], vocab_size=330)


@pytest.fixture(scope="module")
def workdirs(tokenizer, tmp_path_factory):
    parent = tmp_path_factory.mktemp("runs")
    return [tiny_workdir(parent / name, tokenizer, seed=seed, context=128) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def running(workdirs, tmp_path_factory):
    """The address of a server of both models, and its process, which one test ends."""
    one, two = workdirs
    people = tmp_path_factory.mktemp("people") / "people.db"
    with started(f"--workdir={one}", f"--model=second={two}", f"--rankings={people}", "--slots=3") as (process, url):
        yield url, process


def answered(url: str, **body) -> dict:
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, **body}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_answers_are_those_of_sample_whatever_else_runs(running, workdirs):
    """Six clients at once on three slots, two models, greedy and drawn."""
    url, _ = running
    cases = [
        (name, workdir, [{"role": "user", "content": text}], temperature)
        for name, workdir in zip(("one", "second"), workdirs)
        for text, temperature in (("Hello", 0.0), ("How are you today?", 0.0), ("I am", 1.0))
    ]
    got = {}

    def ask(i, name, messages, temperature):
        choice = answered(url, model=name, messages=messages, max_tokens=30, seed=5, temperature=temperature)
        got[i] = choice["message"]["content"]

    threads = [
        threading.Thread(target=ask, args=(i, name, messages, temperature))
        for i, (name, _, messages, temperature) in enumerate(cases)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [sampled_text(workdir, messages, 30, seed=5, temperature=t) for _, workdir, messages, t in cases]
    assert [got[i] for i in range(len(cases))] == wanted and len(set(wanted)) > 3


def test_a_random_model_writes_json_of_a_schema(running):
    url, _ = running
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(3):
        choice = answered(url, response_format=form, seed=seed, max_tokens=100)
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


def test_curl(running):
    url, _ = running
    command = ["curl", "-s", "--request", "POST", "--url", f"{url}/completion"]
    command += ["--header", "Content-Type: application/json", "--data", '{"prompt": "Hello you", "n_predict": 8}']
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["tokens_predicted"] <= 8 and answer["model"] == "one"


@pytest.mark.peer
def test_the_openai_client(running, workdirs):
    """As its README calls it: models, answers, streams, log-probs, schemas, errors."""
    import openai

    url, _ = running
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["one", "second"]
    given = dict(model="second", messages=HELLO, temperature=0, max_tokens=20)
    answer = client.chat.completions.create(**given, logprobs=True, top_logprobs=3)
    wanted = sampled_text(workdirs[1], HELLO, 20)
    assert answer.choices[0].message.content == wanted and answer.usage.prompt_tokens > 2
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    streamed = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
    parts = list(streamed)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == wanted
    assert parts[-1].usage.completion_tokens == answer.usage.completion_tokens
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    written = client.chat.completions.create(model="one", messages=HELLO, response_format=form, max_tokens=100)
    jsonschema.validate(json.loads(written.choices[0].message.content), SCHEMA)
    texts = client.completions.create(model="one", prompt=["Hello", "How are"], max_tokens=5, n=2, logprobs=2, seed=1)
    assert len(texts.choices) == 4 and len(texts.choices[0].logprobs.tokens) <= 5
    extra = client.chat.completions.create(**given, extra_body={"top_k": 3, "repetition_penalty": 1.2})
    assert extra.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="there are: one, second"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="top_p is 3"):
        client.chat.completions.create(model="one", messages=HELLO, top_p=3)


def test_sigterm_finishes_what_runs_and_exits_with_0(running):
    """The last test of this server: an answer that runs is whole, a new one is refused, and the process ends."""
    url, process = running
    with httpx.Client(timeout=60) as client:
        body = {"prompt": "Hello", "max_tokens": 110, "stream": True, "n": 16, "temperature": 2.0}
        with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            refused = httpx.post(f"{url}/v1/completions", json=body)
            assert refused.status_code == 503 and "the server stops" in refused.json()["error"]["message"]
            *_, last = [line for line in lines if line]
        assert last == "data: [DONE]"
    assert process.wait(20) == 0
    assert process.stdout.read().endswith("stopped\n")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--workdir=/nowhere"], "there is no workdir /nowhere"),
        (["--workdir={one}", "--model=two"], "--model=two names no model"),
        (["--workdir={one}", "--model=one={one}"], "two models are called one"),
        (["--workdir={one}", "--slots=0"], "serve.slots is 0; it must be at least 1"),
        (["--workdir={one}", "--token=a b"], "--token holds a character"),
        (["--workdir={one}", "--port=99999"], "cannot serve at 127.0.0.1:99999"),
        (["--workdir={one}", "--seconds=0"], "serve.seconds is 0.0"),
    ],
)
def test_a_bad_option_is_one_line(workdirs, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        server.program([flag.replace("{one}", str(workdirs[0])) for flag in flags])
