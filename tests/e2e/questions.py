"""A mixture of questions as many clients ask it, the same for the same seed: streams and whole answers, chats and
completions, stop strings, scripts that need several bytes a letter, and what an engine cannot be asked to continue."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PINNED_SHARE = 0.1
FREE_SHARE = 0.1

# The scripts that models continue: accents, two and three bytes a letter, four bytes a sign, joined signs.
_SCRIPTS = (
    "Žluťoučký kůň úpěl ďábelské ódy, naïve façade, Größe",
    "Съешь ещё этих мягких французских булок",
    "いろはにほへと ちりぬるを わかよたれそ",
    "🦊 🐻 🐼 🦊 🐻 🐼 🦊 🐻 🐼 🦊 🐻",
    "👩‍👩‍👧 👨‍👩‍👦 🇨🇭 🇯🇵 👩‍👩‍👧 👨‍👩‍👦 🇨🇭 🇯🇵",
)
_PLAIN = (
    "Tell me a story about a dam, a river and the people below.",
    "Count from one to forty, one number after the other.",
    "Why does water flow downhill? Explain it at length.",
    "Once upon a time there was a miller who",
)


class Nature(NamedTuple):
    """What suits an engine: its model, how long answers are, strings that its answers are likely to contain, fields of
    which each makes a request that cannot be continued, and what is the same in all frames of one of its streams."""

    model: str
    max_tokens: Sequence[int]
    stops: Sequence[str]
    pinning: Sequence[dict[str, Any]]
    steady: Sequence[str] = ("id", "object", "model", "created")


class Question(NamedTuple):
    """A request: ``is_pinned`` if it must not be cut, ``is_free`` if two engines would answer it differently."""

    number: int
    path: str
    body: dict[str, Any]
    is_pinned: bool
    is_free: bool
    steady: Sequence[str] = ()

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        return bool(self.body.get("stream_options", {}).get("include_usage"))


def questions(nature: Nature, count: int, seed: int) -> list[Question]:
    """Return so many questions, none like another."""
    draw = random.Random(seed)
    return [_question(nature, number, draw) for number in range(count)]


def _question(nature: Nature, number: int, draw: random.Random) -> Question:
    is_chat = draw.random() < 0.65
    text = f"{number}. {draw.choice(_SCRIPTS if draw.random() < 0.5 else _PLAIN)}"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    body: dict[str, Any] = {"model": nature.model, **asked, "max_tokens": draw.choice(nature.max_tokens)}
    body["temperature"] = 0
    if is_chat and draw.random() < 0.3:
        body["messages"].insert(0, {"role": "system", "content": "You are brief."})
    if draw.random() < 0.3:
        body["stop"] = draw.sample(nature.stops, k=min(2, len(nature.stops)))
    if draw.random() < 0.75:
        body["stream"] = True
        if draw.random() < 0.6:
            body["stream_options"] = {"include_usage": True}
    if draw.random() < 0.3:
        body["forebay"] = {"program": f"program-{draw.randrange(3)}"}
    is_pinned = draw.random() < PINNED_SHARE
    is_free = not is_pinned and draw.random() < FREE_SHARE
    if is_pinned:
        body |= draw.choice(nature.pinning)
    if is_free:
        body["temperature"] = 0.8
    return Question(number, CHAT if is_chat else COMPLETIONS, body, is_pinned, is_free, nature.steady)
