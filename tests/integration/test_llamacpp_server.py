"""The real engine in a child process, and our reading of its answers against its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from core.chat import Endpoint
from engines.drivers.llamacpp_answers import AnswerAssembler
from engines.drivers.llamacpp_requests import Plan, edit_request
from engines.drivers.llamacpp_server import slot_files
from engines.models import fetch

KEY = "test-key"
USER = {"role": "user", "content": "What is the weather in Paris?"}
CHAT = {"messages": [USER], "max_tokens": 6, "temperature": 0}
TEXT = {"prompt": "Count: 1, 2,", "max_tokens": 4, "temperature": 0}
PREFILLED = [{"role": "user", "content": "Count: 1, 2, 3"}, {"role": "assistant", "content": "1, 2, 3,"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells the {name} of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/City"}},
                "required": ["city"],
                "$defs": {"City": {"type": "string", "maxLength": 12}},
            },
        },
    }
    for name in ("weather", "time")
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(model: Path, port: int, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "engines.drivers.llamacpp_server", "--model", str(model), "--port", str(port),
        "--threads", "1", "--alias", "smol", *more,
    ]  # fmt: skip


class Server:
    def __init__(self, model: Path, *more: str) -> None:
        self.base = f"http://127.0.0.1:{free_port()}"
        argv = command(model, int(self.base.rsplit(":", 1)[1]), *more)
        environment = os.environ | {"FOREBAY_WORKER_KEY": KEY}
        self.process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=environment)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.ask("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.process.poll()}")

    def ask(self, path: str, body: object = None, *, key: str | None = KEY) -> tuple[int, bytes]:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.base + path, data, headers), timeout=60) as response:
                return response.status, response.read()
        except HTTPError as error:
            with error:
                return error.code, error.read()

    def answer(self, endpoint: Endpoint, body: dict[str, Any], *, stream: bool = False) -> tuple[bytes, Plan]:
        """Return what a client of ours gets."""
        sent, plan = edit_request(endpoint, body, stream=stream)
        status, raw = self.ask(endpoint, sent)
        assert status == 200, raw
        assembler = AnswerAssembler(plan)
        out = assembler.feed(raw)
        return (assembler.whole() if plan.whole else out), plan

    def stop(self) -> float:
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)
        return time.monotonic() - started


@pytest.fixture(scope="module")
def model() -> Path:
    return fetch("smollm2", Path.home() / ".cache/forebay/models")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    running = Server(model, "--embeddings", "--slot-files", "1")
    try:
        running.wait_ready()
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def events_of(frames: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in frames.split(b"\n") if line.startswith(b"data: {")]


# --- the process


def test_every_endpoint_but_health_wants_the_key(server: Server) -> None:
    assert server.ask("/health", key=None)[0] == 200
    for path in ("/v1/models", "/props", "/slots", "/metrics"):
        assert server.ask(path, key=None)[0] == 401
        assert server.ask(path)[0] == 200
    assert server.ask("/v1/chat/completions", CHAT, key="wrong")[0] == 401


def test_each_slot_has_the_context_it_was_promised(server: Server) -> None:
    slots = json.loads(server.ask("/slots")[1])
    assert [slot["n_ctx"] for slot in slots] == [2048] * 4
    assert json.loads(server.ask("/v1/models")[1])["data"][0]["id"] == "smol"


def test_slots_can_be_saved_and_restored(server: Server) -> None:
    server.ask("/v1/completions", TEXT | {"id_slot": 0})
    (file,) = slot_files(1)
    saved = json.loads(server.ask("/slots/0?action=save", {"filename": file})[1])
    restored = json.loads(server.ask("/slots/1?action=restore", {"filename": file})[1])
    assert saved["n_saved"] == restored["n_restored"] > 0


def test_one_server_answers_chats_and_embeddings(server: Server) -> None:
    status, body = server.ask("/v1/embeddings", {"input": ["hello there", "x"]})
    assert status == 200
    assert [len(row["embedding"]) for row in json.loads(body)["data"]] == [576, 576]


def test_a_busy_server_stops_at_once_on_sigterm(model: Path) -> None:
    running = Server(model)
    running.wait_ready()
    body = json.dumps({"prompt": "a b " * 900, "max_tokens": 500, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(running.base.rsplit(":", 1)[1]))) as client:
        client.sendall(head.encode() + body)
        time.sleep(0.3)
        assert running.stop() < 0.5
    assert running.process.returncode == 0


def test_what_cannot_start_says_why_in_one_line(model: Path, server: Server, tmp_path: Path) -> None:
    text = tmp_path / "a.gguf"
    text.write_text("not a model")
    used = int(server.base.rsplit(":", 1)[1])
    attempts = {
        f"{text} is not a GGUF file": command(text, free_port()),
        "cannot read the model /nowhere: No such file or directory": command(Path("/nowhere"), free_port()),
        f"cannot listen on 127.0.0.1:{used}": command(model, used),
        "--slots must be at least 1": command(model, free_port(), "--slots", "0"),
    }
    for words, argv in attempts.items():
        outcome = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
        assert outcome.returncode == 2
        assert outcome.stderr.startswith(f"llamacpp_server: {words}")
        assert outcome.stderr.count("\n") == 1


# --- whole answers, put together by us, against the engine's own

_VOLATILE = {
    "id", "created", "created_at", "completed_at", "timings", "prompt_tokens_details", "input_tokens_details",
    "cache_read_input_tokens", "input_tokens",
}  # fmt: skip


def comparable(tree: Any) -> Any:
    """Return the tree with values that differ from run to run (ids, times, cached counts) hidden."""
    if isinstance(tree, dict):
        return {key: "…" if key in _VOLATILE else comparable(value) for key, value in tree.items()}
    return [comparable(item) for item in tree] if isinstance(tree, list) else tree


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.CHAT, CHAT),
        (Endpoint.CHAT, CHAT | {"logprobs": True, "top_logprobs": 2}),
        (Endpoint.CHAT, CHAT | {"stop": ["Paris"]}),
        (Endpoint.CHAT, CHAT | {"response_format": {"type": "json_object"}, "max_tokens": 12}),
        (Endpoint.CHAT, CHAT | {"grammar": 'root ::= "é😀" [a-z]{2}', "max_tokens": 12}),
        (Endpoint.CHAT, CHAT | {"tools": TOOLS}),
        (Endpoint.COMPLETIONS, TEXT),
        (Endpoint.COMPLETIONS, TEXT | {"logprobs": 2}),
        (Endpoint.COMPLETIONS, TEXT | {"stop": [","]}),
        (Endpoint.COMPLETIONS, TEXT | {"prompt": [1, 2, 3]}),
        (Endpoint.COMPLETIONS, TEXT | {"prompt": ["only one"]}),
        (Endpoint.RESPONSES, {"input": "Say hi", "max_output_tokens": 4, "temperature": 0}),
        (Endpoint.MESSAGES, CHAT),
        (Endpoint.MESSAGES, CHAT | {"stop_sequences": ["City"]}),
        (Endpoint.MESSAGES, CHAT | {"stop_sequences": ["Paris"]}),
    ],
)
def test_a_whole_answer_equals_the_engines_own(server: Server, endpoint: Endpoint, body: dict[str, Any]) -> None:
    ours, _ = server.answer(endpoint, body)
    assert comparable(json.loads(ours)) == comparable(json.loads(server.ask(endpoint, body)[1]))


@pytest.mark.parametrize(
    ("endpoint", "body", "completion", "prompts"),
    [
        (Endpoint.CHAT, CHAT | {"n": 2, "logprobs": True}, 12, 1),
        (Endpoint.COMPLETIONS, TEXT | {"n": 2}, 8, 1),
        (Endpoint.COMPLETIONS, TEXT | {"prompt": ["1 2 3", "1 2 3"]}, 8, 2),
        (Endpoint.COMPLETIONS, TEXT | {"prompt": [[1, 2], [1, 2]], "n": 2}, 16, 2),
    ],
)
def test_several_choices_equal_the_engines_own_and_all_are_counted(
    server: Server, endpoint: Endpoint, body: dict[str, Any], completion: int, prompts: int
) -> None:
    ours = json.loads(server.answer(endpoint, body)[0])
    native = json.loads(server.ask(endpoint, body)[1])
    prompt = native["usage"]["prompt_tokens"] * prompts
    counted = {"completion_tokens": completion, "prompt_tokens": prompt, "total_tokens": completion + prompt}
    assert ours["usage"].items() >= counted.items()
    assert comparable(ours | {"usage": 0}) == comparable(native | {"usage": 0})
    frames, _ = server.answer(endpoint, body, stream=True)
    usages = [event["usage"] for event in events_of(frames) if "usage" in event]
    assert len(usages) == 1
    assert usages[0].items() >= counted.items()


def test_the_engine_itself_counts_one_choice_of_several(server: Server) -> None:
    usage = json.loads(server.ask("/v1/completions", TEXT | {"n": 2})[1])["usage"]
    assert usage["completion_tokens"] == 4


# --- prefill


def test_streams_continue_a_prefill_and_the_engines_whole_answers_repeat_it(server: Server) -> None:
    body = CHAT | {"messages": PREFILLED}
    native = json.loads(server.ask("/v1/chat/completions", body)[1])["choices"][0]["message"]["content"]
    ours = json.loads(server.answer(Endpoint.CHAT, body)[0])["choices"][0]["message"]["content"]
    assert ours == " 4, 5,"
    assert native == "1, 2, 3," + ours
    frames, plan = server.answer(Endpoint.CHAT, body, stream=True)
    assert plan.passthrough
    assert "".join(c["delta"].get("content") or "" for e in events_of(frames) for c in e["choices"]) == ours


def test_no_event_of_a_response_repeats_the_prefill(server: Server) -> None:
    body = {"input": PREFILLED, "max_output_tokens": 6, "temperature": 0}
    raw = server.ask("/v1/responses", edit_request(Endpoint.RESPONSES, body, stream=True)[0])[1]
    assert b"1, 2, 3, 4" in raw
    frames, _ = server.answer(Endpoint.RESPONSES, body, stream=True)
    assert b"1, 2, 3" not in frames
    whole = json.loads(server.answer(Endpoint.RESPONSES, body)[0])
    assert whole["output"][0]["content"][0]["text"] == " 4, 5,"


def test_a_prefilled_message_is_continued(server: Server) -> None:
    whole = json.loads(server.answer(Endpoint.MESSAGES, CHAT | {"messages": PREFILLED})[0])
    assert whole["content"] == [{"type": "text", "text": " 4, 5,"}]


# --- tools


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "time"}), ({"type": "function", "function": {"name": "time"}}, {"time"})],
)
def test_a_demanded_tool_is_called(server: Server, choice: object, names: set[str], stream: bool) -> None:
    body = CHAT | {"tools": TOOLS, "tool_choice": choice, "max_tokens": 60}
    answer, _ = server.answer(Endpoint.CHAT, body, stream=stream)
    if stream:
        events = events_of(answer)
        finish = [c["finish_reason"] for e in events for c in e["choices"]]
        calls = [call for e in events for c in e["choices"] for call in c["delta"].get("tool_calls", [])]
    else:
        choices = json.loads(answer)["choices"]
        finish, calls = [choices[0]["finish_reason"]], choices[0]["message"]["tool_calls"]
    assert finish[-1] == "tool_calls"
    assert len(calls) == 1
    assert calls[0]["function"]["name"] in names
    assert json.loads(calls[0]["function"]["arguments"]).keys() == {"city"}


def test_the_engine_itself_does_not_enforce_tools(server: Server) -> None:
    answer = json.loads(server.ask("/v1/chat/completions", CHAT | {"tools": TOOLS, "tool_choice": "required"})[1])
    assert "tool_calls" not in answer["choices"][0]["message"]


# --- what the engine does on its own


def test_a_prompt_that_is_too_long_is_a_400_unless_it_is_one_of_several(server: Server) -> None:
    long = "hello " * 2100
    status, body = server.ask("/v1/completions", TEXT | {"prompt": long, "stream": True})
    assert (status, json.loads(body)["error"]["type"]) == (400, "exceed_context_size_error")
    status, body = server.ask("/v1/completions", TEXT | {"prompt": ["a", long], "id_slot": 0, "stream": True})
    assert status == 200
    assert events_of(body)[-1]["error"]["type"] == "exceed_context_size_error"
    assert b"[DONE]" not in body


def test_an_embedding_longer_than_a_batch_is_refused(server: Server) -> None:
    status, body = server.ask("/v1/embeddings", {"input": "hello " * 300})
    assert status == 500
    assert "too large to process" in json.loads(body)["error"]["message"]
