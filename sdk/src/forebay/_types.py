"""What goes over the wire, typed. Answers keep fields that are not named here."""

from collections.abc import Sequence
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, PrivateAttr


class ForebayTimeouts(TypedDict, total=False):
    """Deadlines in seconds that a request may shorten."""

    connect: float
    queue: float
    first_token: float
    idle: float
    total: float


class ForebayOptions(TypedDict, total=False):
    """What is Forebay's own in a request. The gateway refuses keys that it does not know."""

    timeouts: ForebayTimeouts
    fallbacks: Sequence[str]
    end_user: str
    session: str
    program: str
    run: str
    stage: str


class ResponseMetadata(BaseModel):
    """What the gateway says about how it answered; None where it said nothing."""

    model_config = ConfigDict(frozen=True)

    request_id: str | None = None
    model: str | None = None
    worker: str | None = None
    attempts: int | None = None
    queue_ms: float | None = None
    overhead_ms: float | None = None
    cache: str | None = None
    decision: str | None = None


class _Wire(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Answer(_Wire):
    _forebay: ResponseMetadata = PrivateAttr(default_factory=ResponseMetadata)

    @property
    def forebay(self) -> ResponseMetadata:
        """How the gateway answered."""
        return self._forebay


class Usage(_Wire):
    """Tokens that the engine processed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Message(_Wire):
    """What the model said; ``tool_calls`` are as the engine gave them."""

    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(_Wire):
    """One of ``n`` answers."""

    index: int = 0
    message: Message
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatCompletion(_Answer):
    """A whole answer."""

    id: str
    object: str = "chat.completion"
    created: int = 0
    model: str = ""
    choices: list[Choice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """The first choice's text; empty where it has none."""
        return (self.choices[0].message.content or "") if self.choices else ""


class Delta(_Wire):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChunkChoice(_Wire):
    """What a chunk adds to one of ``n`` answers."""

    index: int = 0
    delta: Delta
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class ChatChunk(_Wire):
    """A piece of a streamed answer. The last one has ``usage`` and no choices, if usage was asked for."""

    id: str
    object: str = "chat.completion.chunk"
    created: int = 0
    model: str = ""
    choices: list[ChunkChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What the chunk adds to the first choice's text; often empty."""
        return "".join(choice.delta.content or "" for choice in self.choices if choice.index == 0)


class Model(_Answer):
    """A model that the key may use."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = ""


class ModelList(_Answer):
    """The models that the key may use."""

    object: str = "list"
    data: list[Model]
