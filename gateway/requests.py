"""From bytes to a ``Call``: parse once, check what we rely on, take out what is ours, leave the rest as it came."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn, get_args

import msgspec

from core.chat import CLASSES, Call, CallContext, Class, Endpoint, Objective, Timeouts
from core.errors import InvalidJson, InvalidRequest, UnknownModel, UnsupportedParameter
from core.ids import ModelName, RequestId
from core.tenancy import Ceilings
from gateway.auth import Principal
from gateway.ceilings import check_ceilings, check_depth, num_prompts
from routing.catalog import Catalog, Model

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_HEADER_PREFIX = b"x-forebay-"
_BYTES_PER_TOKEN = 4  # English text under a BPE of usual size; settled by the engine's own count
_DEFAULT_ANSWER_TOKENS = 256

# Keys of the "forebay" object. What is not built yet is refused by name, so that nobody believes it works.
_LABELS = ("end_user", "session", "program", "run", "stage")
_BUILT = (*_LABELS, "timeouts", "fallbacks", "class", "objective", "deadline_ms")
_PLANNED = ("cache", "route", "examples", "kv")
_CHOICES: dict[str, tuple[str, ...]] = {"class": CLASSES, "objective": get_args(Objective)}
_LONGEST_DEADLINE_MS = 86_400_000
_TIMEOUTS = Timeouts.__struct_fields__
TIERS: dict[Any, Class] = {"priority": "interactive", "flex": "batch"}
"""Classes by ``service_tier``, OpenAI's name for the same wish."""

_LIMIT_FIELDS: dict[Endpoint, tuple[str, ...]] = {
    Endpoint.CHAT: ("max_completion_tokens", "max_tokens"),
    Endpoint.COMPLETIONS: ("max_tokens",),
    Endpoint.RESPONSES: ("max_output_tokens",),
    Endpoint.MESSAGES: ("max_tokens",),
    Endpoint.EMBEDDINGS: (),
}
_PROMPT_FIELD = {
    Endpoint.CHAT: "messages",
    Endpoint.COMPLETIONS: "prompt",
    Endpoint.EMBEDDINGS: "input",
    Endpoint.RESPONSES: "input",
    Endpoint.MESSAGES: "messages",
}


def request_id_of(headers: Mapping[bytes, bytes]) -> RequestId | None:
    """Return the client's own request id if it is a sane one."""
    given = headers.get(b"x-request-id")
    if given is not None and _SANE_ID.fullmatch(given):
        return RequestId(given.decode("ascii"))
    return None


def parse_body(raw: bytes, depth: int = Ceilings().depth) -> dict[str, Any]:
    """Return the JSON object in the body, which nests at most ``depth`` deep. Raises ``InvalidJson``."""
    check_depth(raw, depth)
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise InvalidJson(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidJson("the body is nested too deeply") from error
    except ValueError as error:  # bytes that are no UTF-8, half a surrogate pair, a number of thousands of digits
        raise InvalidJson(f"the body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise InvalidJson(f"the body has to be a JSON object, not {_kind(body)}")
    return body


def find_model(body: Mapping[str, Any], catalog: Catalog, principal: Principal) -> Model:
    """Return the model that the body names. Raises ``InvalidRequest``, ``UnknownModel`` or ``ModelNotAllowed``."""
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("`model` has to be the name of a model; GET /v1/models lists them", param="model")
    model = catalog.find(name)
    if model is None:
        visible = [known for known in catalog.names() if _is_visible(known, catalog, principal)]
        near = difflib.get_close_matches(name[:128], visible, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; GET /v1/models lists those that do"
        raise UnknownModel(f"the model {name[:128]!r} does not exist{hint}", param="model")
    principal.check(model.name)
    return model


def read_call(
    endpoint: Endpoint,
    raw: bytes,
    headers: Mapping[bytes, bytes],
    *,
    request_id: RequestId,
    principal: Principal,
    catalog: Catalog,
    is_traced: bool = False,
) -> Call:
    """Return the call that a request means. Raises ``InvalidRequest`` and its kin, saying which field and why.

    ``is_traced``: the header ``traceparent`` is our own span of the request.
    """
    ceilings = principal.tenant_spec.ceilings
    body = parse_body(raw, ceilings.depth)
    model = find_model(body, catalog, principal)
    _check_prompt(body, endpoint)
    num_choices = _check_choices(body, ceilings.choices)
    check_ceilings(body, endpoint, ceilings, len(raw))
    limit = _answer_limit(body, endpoint)
    stream = _check_stream(body) and endpoint is not Endpoint.EMBEDDINGS  # which no engine streams
    options = own_options(body, headers)
    # `priority` orders within a tenant and belongs to the scheduler; no engine may see it.
    body.pop("priority", None)
    traceparent = headers.get(b"traceparent")
    return Call(
        id=request_id,
        endpoint=endpoint,
        model=model.name,
        context=CallContext(
            tenant=principal.tenant,
            end_user=options.get("end_user") or _end_user(body),
            session=options.get("session"),
            program=options.get("program"),
            run=options.get("run"),
            stage=options.get("stage"),
            urgency=_urgency(options, body, principal),
            weight=principal.tenant_spec.weight,
            objective=options.get("objective"),
            deadline_s=options["deadline_ms"] / 1000 if "deadline_ms" in options else None,
        )
        if options or "user" in body or "safety_identifier" in body or "service_tier" in body
        else CallContext(
            tenant=principal.tenant,
            urgency=_urgency(options, body, principal),
            weight=principal.tenant_spec.weight,
        ),
        body=body,
        stream=stream,
        wants_usage=_wants_usage(body),
        timeouts=_timeouts(options["timeouts"], model.timeouts) if "timeouts" in options else model.timeouts,
        has_own_timeouts="timeouts" in options,
        prompt_tokens_estimate=len(raw) // _BYTES_PER_TOKEN,
        max_tokens=0 if endpoint is Endpoint.EMBEDDINGS else limit * num_choices * num_prompts(body.get("prompt")),
        fallbacks=_fallbacks(options["fallbacks"], catalog, principal)
        if "fallbacks" in options
        else tuple(name for name in model.fallbacks if principal.may_use(name)),
        traceparent=traceparent.decode("ascii") if traceparent and _TRACEPARENT.fullmatch(traceparent) else None,
        has_leg_spans=is_traced,
    )


def _is_visible(name: str, catalog: Catalog, principal: Principal) -> bool:
    model = catalog.find(name)
    return model is not None and principal.may_use(model.name)


def _kind(value: object) -> str:
    names: dict[type, str] = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "an object")


def _wrong(field: str, wanted: str, value: object) -> NoReturn:
    raise InvalidRequest(f"`{field}` has to be {wanted}, not {_kind(value)}", param=field)


def _check_prompt(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    field = _PROMPT_FIELD[endpoint]
    prompt = body.get(field)
    if field == "messages":
        if not isinstance(prompt, list):
            _wrong("messages", "an array of messages", prompt)
        if not prompt:
            raise InvalidRequest("`messages` has to hold at least one message", param="messages")
        for index, message in enumerate(prompt):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRequest(
                    f"`messages[{index}]` has to be an object with a `role`", param=f"messages[{index}]"
                )
    elif prompt is None and endpoint is not Endpoint.RESPONSES:
        raise InvalidRequest(f"`{field}` is missing", param=field)
    elif not isinstance(prompt, str | list | None):
        _wrong(field, "a string or an array", prompt)


def _check_choices(body: Mapping[str, Any], most: int) -> int:
    num_choices = body.get("n")
    if num_choices is None:
        return 1
    if type(num_choices) is not int:
        _wrong("n", "a whole number", num_choices)
    if not 1 <= num_choices <= most:
        raise InvalidRequest(f"`n` has to be between 1 and {most} for this key, not {num_choices}", param="n")
    return int(num_choices)


def _answer_limit(body: Mapping[str, Any], endpoint: Endpoint) -> int:
    """Return the longest answer that the body allows; a guess where it sets no limit."""
    for field in _LIMIT_FIELDS[endpoint]:
        limit = body.get(field)
        if limit is None:
            continue
        if type(limit) is not int:
            _wrong(field, "a whole number", limit)
        least = 0 if endpoint is Endpoint.COMPLETIONS else 1
        if limit < least:
            raise InvalidRequest(f"`{field}` has to be at least {least}, not {limit}", param=field)
        return int(limit)
    return _DEFAULT_ANSWER_TOKENS


def _check_stream(body: Mapping[str, Any]) -> bool:
    stream = body.get("stream")
    if stream is None or isinstance(stream, bool):
        return bool(stream)
    _wrong("stream", "true or false", stream)


def _wants_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        _wrong("stream_options", "an object", options)
    return options.get("include_usage") is True


def _end_user(body: Mapping[str, Any]) -> str | None:
    user = body.get("safety_identifier") or body.get("user")
    return user[:128] if isinstance(user, str) else None


def own_options(body: dict[str, Any], headers: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Take Forebay's own options out of the body and the headers, and return them; the body wins.

    Raises ``InvalidRequest`` that names the key, and the header if that is where it stands.
    """
    options: dict[str, Any] = {}
    for name, value in headers.items():
        if name.startswith(_HEADER_PREFIX):
            _take_header(options, name[len(_HEADER_PREFIX) :].decode("latin-1").replace("-", "_"), value)
    own: Any = {}
    if "forebay" in body:
        own = body.pop("forebay")
        if not isinstance(own, dict):
            _wrong("forebay", "an object", own)
        options.update(own)
    for key, value in options.items():
        _check_option(key, value, is_header=key not in own)
    return options


def _take_header(options: dict[str, Any], key: str, value: bytes) -> None:
    text = value.decode("latin-1").strip()
    if key == "fallbacks":
        options[key] = [part.strip() for part in text.split(",") if part.strip()]
    elif key == "timeouts":
        options[key] = dict(_timeout_pair(part) for part in text.split(",") if part.strip())
    elif key == "deadline_ms" and text.isascii() and text.isdigit() and len(text) < 10:
        options[key] = int(text)
    else:
        options[key] = text


def _timeout_pair(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise InvalidRequest(
            "the header `x-forebay-timeouts` has to look like 'first_token=20,total=60'", param="x-forebay-timeouts"
        ) from None


def _check_option(key: str, value: Any, *, is_header: bool) -> None:
    if key not in _BUILT:
        told, param = _told(key, is_header=is_header)
        if key in _PLANNED:
            raise UnsupportedParameter(f"{told} is not available in this version", param=param)
        near = difflib.get_close_matches(key[:64], _BUILT, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(_BUILT)}"
        raise UnsupportedParameter(f"{told} is unknown; {hint}", param=param)
    if (wanted := _unmet(key, value)) is not None:
        told, param = _told(key, is_header=is_header)
        raise InvalidRequest(f"{told} has to be {wanted}", param=param)


def _told(key: str, *, is_header: bool) -> tuple[str, str]:
    """Return how an option is called in a message, and the ``param`` that it is."""
    param = f"forebay.{key[:64]}"
    return (f"`{param}` (the header `x-forebay-{key[:64].replace('_', '-')}`)" if is_header else f"`{param}`"), param


def _unmet(key: str, value: Any) -> str | None:
    """Return what an option has to be and is not; ``timeouts`` and ``fallbacks`` are looked at where they are used."""
    if key in _CHOICES:
        return None if value in _CHOICES[key] else f"one of {', '.join(_CHOICES[key])}"
    if key in _LABELS:
        return None if isinstance(value, str) and 0 < len(value) <= 128 else "a string of 1 to 128 characters"
    if key == "deadline_ms" and not (type(value) in {int, float} and 0 < value <= _LONGEST_DEADLINE_MS):
        return f"a number of milliseconds, more than 0 and at most {_LONGEST_DEADLINE_MS:,}"
    return None


def _timeouts(given: Any, model: Timeouts) -> Timeouts:
    """Return the request's deadlines: never longer than the model's ``total``."""
    if not isinstance(given, dict):
        _wrong("forebay.timeouts", "an object", given)
    chosen: dict[str, float] = {}
    for name, value in given.items():
        param = f"forebay.timeouts.{name[:64]}"
        if name not in _TIMEOUTS:
            raise UnsupportedParameter(f"`{param}` is unknown; known are {', '.join(_TIMEOUTS)}", param=param)
        if type(value) not in {int, float} or not 0 < value < math.inf:
            raise InvalidRequest(f"`{param}` has to be a positive number of seconds", param=param)
        chosen[name] = float(min(value, model.total))
    return msgspec.structs.replace(model, **chosen)


def _urgency(options: Mapping[str, Any], body: Mapping[str, Any], principal: Principal) -> Class:
    """Return the class that the request asks for, or the one its key caps it at."""
    tier = body.get("service_tier")
    wanted: Class = options.get("class") or (TIERS.get(tier, "standard") if isinstance(tier, str) else "standard")
    return max(wanted, principal.max_class, key=CLASSES.index)


def _fallbacks(given: Any, catalog: Catalog, principal: Principal) -> tuple[ModelName, ...]:
    if not isinstance(given, list) or len(given) > 8 or not all(isinstance(name, str) for name in given):
        raise InvalidRequest("`forebay.fallbacks` has to be an array of at most 8 models", param="forebay.fallbacks")
    return tuple(find_model({"model": name}, catalog, principal).name for name in given)
