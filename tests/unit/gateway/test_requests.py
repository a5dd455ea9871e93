"""From bytes to a call: what is checked, what is ours, and what passes untouched."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.chat import Call, Endpoint, Timeouts
from core.errors import InvalidJson, InvalidRequest, ModelNotAllowed, UnknownModel, UnsupportedParameter
from core.ids import ModelName, RequestId
from gateway.auth import Principal
from gateway.requests import parse_body, read_call, request_id_of
from routing.catalog import Catalog, Model
from tests.fakes.tenancy import principal

BIG, SMALL = ModelName("big"), ModelName("small")
CATALOG = Catalog(
    (
        Model(name=BIG, aliases=("gpt-4o",), fallbacks=(SMALL,), timeouts=Timeouts(total=100.0)),
        Model(name=SMALL),
    )
)
ALL = principal()
ONLY_BIG = principal([BIG])
HELLO = {"model": "big", "messages": [{"role": "user", "content": "Hello"}]}
PROMPTS: dict[Endpoint, dict[str, Any]] = {
    Endpoint.CHAT: HELLO,
    Endpoint.COMPLETIONS: {"model": "big", "prompt": "Hello"},
    Endpoint.EMBEDDINGS: {"model": "big", "input": ["Hello"]},
    Endpoint.RESPONSES: {"model": "big", "input": "Hello"},
    Endpoint.MESSAGES: HELLO,
}


def read(
    body: object,
    headers: dict[str, str] | None = None,
    *,
    endpoint: Endpoint = Endpoint.CHAT,
    caller: Principal = ALL,
) -> Call:
    return read_call(
        endpoint,
        body if isinstance(body, bytes) else json.dumps(body).encode(),
        {name.encode(): value.encode() for name, value in (headers or {}).items()},
        request_id=RequestId("req_1"),
        principal=caller,
        catalog=CATALOG,
    )


def chat(headers: dict[str, str] | None = None, **more: Any) -> Call:
    return read({**HELLO, **more}, headers)


def own(headers: dict[str, str] | None = None, **options: Any) -> Call:
    return chat(headers, forebay=options)


def refusal(endpoint: Endpoint = Endpoint.CHAT, /, **more: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read({**PROMPTS[endpoint], **more}, endpoint=endpoint)
    return caught.value


# --- what passes


def test_a_request_becomes_a_call() -> None:
    call = chat(max_tokens=50, stream=True, n=2, stream_options={"include_usage": True})

    assert (call.model, call.stream, call.wants_usage, call.max_tokens) == (BIG, True, True, 100)
    assert (call.context.tenant, call.fallbacks, call.timeouts.total) == ("acme", (SMALL,), 100.0)
    assert call.prompt_tokens_estimate == len(json.dumps(call.body)) // 4


def test_an_alias_stands_for_its_model_and_the_body_keeps_it() -> None:
    call = chat(model="gpt-4o")

    assert (call.model, call.body["model"]) == (BIG, "gpt-4o")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KNOWN = ["model", "messages", "prompt", "input", "stream", "stream_options", "n", "max_tokens", "user", "forebay"]
OPTIONS = ["session", "timeouts", "fallbacks", "cache", "total", "idle", "end_user"]
NEAR_VALUES = JSON_VALUES | st.sampled_from(
    ["big", "small", [{"role": "user"}], 10**400, -1, {"timeouts": {"total": 9**999}}]
)
NEAR_BODIES = st.dictionaries(
    st.sampled_from(KNOWN), NEAR_VALUES | st.dictionaries(st.sampled_from(OPTIONS), NEAR_VALUES, max_size=2), max_size=6
)


@given(st.dictionaries(st.text(min_size=1).map("x{}".format), JSON_VALUES, max_size=4))
def test_unknown_fields_pass_untouched(unknown: dict[str, Any]) -> None:
    raw = json.dumps({**HELLO, **unknown}).encode()

    assert read(raw).body == msgspec.json.decode(raw)


@given(JSON_VALUES | NEAR_BODIES | NEAR_BODIES.map(lambda body: {**HELLO, **body}), st.sampled_from(list(Endpoint)))
@settings(max_examples=300)
def test_any_json_is_a_call_or_an_invalid_request(body: object, endpoint: Endpoint) -> None:
    outcome = outcome_of(body, endpoint)

    if isinstance(outcome, InvalidRequest):
        assert 0 < len(outcome.message) < 1000
    else:
        assert isinstance(body, dict)
        assert outcome.body == {name: value for name, value in body.items() if name not in {"forebay", "priority"}}
        msgspec.json.encode(outcome.body)


def outcome_of(body: object, endpoint: Endpoint) -> Call | InvalidRequest:
    try:
        return read(body, endpoint=endpoint)
    except InvalidRequest as error:
        return error


@given(st.binary(max_size=40) | st.text('{}[]":,01e-+\\u d8', max_size=40).map(str.encode))
def test_any_bytes_are_a_call_or_an_invalid_request(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read(raw)


@pytest.mark.parametrize(
    "raw", [b"", b"[1]", b"nonsense", b'{"a":1', b'"\xff"', b'{"a":"\\ud800"}', b"9" * 9999, b'{"a":' * 99999, b"null"]
)
def test_what_is_no_json_object_is_told_so(raw: bytes) -> None:
    with pytest.raises(InvalidJson):
        parse_body(raw)


def test_what_is_ours_does_not_reach_the_engine() -> None:
    call = chat(priority=3, forebay={"session": "s"}, user="u")

    assert call.body == {**HELLO, "user": "u"}


# --- checks


@pytest.mark.parametrize("model", [None, "", 1, ["big"]])
def test_a_model_has_to_be_named(model: object) -> None:
    error = refusal(model=model)

    assert (error.param, type(error)) == ("model", InvalidRequest)


def test_an_unknown_model_is_told_with_the_nearest_name() -> None:
    with pytest.raises(UnknownModel, match="did you mean 'small'"):
        chat(model="smal")
    with pytest.raises(UnknownModel, match="GET /v1/models"):
        chat(model="something else")


def test_a_hint_names_no_model_that_the_key_may_not_see() -> None:
    with pytest.raises(UnknownModel, match="GET /v1/models"):
        read({**HELLO, "model": "smal"}, caller=ONLY_BIG)


def test_an_error_repeats_no_long_name() -> None:
    assert len(refusal(model="m" * 100_000).message) < 300
    assert len(refusal(forebay={"k" * 100_000: 1}).message) < 300
    assert len(refusal(forebay={"timeouts": {"k" * 100_000: 1}}).message) < 300


def test_a_key_opens_its_models_alone() -> None:
    with pytest.raises(ModelNotAllowed):
        read({**HELLO, "model": "small"}, caller=ONLY_BIG)

    assert read(HELLO, caller=ONLY_BIG).fallbacks == ()


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ([], "messages"),
        ([HELLO, 1], "messages[0]"),
        ([{"role": 1}], "messages[0]"),
    ],
)
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.MESSAGES])
def test_messages_are_a_list_of_objects_with_roles(messages: object, param: str, endpoint: Endpoint) -> None:
    assert refusal(endpoint, messages=messages).param == param


@pytest.mark.parametrize("endpoint", [Endpoint.COMPLETIONS, Endpoint.EMBEDDINGS, Endpoint.RESPONSES])
@pytest.mark.parametrize("value", [1, {}, True])
def test_a_prompt_is_text_or_an_array(endpoint: Endpoint, value: object) -> None:
    field = "prompt" if endpoint is Endpoint.COMPLETIONS else "input"

    assert "has to be a string or an array" in refusal(endpoint, **{field: value}).message


@pytest.mark.parametrize(("endpoint", "field"), [(Endpoint.COMPLETIONS, "prompt"), (Endpoint.EMBEDDINGS, "input")])
def test_a_missing_prompt_is_told(endpoint: Endpoint, field: str) -> None:
    assert refusal(endpoint, **{field: None}).message == f"`{field}` is missing"


def test_a_responses_request_may_have_no_input() -> None:
    assert read({"model": "big", "prompt": {"id": "p"}}, endpoint=Endpoint.RESPONSES).model == BIG


@pytest.mark.parametrize("number", [0, -1, 129, 1.5, "2", True, 10**400])
def test_the_number_of_choices_is_bounded(number: object) -> None:
    assert refusal(n=number).param == "n"


@pytest.mark.parametrize("limit", [0, -1, 1.5, "9", True])
@pytest.mark.parametrize(
    ("endpoint", "field"),
    [
        (Endpoint.CHAT, "max_tokens"),
        (Endpoint.CHAT, "max_completion_tokens"),
        (Endpoint.RESPONSES, "max_output_tokens"),
        (Endpoint.MESSAGES, "max_tokens"),
    ],
)
def test_a_limit_is_a_positive_whole_number(endpoint: Endpoint, field: str, limit: object) -> None:
    assert refusal(endpoint, **{field: limit}).param == field


def test_only_a_completion_may_ask_for_no_token_at_all() -> None:
    assert read({"model": "big", "prompt": "x", "max_tokens": 0}, endpoint=Endpoint.COMPLETIONS).max_tokens == 0


def test_without_a_limit_a_length_is_guessed_and_embeddings_have_none() -> None:
    assert chat().max_tokens > 0
    assert read(PROMPTS[Endpoint.EMBEDDINGS], endpoint=Endpoint.EMBEDDINGS).max_tokens == 0


@pytest.mark.parametrize(("field", "value"), [("stream", 1), ("stream", "yes"), ("stream_options", [])])
def test_stream_and_its_options_have_their_types(field: str, value: object) -> None:
    assert refusal(**{field: value}).param == field


# --- our own options


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_our_object_is_an_object(value: object) -> None:
    assert refusal(forebay=value).param == "forebay"


@pytest.mark.parametrize("key", ["cache", "route", "examples", "kv"])
def test_what_is_not_built_yet_is_refused_by_name(key: str) -> None:
    error = refusal(forebay={key: {}})

    assert (type(error), error.param) == (UnsupportedParameter, f"forebay.{key}")


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    assert "did you mean `session`?" in refusal(forebay={"sesion": "x"}).message
    assert "known are" in refusal(forebay={"zzz": 1}).message


@pytest.mark.parametrize("label", ["end_user", "session", "program", "run", "stage"])
def test_labels_are_short_strings(label: str) -> None:
    assert getattr(chat(forebay={label: "x" * 128}).context, label) == "x" * 128
    for wrong in ("", "x" * 129, 1, None, ["x"]):
        assert refusal(forebay={label: wrong}).param == f"forebay.{label}"


@pytest.mark.parametrize("label", ["end-user", "session", "program", "run", "stage"])
def test_headers_are_twins_of_options_and_the_body_wins(label: str) -> None:
    header = {f"x-forebay-{label}": "from-header"}
    key = label.replace("-", "_")

    assert getattr(chat(header).context, key) == "from-header"
    assert getattr(chat(header, forebay={key: "from-body"}).context, key) == "from-body"


def test_an_unknown_header_of_ours_is_refused() -> None:
    with pytest.raises(UnsupportedParameter, match=r"the header `x-forebay-sesion`.*did you mean `session`"):
        chat({"x-forebay-sesion": "x"})


def test_objective_and_deadline_are_said_in_the_body_or_in_headers() -> None:
    nothing = chat().context
    assert (nothing.objective, nothing.deadline_s) == (None, None)
    said = own(objective="throughput", deadline_ms=1500.5).context
    assert (said.objective, said.deadline_s) == ("throughput", 1.5005)
    headers = {"x-forebay-objective": "latency", "x-forebay-deadline-ms": " 250 ", "x-forebay-class": "batch"}
    told = chat(headers).context
    assert (told.objective, told.deadline_s, told.urgency) == ("latency", 0.25, "batch")
    both = chat(headers, forebay={"deadline_ms": 9000}).context
    assert (both.objective, both.deadline_s) == ("latency", 9.0)


@pytest.mark.parametrize("value", [0, -1, True, None, "5", [], 86_400_001, 10**400])
def test_a_deadline_is_a_number_of_milliseconds(value: object) -> None:
    assert refusal(forebay={"deadline_ms": value}).param == "forebay.deadline_ms"


@pytest.mark.parametrize(
    ("header", "value"),
    [("deadline-ms", "soon"), ("deadline-ms", "-1"), ("deadline-ms", "0"), ("deadline-ms", "9" * 30),
     ("deadline-ms", "nan"), ("deadline-ms", "²"), ("objective", "both"), ("class", "urgent"), ("session", ""),
     ("end-user", "x" * 129)],
)  # fmt: skip
def test_a_wrong_header_is_told_with_its_key(header: str, value: str) -> None:
    key = header.replace("-", "_")
    with pytest.raises(InvalidRequest) as caught:
        read_call(
            Endpoint.CHAT, json.dumps(HELLO).encode(), {b"x-forebay-" + header.encode(): value.encode("latin-1")},
            request_id=RequestId("req_1"), principal=ALL, catalog=CATALOG,
        )  # fmt: skip
    assert caught.value.param == f"forebay.{key}"
    assert f"`forebay.{key}` (the header `x-forebay-{header}`)" in caught.value.message


def test_a_wrong_header_does_not_matter_where_the_body_says_it() -> None:
    assert chat({"x-forebay-objective": "both"}, forebay={"objective": "latency"}).context.objective == "latency"
    wrong = refusal(forebay={"objective": "both"})
    assert "header" not in wrong.message


def test_the_end_user_may_come_from_openais_fields() -> None:
    assert chat(user="u", safety_identifier="s").context.end_user == "s"
    assert chat(user="u").context.end_user == "u"
    assert own(end_user="o").context.end_user == "o"
    assert chat(user=5).context.end_user is None


def test_timeouts_are_set_one_by_one_and_never_exceed_the_models_total() -> None:
    timeouts = own(timeouts={"first_token": 3, "idle": 1e9, "total": 10**400}).timeouts

    assert timeouts == Timeouts(first_token=3.0, idle=100.0, total=100.0)


def test_timeouts_in_a_header_look_like_pairs() -> None:
    assert chat({"x-forebay-timeouts": "first_token=2.5, total=9"}).timeouts == Timeouts(first_token=2.5, total=9.0)
    for wrong in ("first_token", "total=x", "=", "total=nan", "total=inf", "total=-1", "zzz=1"):
        with pytest.raises(InvalidRequest):
            chat({"x-forebay-timeouts": wrong})


@pytest.mark.parametrize("value", [0, -1, "3", True, None, [], -(10**400)])
def test_a_timeout_is_a_positive_number(value: object) -> None:
    assert refusal(forebay={"timeouts": {"idle": value}}).param == "forebay.timeouts.idle"


@pytest.mark.parametrize("value", [[], "total=1", 5, None])
def test_timeouts_are_an_object(value: object) -> None:
    assert refusal(forebay={"timeouts": value}).param == "forebay.timeouts"


def test_a_request_without_timeouts_of_its_own_says_so() -> None:
    assert not chat().has_own_timeouts
    assert own(timeouts={"idle": 1}).has_own_timeouts


def test_fallbacks_are_models_that_the_key_may_use() -> None:
    assert own(fallbacks=["small", "gpt-4o"]).fallbacks == (SMALL, BIG)
    assert chat({"x-forebay-fallbacks": "small, big"}).fallbacks == (SMALL, BIG)
    assert own(fallbacks=[]).fallbacks == ()
    with pytest.raises(UnknownModel):
        own(fallbacks=["nobody"])
    with pytest.raises(ModelNotAllowed):
        read({**HELLO, "forebay": {"fallbacks": ["small"]}}, caller=ONLY_BIG)


@pytest.mark.parametrize("value", ["small", {}, None, ["small"] * 9, [1], [["small"]]])
def test_fallbacks_are_a_short_array_of_names(value: object) -> None:
    assert refusal(forebay={"fallbacks": value}).param == "forebay.fallbacks"


# --- headers


@pytest.mark.parametrize(
    ("given_id", "taken"), [("abc-1.2_3", True), ("a b", False), ("", False), ("x" * 129, False), ("a/0", False)]
)
def test_a_clients_request_id_is_taken_if_it_is_sane(given_id: str, taken: bool) -> None:
    assert request_id_of({b"x-request-id": given_id.encode()}) == (given_id if taken else None)
    assert request_id_of({}) is None


def test_a_trace_is_passed_on_if_it_is_one() -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"

    assert chat({"traceparent": trace}).traceparent == trace
    assert chat({"traceparent": trace + "\r\nx: y"}).traceparent is None


@pytest.mark.parametrize(
    ("asked", "cap", "given"),
    [
        ({}, "interactive", "standard"),
        ({"forebay": {"class": "interactive"}}, "interactive", "interactive"),
        ({"forebay": {"class": "interactive"}}, "standard", "standard"),
        ({"forebay": {"class": "batch"}}, "standard", "batch"),
        ({}, "batch", "batch"),
        ({"service_tier": "priority"}, "interactive", "interactive"),
        ({"service_tier": "flex"}, "interactive", "batch"),
        ({"service_tier": "auto"}, "interactive", "standard"),
        ({"service_tier": "flex", "forebay": {"class": "standard"}}, "interactive", "standard"),
    ],
)
def test_a_request_is_as_urgent_as_it_asks_and_its_key_allows(asked: dict[str, Any], cap: Any, given: str) -> None:
    assert read({**HELLO, **asked}, caller=principal(max_class=cap)).context.urgency == given


def test_a_class_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="one of interactive, standard, batch"):
        chat(forebay={"class": "urgent"})
