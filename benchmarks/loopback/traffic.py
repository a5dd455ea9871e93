"""Requests against a target: their texts, the check that it answers them, and the load generator's records."""

import http.client
import json
import os
import struct
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.loopback.processes import Cores, Failed, Target
from benchmarks.loopback.tools import tool

PATH = "/v1/chat/completions"
PROMPTS = 256
PROMPT_BYTES = 640
RECORD = struct.Struct("=qqqiiii")  # `struct record` of load.c
CHECK_S = 20
WORDS = ("sluice", "weir", "intake", "gauge", "spill", "draft", "rack", "gate", "flume", "crest", "surge", "head")


class Record(NamedTuple):
    """One request: times in ns, 0 being the start of the measured window."""

    due: int
    first: int
    end: int
    status: int
    events: int
    finished: int
    bytes: int


@dataclass(frozen=True)
class Load:
    """How requests come. A rate makes it an open loop; otherwise each connection waits for its answer."""

    connections: int
    seconds: float
    warm: float = 0.0
    rate: float = 0.0
    stagger_ms: float = 0.0
    stream: bool = False


@dataclass(frozen=True)
class Seen:
    """What the load generator saw; latencies are of requests that fell due after the warm-up."""

    whole: list[Record]  # all that were answered well, warm-up included
    sent: int  # warm-up included, too

    @property
    def failed(self) -> int:
        """Requests without a good answer."""
        return self.sent - len(self.whole)

    @property
    def good(self) -> list[Record]:
        """The answers after the warm-up."""
        return [r for r in self.whole if r.due >= 0]

    def latency_ms(self) -> list[float]:
        """From when a request was due to the end of its answer."""
        return [(r.end - r.due) / 1e6 for r in self.good]

    def first_ms(self) -> list[float]:
        """From when a request was due to the first event or byte of its answer."""
        return [(r.first - r.due) / 1e6 for r in self.good]

    def per_second(self) -> float:
        """Answers over the time from the first request to the last answer.

        Not those inside a window: of a slow gateway, the ones that straddle its edges are a good part of all.
        """
        return len(self.whole) / self.span_s()

    def events_per_second(self) -> float:
        """Events over the same time."""
        return sum(r.events for r in self.whole) / self.span_s()

    def span_s(self) -> float:
        """From the first request to the last answer."""
        return (max(r.end for r in self.whole) - min(r.due for r in self.whole)) / 1e9


def body(number: int, *, stream: bool) -> bytes:
    """A completion request whose prompt is its own among `PROMPTS`."""
    words = [f"{WORDS[(number * 7 + i * (number % 13 + 1)) % len(WORDS)]}{(number + i) % 97}" for i in range(120)]
    prompt = f"Reading {number}: {' '.join(words)}"[:PROMPT_BYTES]
    request: dict[str, object] = {
        "model": "mock-model",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 256,
        "temperature": 0,
    }
    if stream:
        request["stream"] = True
    return json.dumps(request, separators=(",", ":")).encode()


def drive(target: Target, load: Load, cores: Cores) -> Seen:
    """Puts `load` on `target` and returns what came of it; everything sent is awaited."""
    return finish(begin(target, load, cores), load)


def begin(target: Target, load: Load, cores: Cores) -> subprocess.Popen[bytes]:
    """Starts to put `load` on `target`."""
    head, bodies = target.tmp / "head", target.tmp / ("streams" if load.stream else "answers")
    headers = {"Host": f"127.0.0.1:{target.port}", "Content-Type": "application/json", **target.headers}
    lines = [f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    head.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    if not bodies.exists():
        bodies.write_bytes(b"".join(body(i, stream=load.stream) + b"\n" for i in range(PROMPTS)))
    gap_us = 1e6 / load.rate if load.rate else 0
    numbers = (load.connections, load.warm * 1e3, load.seconds * 1e3, gap_us, load.stagger_ms * 1e3)
    command = [str(tool("load")), str(target.port), str(head), str(bodies), *(f"{n:.0f}" for n in numbers)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        # Safe here: this program has one thread.
        preexec_fn=lambda: os.sched_setaffinity(0, {cores.load}),  # noqa: PLW1509
    )


def finish(generator: subprocess.Popen[bytes], load: Load) -> Seen:
    """Awaits everything that was sent of `load` and returns what came of it."""
    output, _ = generator.communicate()
    if generator.returncode:
        raise Failed(f"load generator ended {generator.returncode}")
    records = [Record(*fields) for fields in RECORD.iter_unpack(output)]
    good = [r for r in records if r.status == 200 and (r.finished or not load.stream)]
    return Seen(good, len(records))


def check(target: Target, *, guarded: bool) -> None:
    """Raises `Failed` unless a completion and a stream come back whole and, if `guarded`, a stranger is refused."""
    end = time.monotonic() + CHECK_S
    while True:
        try:
            _check_answers(target)
            break
        except (Failed, OSError, http.client.HTTPException) as error:
            if time.monotonic() > end:
                raise Failed(f"checked completion: {error}") from error
            time.sleep(0.3)
    if guarded:
        status, _ = _post(target, {}, stream=False)
        if status < 400:  # LiteLLM without a database says 500 here
            raise Failed(f"a request without a key was answered {status}")


def _check_answers(target: Target) -> None:
    status, text = _post(target, target.headers, stream=False)
    if status != 200 or "over the weir" not in json.loads(text)["choices"][0]["message"]["content"]:
        raise Failed(f"{status} {text[:300]!r}")
    status, text = _post(target, target.headers, stream=True)
    data = [line[5:].strip() for line in text.splitlines() if line.startswith(b"data:")]
    if status != 200 or not data or data[-1] != b"[DONE]":
        raise Failed(f"stream: {status} {text[-300:]!r}")
    words = [c["delta"].get("content") for event in data[:-1] for c in json.loads(event)["choices"]]
    if " water" not in words:
        raise Failed(f"stream: {text[:300]!r}")


def _post(target: Target, headers: Mapping[str, str], *, stream: bool) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=CHECK_S)
    try:
        connection.request("POST", PATH, body(0, stream=stream), {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
