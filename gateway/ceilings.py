"""The largest request that is taken: what would cost an engine, or us, far more than its bytes cost the sender."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from core.chat import Endpoint
from core.errors import InvalidJson, InvalidRequest
from core.tenancy import Ceilings

# Measured on llama.cpp, whose one loop compiles and samples for all requests: what is accepted stalls nobody there.
_MAX_ALTERNATIVES = 128  # 512 values of an enum hold the others up for a second, 2,000 for eight
_MAX_PROPERTIES = 256
_MAX_BRANCHES = 4  # of one pattern: five ways that overlap slow the others by half, sixteen stop the engine
_MAX_REPEATS = 1000
_MAX_ELEMENTS = 200_000
_MAX_STRINGS = 1_000_000
_MAX_TOOLS = 128
_MAX_PROMPTS = 128
_MAX_INPUTS = 2048
_MAX_BIASES = 1024
_MAX_TEXT = 256
_WORTH_A_PASS = 0.9  # of the brackets: more are left only where they nest deep, and then few are looked at

_ALL_BYTES = bytes(range(256))
_NO_SKELETON = bytes(sorted(set(_ALL_BYTES) - set(b'{}[]"')))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_STRING = re.compile(rb'"[^"]*"')
_OPENING = ord("[")

# How many entries, and of how many characters, a list of words for the sampler may have.
_LISTS = {
    "stop": (32, 256), "stop_sequences": (32, 256), "bad_words": (64, 256), "preserved_tokens": (256, 256),
    "samplers": (32, 32), "dry_sequence_breakers": (8, 16), "stop_token_ids": (1024, 0),
    "allowed_token_ids": (65_536, 0),
}  # fmt: skip
_CHOICES = ("n", "best_of", "beam_width")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs", "n_probs")
_SCHEMAS = (
    "response_format", "json_schema", "text", "output_format", "output_config", "tools", "functions", "guided_json",
    "guided_choice", "guided_regex", "structured_outputs",
)  # fmt: skip
_GRAMMARS = ("grammar", "guided_grammar", "grammar_triggers")
_ALTERNATIVES = frozenset({"enum", "anyOf", "oneOf", "allOf", "choice", "structures", "triggers"})
_PATTERNS = frozenset({"pattern", "regex"})
_FREE_GRAMMARS = frozenset({"grammar", "structural_tag"})
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_CLASS_OR_ESCAPE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_BRANCH = re.compile(r"[|?*+]|\{\d*,\d*\}")


def check_depth(raw: bytes, depth: int) -> None:
    """Raise ``InvalidJson`` if the JSON text nests deeper than ``depth``, or has absurdly many parts.

    Nothing is built: bodies with few brackets cost two counts, others some passes in C.
    """
    if raw.count(b"{") + raw.count(b"[") <= depth:
        return
    text = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    skeleton = text.translate(None, _NO_SKELETON)
    if skeleton.count(b'"') > 2 * _MAX_STRINGS:
        raise InvalidJson(f"the body holds more than {_MAX_STRINGS:,} strings; send fewer or smaller requests")
    # Two quotes without a bracket between them are a string, or one's end and the next one's beginning: out or in, what
    # is around them stays so. What is left for the slower look are strings that hold brackets.
    brackets = _STRING.sub(b"", skeleton.replace(b'""', b""))
    if len(brackets) > 2 * _MAX_ELEMENTS:
        raise InvalidJson(f"the body holds more than {_MAX_ELEMENTS:,} arrays and objects; send smaller requests")
    if _is_deeper(brackets.translate(_ONE_KIND), depth):
        raise InvalidJson(f"the body is nested deeper than the {depth} levels that this key may use; flatten it")


def _is_deeper(brackets: bytes, depth: int) -> bool:
    """Whether they nest deeper. When all innermost pairs are taken out, which is a pass in C, the rest nests one level
    less: cheaper than a look at each bracket as long as there are many such pairs."""
    while depth and len(left := brackets.replace(b"[]", b"")) < len(brackets) * _WORTH_A_PASS:
        brackets, depth = left, depth - 1
    level = 0
    for bracket in brackets:
        level += 1 if bracket == _OPENING else -1
        if level > depth:
            return True
    return False


def check_ceilings(body: Mapping[str, Any], endpoint: Endpoint, ceilings: Ceilings, num_bytes: int) -> None:
    """Raise ``InvalidRequest``, naming the field and the limit, for what no request of this tenant may ask.

    ``num_bytes`` is the size of the whole body. What has the wrong type is left to whoever reads it.
    """
    for field in body:
        check = _CHECKS.get(field)
        if check is not None and body[field] is not None:
            check(field, body[field], ceilings, num_bytes)
    if endpoint is Endpoint.EMBEDDINGS:
        _check_length("input", body.get("input"), _MAX_INPUTS, "inputs")
    elif endpoint is Endpoint.COMPLETIONS:
        prompts = num_prompts(body.get("prompt"))
        if prompts > _MAX_PROMPTS:
            raise _too_large("prompt", f"{prompts} prompts", f"{_MAX_PROMPTS}")


def num_prompts(prompt: Any) -> int:
    """Return how many prompts a completion request holds: a list of numbers is one prompt in token ids."""
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)


def _too_large(field: str, has: str, limit: str) -> InvalidRequest:
    return InvalidRequest(
        f"`{field}` has {has}; this key may send {limit}: make it smaller, or ask whoever runs this gateway",
        param=field,
    )


def _check_number(field: str, value: Any, most: int) -> None:
    """A flag (``logprobs: true``) is no number; less than 0 means 'all' to vLLM."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not 0 <= value <= most:
        raise InvalidRequest(f"`{field}` has to be between 0 and {most} for this key", param=field)


def _check_choices(field: str, value: Any, ceilings: Ceilings, num_bytes: int) -> None:
    _check_number(field, value, ceilings.choices)


def _check_logprobs(field: str, value: Any, ceilings: Ceilings, num_bytes: int) -> None:
    _check_number(field, value, ceilings.top_logprobs)


def _check_length(field: str, value: Any, most: int, what: str) -> None:
    if isinstance(value, list | dict) and len(value) > most:
        raise _too_large(field, f"{len(value):,} {what}", f"{most:,}")


def _check_list(field: str, value: Any, ceilings: Ceilings, num_bytes: int) -> None:
    most, longest = _LISTS[field]
    _check_length(field, value, most, "entries")
    for entry in value if isinstance(value, list) else (value,):
        if isinstance(entry, str) and len(entry) > longest:
            raise _too_large(field, f"an entry of {len(entry):,} characters", f"{longest}")


def _check_bias(field: str, value: Any, ceilings: Ceilings, num_bytes: int) -> None:
    _check_length(field, value, _MAX_BIASES, "entries")
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, list) and entry and isinstance(entry[0], str) and len(entry[0]) > _MAX_TEXT:
            raise _too_large(field, f"an entry of {len(entry[0]):,} characters", f"{_MAX_TEXT}")


def _check_grammar(field: str, value: Any, ceilings: Ceilings, num_bytes: int) -> None:
    """A grammar of few bytes can have an engine walk billions of ways, and no cheap look tells which one does."""
    if not ceilings.grammars:
        raise InvalidRequest(
            f"`{field}` is not open to this key: use `response_format` with a JSON schema, or ask whoever runs this "
            "gateway to set `ceilings.grammars`",
            param=field,
        )
    if isinstance(value, str) and len(value) > ceilings.schema:
        raise _too_large(field, f"{len(value):,} characters", f"{ceilings.schema:,}")
    _check_length(field, value, _MAX_TOOLS, "entries")


def _check_schema(field: str, value: Any, ceilings: Ceilings, num_bytes: int) -> None:
    if field in {"tools", "functions"}:
        _check_length(field, value, _MAX_TOOLS, "functions")
        parts: tuple[Any, ...] = tuple(value) if isinstance(value, list) else (value,)
    else:
        parts = (value,)
    if num_bytes > ceilings.schema:
        for part in parts:
            size = len(msgspec.json.encode(part))
            if size > ceilings.schema:
                raise _too_large(field, f"a schema of {size:,} bytes", f"{ceilings.schema:,}")
    if field == "guided_regex":
        _check_pattern(field, value, ceilings)
        return
    for part in parts:
        _check_parts(field, part, ceilings)


def _check_parts(field: str, schema: Any, ceilings: Ceilings) -> None:
    """Check every part of a schema. A property may be called ``pattern`` or ``enum``; then its value is an object."""
    alternatives = len(schema) if isinstance(schema, list) else 0  # guided_choice
    properties = 0
    for key, value in _items(schema):
        if key in _PATTERNS or key == "patternProperties":
            for pattern in value if isinstance(value, dict) and key == "patternProperties" else (value,):
                alternatives += _check_pattern(field, pattern, ceilings)
        elif key in _FREE_GRAMMARS and isinstance(value, str):
            _check_grammar(field, value, ceilings, 0)
        elif key in _ALTERNATIVES and isinstance(value, list):
            alternatives += len(value)
        elif key == "properties" and isinstance(value, dict):
            properties += len(value)
    if alternatives > _MAX_ALTERNATIVES:
        raise InvalidRequest(
            f"a schema in `{field}` has {alternatives:,} alternatives (values of enum, branches of anyOf and of "
            f"patterns), and may have {_MAX_ALTERNATIVES}: use a plain string and check its value yourself",
            param=field,
        )
    if properties > _MAX_PROPERTIES:
        raise _too_large(field, f"a schema of {properties:,} properties", f"{_MAX_PROPERTIES}")


def _items(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of every object in the tree."""
    rest = [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            yield from node.items()
            rest.extend(node.values())
        elif isinstance(node, list):
            rest.extend(node)


def _check_pattern(field: str, pattern: Any, ceilings: Ceilings) -> int:
    """Return how many branches the pattern has, which are few. Exact counts such as ``{4}`` are none."""
    if not isinstance(pattern, str):
        return 0
    if len(pattern) > ceilings.pattern:
        raise _too_large(field, f"a pattern of {len(pattern):,} characters", f"{ceilings.pattern:,}")
    plain = _CLASS_OR_ESCAPE.sub("x", pattern)
    repeats = [int(count) for counts in _REPEAT.findall(plain) for count in counts if count]
    if max(repeats, default=0) > _MAX_REPEATS:
        raise _too_large(field, f"a pattern with {max(repeats):,} repetitions", f"{_MAX_REPEATS:,}")
    branches = len(_BRANCH.findall(plain))
    if "){" in plain and (branches or math.prod(repeats) > _MAX_REPEATS):
        # Measured: `(([a-z ]{1,6}){1,6}){1,6}` stops llama.cpp for all.
        raise InvalidRequest(
            f"a pattern in `{field}` repeats a group by {{}}: taken only without | ? * + and {{m,n}} beside it, "
            f"and for {_MAX_REPEATS:,} repetitions in all",
            param=field,
        )
    if branches > _MAX_BRANCHES:
        raise InvalidRequest(
            f"a pattern in `{field}` has {branches} branches (each | ? * + and {{m,n}} is one), and may have "
            f"{_MAX_BRANCHES}: make it simpler, and check the value yourself",
            param=field,
        )
    return branches


_Check = Callable[[str, Any, Ceilings, int], None]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(_CHOICES, _check_choices),
    **dict.fromkeys(_LOGPROBS, _check_logprobs),
    **dict.fromkeys(_LISTS, _check_list),
    **dict.fromkeys(_SCHEMAS, _check_schema),
    **dict.fromkeys(_GRAMMARS, _check_grammar),
    "logit_bias": _check_bias,
}
