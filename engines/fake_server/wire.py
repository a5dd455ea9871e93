"""How a job looks on the wire, whole and streamed, in the four shapes; a frame comes with its decoding step."""

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from engines.fake_server.answers import Answer, Job
from engines.fake_server.text import WORDS, Piece

Frame = tuple[int, bytes]
_json = msgspec.json.encode
DONE = b"data: [DONE]\n\n"


class Wire(Protocol):
    """One API's way to write a job."""

    done: bytes
    """The frame after the last, or nothing."""

    def body(self, job: Job) -> bytes:
        """Return the whole answer."""

    def frames(self, job: Job) -> Iterator[Frame]:
        """Yield the stream's frames."""

    def error_frame(self, message: str) -> bytes:
        """Return an error as it stands inside a stream."""

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> bytes:
        """Return an error as it stands alone."""


_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


def openai_error(status: int, message: str, code: str | None = None, param: str | None = None) -> bytes:
    """Return OpenAI's error envelope."""
    return _json({"error": {"message": message, "type": _kind(status), "param": param, "code": code}})


def anthropic_error(status: int, message: str) -> bytes:
    """Return Anthropic's error envelope."""
    kind = "api_error" if status >= 500 else _kind(status)
    return _json({"type": "error", "error": {"type": kind, "message": message}})


def _usage(job: Job) -> bytes:
    return _json(
        {
            "prompt_tokens": job.prompt_tokens,
            "total_tokens": job.prompt_tokens + job.completion_tokens,
            "completion_tokens": job.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
        }
    )


def _data(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


def _event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\n".encode() + _data(_json({"type": name, **fields}))


def _logprob(token: int) -> float:
    return -(token % 97) / 100


def _alternatives(piece: Piece, count: int) -> list[tuple[str, float]]:
    others = ((" " + WORDS[(piece.id + at) % len(WORDS)], -1.0 - at / 10) for at in range(1, count))
    return [(piece.text, _logprob(piece.id)), *others][:count]


class _OpenAIWire:
    """What chat and plain completions have in common."""

    done = DONE
    _stream_object = b""

    def error_frame(self, message: str) -> bytes:
        return _data(openai_error(500, message))

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> bytes:
        return openai_error(status, message, code, param)

    def _head(self, job: Job, kind: bytes) -> bytes:
        return b'{"id":"%b","object":"%b","created":%d,"model":%b,"choices":[' % (
            job.id.encode(),
            kind,
            job.created,
            _json(job.model),
        )

    def _closing(self, job: Job) -> tuple[bytes, bytes, bytes | None]:
        """Return the tail of a chunk, the tail of the last one, and the usage chunk."""
        if job.usage_with_choices:
            return b"]}\n\n", b'],"usage":' + _usage(job) + b"}\n\n", None
        if not job.include_usage:
            return b"]}\n\n", b"]}\n\n", None
        head = self._head(job, self._stream_object)
        null = b'],"usage":null}\n\n'
        return null, null, _data(head + b'],"usage":' + _usage(job) + b"}")


class ChatWire(_OpenAIWire):
    """/v1/chat/completions."""

    _stream_object = b"chat.completion.chunk"

    def body(self, job: Job) -> bytes:
        """Return a chat.completion."""
        choices = b",".join(_json(self._choice(job, index)) for index in range(len(job.choices)))
        ids = b',"prompt_token_ids":' + _json(job.prompts[0].ids) if job.return_token_ids else b""
        return self._head(job, b"chat.completion") + choices + b'],"usage":' + _usage(job) + ids + b"}"

    def frames(self, job: Job) -> Iterator[Frame]:
        """Yield the role of each choice, then its tokens, then usage."""
        start = b"data: " + self._head(job, self._stream_object)
        tail, last_tail, usage = self._closing(job)
        ids = b',"prompt_token_ids":' + (_json(job.prompts[0].ids) if job.return_token_ids else b"null")
        first_tail = b"]" + ids + tail[1:]
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        for index in range(len(job.choices)):
            yield 0, start + b'{"index":%d,' % index + role + first_tail
        step = 0
        for step, index in job.by_step():
            answer = job.choices[index]
            open_choice = start + b'{"index":%d,"delta":' % index
            if answer.tool is not None and step == 0:
                yield 0, open_choice + _tool_opening(job, answer) + b',"logprobs":null,"finish_reason":null}' + tail
            is_last = step >= len(answer.pieces) - 1
            yield step, open_choice + _token_delta(job, answer, step) + (last_tail if is_last else tail)
        if usage is not None:
            yield step, usage

    def _choice(self, job: Job, index: int) -> dict[str, Any]:
        answer = job.choices[index]
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.tool is not None:
            call = {"name": answer.tool, "arguments": answer.text}
            message["content"] = None
            message["tool_calls"] = [{"id": _call_id(job), "type": "function", "function": call}]
        choice = {"index": index, "message": message, "logprobs": None, "finish_reason": answer.finish}
        choice["stop_reason"] = answer.stop_reason
        if job.top_logprobs is not None:
            rows = [_chat_logprob(piece, job.top_logprobs) for piece in answer.pieces]
            choice["logprobs"] = {"content": rows}
        if job.return_token_ids:
            choice["token_ids"] = [piece.id for piece in answer.pieces]
        return choice


def _call_id(job: Job) -> str:
    return "call_" + job.id[-24:]


def _tool_opening(job: Job, answer: Answer) -> bytes:
    call = {"name": answer.tool, "arguments": ""}
    return _json({"tool_calls": [{"index": 0, "id": _call_id(job), "type": "function", "function": call}]})


def _token_delta(job: Job, answer: Answer, step: int) -> bytes:
    """Return the delta and the rest of a choice: the token at `step`, and the finish if it is the last."""
    finish = b',"finish_reason":null'
    if step >= len(answer.pieces) - 1:
        finish = b',"finish_reason":"%b","stop_reason":%b' % (answer.finish.encode(), _json(answer.stop_reason))
    if not answer.pieces:
        return b'{"content":""},"logprobs":null' + finish + b"}"
    piece = answer.pieces[step]
    logprobs = b',"logprobs":null'
    if job.top_logprobs is not None:
        logprobs = b',"logprobs":' + _json({"content": [_chat_logprob(piece, job.top_logprobs)]})
    ids = b',"token_ids":[%d]' % piece.id if job.return_token_ids else b',"token_ids":null'
    if answer.tool is None:
        delta = b'{"content":' + _json(piece.text) + b"}"
    else:
        delta = b'{"tool_calls":[{"index":0,"function":{"arguments":' + _json(piece.text) + b"}}]}"
    return delta + logprobs + finish + ids + b"}"


def _chat_logprob(piece: Piece, top: int) -> dict[str, Any]:
    def row(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    alternatives = [row(*alternative) for alternative in _alternatives(piece, top)]
    return {**row(piece.text, _logprob(piece.id)), "top_logprobs": alternatives}


class CompletionWire(_OpenAIWire):
    """/v1/completions."""

    _stream_object = b"text_completion"

    def body(self, job: Job) -> bytes:
        """Return a text_completion."""
        choices = b",".join(_json(self._choice(job, index)) for index in range(len(job.choices)))
        return self._head(job, b"text_completion") + choices + b'],"usage":' + _usage(job) + b"}"

    def frames(self, job: Job) -> Iterator[Frame]:
        """Yield the tokens of all choices in turn, then usage."""
        start = b"data: " + self._head(job, self._stream_object)
        tail, last_tail, usage = self._closing(job)
        step = 0
        for step, index in job.by_step():
            is_last = step >= len(job.choices[index].pieces) - 1
            yield step, start + _json(self._chunk(job, index, step)) + (last_tail if is_last else tail)
        if usage is not None:
            yield step, usage

    def _chunk(self, job: Job, index: int, step: int) -> dict[str, Any]:
        answer = job.choices[index]
        is_last = step >= len(answer.pieces) - 1
        pieces = answer.pieces[step : step + 1]
        offset = 0
        if job.top_logprobs is not None:
            offset = sum(len(piece.text) for piece in answer.pieces[:step])
        echoed = job.prompt_of(index).head if job.echo and step == 0 else ""
        chunk = self._fields(job, index, pieces, offset)
        chunk["text"] = echoed + chunk["text"]
        chunk["finish_reason"] = answer.finish if is_last else None
        chunk["stop_reason"] = answer.stop_reason if is_last else None
        chunk["prompt_token_ids"] = job.prompt_of(index).ids if job.return_token_ids and step == 0 else None
        chunk["token_ids"] = [piece.id for piece in pieces] if job.return_token_ids else None
        return chunk

    def _choice(self, job: Job, index: int) -> dict[str, Any]:
        answer = job.choices[index]
        choice = self._fields(job, index, answer.pieces, 0)
        if job.echo:
            choice["text"] = job.prompt_of(index).head + choice["text"]
        choice |= {"finish_reason": answer.finish, "stop_reason": answer.stop_reason}
        if job.return_token_ids:
            choice["prompt_token_ids"] = job.prompt_of(index).ids
        return choice

    def _fields(self, job: Job, index: int, pieces: tuple[Piece, ...], offset: int) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        fields: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if job.top_logprobs is not None:
            fields["logprobs"] = _completion_logprobs(pieces, job.top_logprobs, offset)
        if job.return_token_ids:
            fields["token_ids"] = [piece.id for piece in pieces]
        return fields


def _completion_logprobs(pieces: tuple[Piece, ...], top: int, offset: int) -> dict[str, Any]:
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece.text)
    return {
        "text_offset": offsets,
        "tokens": [piece.text for piece in pieces],
        "token_logprobs": [_logprob(piece.id) for piece in pieces],
        "top_logprobs": [dict(_alternatives(piece, top)) for piece in pieces],
    }


class ResponsesWire(_OpenAIWire):
    """/v1/responses."""

    done = b""

    def error_frame(self, message: str) -> bytes:
        """Return a named error event."""
        return _event("error", code="server_error", message=message, param=None, sequence_number=0)

    def body(self, job: Job) -> bytes:
        """Return a response."""
        return _json(self._response(job, self._status(job)))

    def frames(self, job: Job) -> Iterator[Frame]:
        """Yield the named events of one text message."""
        answer = job.choices[0]
        at = {"item_id": self._message_id(job), "output_index": 0, "content_index": 0}
        item = self._item(job, "in_progress", [])
        for number, (step, name, fields) in enumerate(self._events(job, answer, at, item)):
            yield step, _event(name, sequence_number=number, **fields)

    def _events(
        self, job: Job, answer: Answer, at: dict[str, Any], item: dict[str, Any]
    ) -> Iterator[tuple[int, str, dict[str, Any]]]:
        yield 0, "response.created", {"response": self._response(job, "in_progress")}
        yield 0, "response.in_progress", {"response": self._response(job, "in_progress")}
        yield 0, "response.output_item.added", {"output_index": 0, "item": item}
        yield 0, "response.content_part.added", {**at, "part": self._part("")}
        step = 0
        for step, piece in enumerate(answer.pieces):
            yield step, "response.output_text.delta", {**at, "delta": piece.text, "logprobs": []}
        yield step, "response.output_text.done", {**at, "text": answer.text, "logprobs": []}
        yield step, "response.content_part.done", {**at, "part": self._part(answer.text)}
        done = self._item(job, self._status(job), [self._part(answer.text)])
        yield step, "response.output_item.done", {"output_index": 0, "item": done}
        status = self._status(job)
        yield step, f"response.{status}", {"response": self._response(job, status)}

    def _status(self, job: Job) -> str:
        return "incomplete" if job.choices[0].finish == "length" else "completed"

    def _message_id(self, job: Job) -> str:
        return "msg_" + job.id

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, job: Job, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        identity = {"type": "message", "id": self._message_id(job), "role": "assistant"}
        return {**identity, "status": status, "content": content}

    def _response(self, job: Job, status: str) -> dict[str, Any]:
        is_over = status != "in_progress"
        output = [self._item(job, status, [self._part(job.choices[0].text)])] if is_over else []
        usage = {
            "input_tokens": job.prompt_tokens,
            "input_tokens_details": {"cached_tokens": job.cached_tokens},
            "output_tokens": job.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.prompt_tokens + job.completion_tokens,
        }
        return {
            "id": "resp_" + job.id,
            "object": "response",
            "created_at": job.created,
            "model": job.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": usage if is_over else None,
        }


class AnthropicWire:
    """/v1/messages."""

    done = b""

    def error_frame(self, message: str) -> bytes:
        """Return a named error event."""
        return _event("error", error={"type": "api_error", "message": message})

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> bytes:
        """Return Anthropic's envelope, which has no code."""
        return anthropic_error(status, message)

    def body(self, job: Job) -> bytes:
        """Return a message."""
        answer = job.choices[0]
        content = [{"type": "text", "text": answer.text}]
        return _json(self._message(job, content, self._ending(answer), job.completion_tokens))

    def frames(self, job: Job) -> Iterator[Frame]:
        """Yield the named events of one text block."""
        answer = job.choices[0]
        nothing = {"stop_reason": None, "stop_sequence": None}
        yield 0, _event("message_start", message=self._message(job, [], nothing, 0))
        yield 0, _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        step = 0
        for step, piece in enumerate(answer.pieces):
            delta = {"type": "text_delta", "text": piece.text}
            yield step, _event("content_block_delta", index=0, delta=delta)
        yield step, _event("content_block_stop", index=0)
        usage = {"output_tokens": job.completion_tokens}
        yield step, _event("message_delta", delta=self._ending(answer), usage=usage)
        yield step, _event("message_stop")

    def _ending(self, answer: Answer) -> dict[str, Any]:
        reason = "stop_sequence" if answer.stop_reason else "max_tokens" if answer.finish == "length" else "end_turn"
        return {"stop_reason": reason, "stop_sequence": answer.stop_reason}

    def _message(self, job: Job, content: list[Any], ending: dict[str, Any], output: int) -> dict[str, Any]:
        # Anthropic counts cached tokens apart from input_tokens, not inside it.
        usage = {
            "input_tokens": job.prompt_tokens - job.cached_tokens,
            "cache_read_input_tokens": job.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": output,
        }
        identity = {"id": "msg_" + job.id, "type": "message", "role": "assistant", "model": job.model}
        return {**identity, "content": content, **ending, "usage": usage}
