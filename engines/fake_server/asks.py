"""Bodies of requests as far as this engine reads them, and the prompt that each one comes to.

Unknown fields pass; a field of the wrong type is the client's error.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from engines.fake_server.text import encode

Content = str | list[dict[str, Any]] | None


class BadRequestError(Exception):
    """A request that this engine refuses, with the error that its client reads."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class Message(msgspec.Struct):
    """One chat message."""

    role: str
    content: Content = None
    tool_calls: list[dict[str, Any]] | None = None


class StreamOptions(msgspec.Struct):
    """Only `include_usage` matters here."""

    include_usage: bool | None = False


class Common(msgspec.Struct):
    """Fields that chat and plain completions share."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    ignore_eos: bool | None = False
    return_token_ids: bool | None = False
    cache_salt: str | None = None


class ChatBody(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = msgspec.field(default_factory=list)
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    continue_final_message: bool | None = False
    add_generation_prompt: bool | None = True


class CompletionBody(Common):
    """POST /v1/completions."""

    prompt: str | list[Any] = ""
    logprobs: int | None = None
    echo: bool | None = False


class ResponsesBody(msgspec.Struct):
    """POST /v1/responses."""

    model: str | None = None
    input: str | list[dict[str, Any]] = ""
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = False


class MessagesBody(msgspec.Struct):
    """POST /v1/messages and /v1/messages/count_tokens."""

    messages: list[Message]
    model: str | None = None
    system: Content = None
    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = False


class EmbeddingsBody(msgspec.Struct):
    """POST /v1/embeddings."""

    input: str | list[Any]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: str | None = "float"


class TokenizeBody(msgspec.Struct):
    """POST /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: list[Message] | None = None
    model: str | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    tools: list[dict[str, Any]] | None = None


class DetokenizeBody(msgspec.Struct):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine reads: `head`, then `prefill`, the part of an answer that the client gave to be continued."""

    ids: list[int]
    head: str = ""
    prefill: str = ""


def flat(content: Content) -> str:
    """Return the text of a message's content; parts that are not text stand as a mark."""
    if isinstance(content, list):
        return "".join(str(part.get("text", f"<|{part.get('type', 'part')}|>")) for part in content)
    return content or ""


def render(
    messages: list[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    continues: bool = False,
    generates: bool = True,
) -> Prompt:
    """Apply this engine's chat template."""
    if not messages:
        raise BadRequestError("messages must not be empty", param="messages")
    if continues and generates:
        raise BadRequestError(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            param="continue_final_message",
        )
    lines = [f"<|tools|>\n{msgspec.json.encode(tools).decode()}\n"] if tools else []
    for message in messages[:-1] if continues else messages:
        calls = msgspec.json.encode(message.tool_calls).decode() if message.tool_calls else ""
        lines.append(f"<|{message.role}|>\n{flat(message.content)}{calls}\n")
    prefill = ""
    if continues:
        lines.append(f"<|{messages[-1].role}|>\n")
        prefill = flat(messages[-1].content)
    elif generates:
        lines.append("<|assistant|>\n")
    head = "".join(lines)
    return Prompt(encode(head + prefill), head, prefill)


def plain_prompts(prompt: str | list[Any]) -> list[Prompt]:
    """Return the prompts of a completions or embeddings request: a text, ids, or a list of either."""
    if isinstance(prompt, str):
        return [Prompt(encode(prompt), prompt)]
    if not prompt:
        raise BadRequestError("prompt must not be empty", param="prompt")
    if all(type(part) is int for part in prompt):
        return [Prompt(list(prompt))]
    if all(isinstance(part, str | list) for part in prompt):
        return [single for part in prompt for single in plain_prompts(part)]
    raise BadRequestError("prompt must be a string, token ids, or a list of either", param="prompt")


def responses_messages(body: ResponsesBody) -> list[Message]:
    """Return the chat that a Responses request stands for."""
    system = [Message("system", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*system, Message("user", body.input)]
    return system + [Message(str(item.get("role", "user")), item.get("content")) for item in body.input]


def anthropic_messages(body: MessagesBody) -> list[Message]:
    """Return the chat that an Anthropic request stands for."""
    return ([Message("system", body.system)] if body.system else []) + body.messages
