"""Record what a running vLLM answers: `python tests/vllm/record.py PORT MODEL_NAME`, writes recordings/.

`NAME.json` has the request and the answer; where the answer is a stream its raw bytes are in `NAME.sse`. The server of
the kept recordings ran as `vllm serve MODEL --served-model-name smol --dtype bfloat16 --enforce-eager --block-size 32
--max-model-len 2048 --max-num-seqs 16 --enable-prompt-tokens-details --scheduling-policy priority
--enable-auto-tool-choice --tool-call-parser hermes`. `error_queue_full*` (a second server, `--max-num-queued-reqs 1`,
one request running), `*engine_died*` (SIGKILL of the worker process) and `*special_ids*` (`--load-format dummy`, with
`logit_bias` for special tokens and for bytes that are no characters) were taken by hand.
"""

import http.client
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "recordings"
KEPT_HEADERS = ("content-type", "x-request-id", "transfer-encoding")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK = [{"role": "user", "content": "Say hello."}]
LONG = [{"role": "user", "content": "word " * 3000}]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def requests(model: str) -> dict[str, tuple[str, dict[str, Any] | None]]:
    """Return what to ask, by name of the recording; no body means GET."""
    common: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
    chat: dict[str, Any] = {**common, "messages": ASK}
    respond: dict[str, Any] = {"model": model, "max_output_tokens": 8, "temperature": 0, "input": "Say hello."}
    path = "/v1/chat/completions"
    return {
        "chat": (path, chat),
        "chat_again_cached": (path, {**chat, "messages": [{"role": "user", "content": "Count: " + "1 2 3 4 5 " * 12}]}),
        "chat_again_cached_hit": (
            path,
            {**chat, "messages": [{"role": "user", "content": "Count: " + "1 2 3 4 5 " * 12}]},
        ),
        "chat_stream_usage": (path, {**chat, **USAGE}),
        "chat_stream_plain": (path, {**chat, "stream": True}),
        "chat_stream_continuous_usage": (
            path,
            {**chat, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ),
        "chat_stream_token_ids": (path, {**chat, **USAGE, "return_token_ids": True}),
        "chat_token_ids": (path, {**chat, "return_token_ids": True}),
        "chat_stream_logprobs": (path, {**chat, **USAGE, "max_tokens": 3, "logprobs": True, "top_logprobs": 1}),
        "chat_stream_stop": (path, {**chat, **USAGE, "stop": ["!"]}),
        "chat_tools_auto": (path, {**chat, "tools": [WEATHER]}),
        "chat_tools_named": (
            path,
            {
                **chat,
                "max_tokens": 48,
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            },
        ),
        "chat_stream_tools_required": (
            path,
            {**chat, **USAGE, "max_tokens": 48, "tools": [WEATHER], "tool_choice": "required"},
        ),
        "chat_stream_tools_named": (
            path,
            {
                **chat,
                **USAGE,
                "max_tokens": 48,
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            },
        ),
        "chat_json_schema": (
            path,
            {
                **chat,
                "max_tokens": 48,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "a",
                        "schema": {
                            "type": "object",
                            "properties": {"ok": {"type": "boolean"}},
                            "required": ["ok"],
                            "additionalProperties": False,
                        },
                    },
                },
            },
        ),
        "chat_n2": (path, {**chat, "n": 2, "temperature": 1, "seed": 1}),
        "chat_cache_salt_priority": (
            path,
            {**chat, "cache_salt": "tenant-a", "priority": 3, "request_id": "forebay-1"},
        ),
        "error_context": (path, {**chat, "messages": LONG}),
        "error_context_max_tokens": (path, {**chat, "max_tokens": 4000}),
        "error_context_stream": (path, {**chat, **USAGE, "messages": LONG}),
        "error_model": (path, {**chat, "model": "nobody"}),
        "error_no_messages": (path, common),
        "error_bad_value": (path, {**chat, "temperature": -1}),
        "error_completion_context": ("/v1/completions", {**common, "prompt": [28120] * 3000}),
        "error_path": ("/v1/nothing", {}),
        "completion_token_ids": ("/v1/completions", {**common, "prompt": [28120, 905, 260], "return_token_ids": True}),
        "completion_stream_token_ids": (
            "/v1/completions",
            {**common, **USAGE, "prompt": [28120, 905, 260], "return_token_ids": True},
        ),
        "completion_two_prompts": ("/v1/completions", {**common, "prompt": [[28120, 905], [57]]}),
        "tokenize_chat": ("/tokenize", {"model": model, "messages": ASK, "add_generation_prompt": True}),
        "tokenize_prompt": ("/tokenize", {"model": model, "prompt": "year 2024", "return_token_strs": True}),
        "detokenize": ("/detokenize", {"model": model, "tokens": [28120, 905, 260]}),
        "responses": ("/v1/responses", respond),
        "responses_stream": ("/v1/responses", {**respond, "stream": True}),
        "error_responses_context": ("/v1/responses", {**respond, "input": "word " * 3000}),
        "messages": ("/v1/messages", chat),
        "messages_stream": ("/v1/messages", {**chat, "stream": True}),
        "messages_count_tokens": ("/v1/messages/count_tokens", {"model": model, "messages": ASK}),
        "error_messages_context": ("/v1/messages", {**chat, "messages": LONG}),
        "error_messages_model": ("/v1/messages", {**chat, "model": "nobody"}),
        "models": ("/v1/models", None),
        "version": ("/version", None),
        "health": ("/health", None),
        "load": ("/load", None),
        "render_chat": ("/v1/chat/completions/render", chat),
    }


def record(port: int, name: str, path: str, body: dict[str, Any] | None) -> None:
    """Send one request and write down the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    payload = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, payload, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    raw = answer.read()
    headers = {key: value for key, value in answer.getheaders() if key.lower() in KEPT_HEADERS}
    entry: dict[str, Any] = {"path": path, "request": shortened(body), "status": answer.status, "headers": headers}
    if headers.get("content-type", "").startswith("text/event-stream"):
        (HERE / f"{name}.sse").write_bytes(raw)
        entry["stream"] = f"{name}.sse"
    else:
        try:
            entry["body"] = json.loads(raw)
        except ValueError:
            entry["body"] = raw.decode(errors="replace")
    (HERE / f"{name}.json").write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    print(f"{name}: {answer.status} {headers.get('content-type')} {len(raw)} bytes")
    connection.close()


def shortened(body: dict[str, Any] | None) -> dict[str, Any] | None:
    """Leave the long prompts out of the recording."""
    if body is None or len(json.dumps(body)) < 4000:
        return body
    return {**body, **{key: "(3000 words)" for key in ("messages", "input", "prompt") if key in body}}


def main() -> None:
    """Record everything, then the names of the metrics."""
    port, model = int(sys.argv[1]), sys.argv[2]
    HERE.mkdir(exist_ok=True)
    for name, (path, body) in requests(model).items():
        record(port, name, path, body)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    kept = [line for line in lines if line.startswith(("# TYPE vllm", "vllm:")) and "_bucket{" not in line]
    (HERE / "metrics.txt").write_text("\n".join(kept) + "\n")
    print(f"metrics: {len(kept)} lines")


if __name__ == "__main__":
    main()
