"""Clients come, hang up and are killed at random: no slot, page, file or memory is lost, and every answer is right.

A minute, or as long as the environment variable SOAK_SECONDS says:

    SOAK_SECONDS=600 python -m pytest tests/serve/test_soak.py -m slow -s
"""

import json
import os
import random
import re
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from scripted import sampled_text, started, tiny_workdir

from lm.tokenizer import train_tokenizer

SECONDS = float(os.environ["SOAK_SECONDS"]) if "SOAK_SECONDS" in os.environ else 60.0
CLIENTS, SLOTS, QUEUE = 10, 4, 6  # more clients than slots and fewer than both: the queue is full at times
GROWTH_BYTES = 30e6  # that memory may grow by once everything has run: allocators keep some
WORDS = ("Hello", "How are you", "I am fine", "today", "you there!", "a")


def memory_bytes(pid: int) -> int:
    """What a process holds in memory now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def gauges(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics", timeout=20).text.splitlines()
    found = (re.fullmatch(r'lm_(\w+)\{model="\w+"\} (\S+)', line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


class Client(threading.Thread):
    """Does one thing after the other at random until `end`, and counts what it did."""

    def __init__(self, url: str, answers: dict, seed: int, end: float):
        super().__init__()
        self.url, self.answers, self.draw, self.end = url, answers, random.Random(seed), end
        self.counts, self.faults = {}, []

    def run(self):
        actions = [self.whole, self.stream, self.hang_up, self.half_a_request, self.invalid, self.killed, self.drawn]
        while time.monotonic() < self.end and not self.faults:
            action = self.draw.choice(actions)
            try:
                outcome = action()
            except Exception as error:
                self.faults.append(f"{action.__name__}: {error!r}")
                return
            self.counts[outcome] = self.counts[outcome] + 1 if outcome in self.counts else 1

    def body(self, **changes):
        (text, new), _ = case = self.draw.choice(list(self.answers.items()))
        messages = [{"role": "user", "content": text}]
        return {"messages": messages, "max_tokens": new, "temperature": 0, **changes}, case[1]

    def post(self, body):
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def checked(self, text: str, wanted: str) -> None:
        if text != wanted:
            self.faults.append(f"an answer is {text!r}, not {wanted!r}")

    def whole(self) -> str:
        body, wanted = self.body()
        response = self.post(body)
        if response.status_code == 429:
            return "refused"
        self.checked(response.json()["choices"][0]["message"]["content"], wanted)
        return "answered"

    def stream(self) -> str:
        body, wanted = self.body(stream=True)
        response = self.post(body)
        if response.status_code == 429:
            return "refused"
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        self.checked("".join(e["choices"][0]["delta"].get("content", "") for e in events), wanted)
        return "streamed"

    def drawn(self) -> str:
        body, _ = self.body(temperature=1, n=self.draw.randint(1, 3), top_k=self.draw.choice([0, 5]))
        form = {"type": "json_object"} if self.draw.random() < 0.3 else {"type": "text"}
        status = self.post({**body, "response_format": form}).status_code
        return {200: "drawn", 429: "refused"}[status]

    def hang_up(self) -> str:
        """Leaves at a random moment."""
        body, _ = self.body(stream=self.draw.random() < 0.5, n=self.draw.randint(1, 2))
        with self.connection(json.dumps(body).encode()) as connection:
            connection.settimeout(self.draw.random() * 0.1 + 0.001)
            try:
                connection.recv(100)
            except TimeoutError:
                pass
        return "hung up"

    def half_a_request(self) -> str:
        with self.connection(b'{"messages": ', length=500):
            time.sleep(self.draw.random() * 0.05)
        return "half a request"

    def connection(self, body: bytes, length: int = 0) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        opened = socket.create_connection((host, int(port)), timeout=20)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        opened.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
        return opened

    def invalid(self) -> str:
        body, _ = self.body(max_tokens=self.draw.choice([-1, 10_000, "x"]))
        if (status := self.post(body).status_code) != 400:
            self.faults.append(f"an invalid request got {status}")
        return "invalid"

    def killed(self) -> str:
        """A client that is a process of its own, and is killed."""
        body, _ = self.body(stream=True)
        command = ["curl", "-sN", f"{self.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
        process = subprocess.Popen([*command, json.dumps(body)], stdout=subprocess.DEVNULL)
        time.sleep(self.draw.random() * 0.2)
        process.kill()
        process.wait()
        return "killed"


def soak(url: str, answers: dict, seconds: float, seed: int) -> dict[str, int]:
    """What all clients did together. Asserts that no answer was wrong."""
    end = time.monotonic() + seconds
    clients = [Client(url, answers, seed * 1000 + i, end) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [fault for client in clients for fault in client.faults] == []
    outcomes = {outcome for client in clients for outcome in client.counts}
    return {o: sum(client.counts[o] for client in clients if o in client.counts) for o in sorted(outcomes)}


def idle_gauges(url: str) -> dict[str, float]:
    """The gauges once nothing runs or waits."""
    limit = time.monotonic() + 20
    while (now := gauges(url))["open_requests"] + now["engine_running"] + now["engine_waiting"]:
        assert time.monotonic() < limit, f"requests are still open: {now}"
        time.sleep(0.05)
    return now


@pytest.mark.slow
def test_a_minute_of_joins_cancels_and_kills(tmp_path):
    tokenizer = train_tokenizer(
        ["Hello you there! How are you today? I am fine, thank you. 1234567890\n" * 20], vocab_size=320
    )
    workdir = tiny_workdir(tmp_path / "one", tokenizer, context=128)
    answers = {
        (text, new): sampled_text(workdir, [{"role": "user", "content": text}], new)
        for text in WORDS
        for new in (20, 60)
    }
    flags = [f"--workdir={workdir}", f"--slots={SLOTS}", f"--queue={QUEUE}", f"--rankings={tmp_path}/people.db"]
    with started(*flags) as (process, url):
        soak(url, answers, max(SECONDS / 4, 8), seed=1)  # everything has run once, and allocators have what they keep
        idle_gauges(url)
        memory, files = memory_bytes(process.pid), len(os.listdir(f"/proc/{process.pid}/fd"))
        threads = len(os.listdir(f"/proc/{process.pid}/task"))
        counts = soak(url, answers, SECONDS, seed=2)
        last = idle_gauges(url)
        grown = memory_bytes(process.pid) - memory
        print(f"{SECONDS:.0f} s: {counts}; memory grew by {grown / 1e6:.1f} MB of {memory / 1e6:.0f}; {last}")
        assert last["engine_pages_used"] == 0
        assert grown < GROWTH_BYTES, f"memory grew by {grown / 1e6:.1f} MB"
        assert len(os.listdir(f"/proc/{process.pid}/fd")) <= files + 2
        assert len(os.listdir(f"/proc/{process.pid}/task")) <= threads + 2
    assert min(counts[name] for name in ("answered", "streamed", "hung up", "killed", "refused", "drawn")) > 0
