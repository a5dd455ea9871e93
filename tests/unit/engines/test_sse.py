"""Engines' streams: bytes pass as they are, whatever the chunks; what is read of them is read right."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.chat import Endpoint, Usage
from core.errors import UpstreamBroken
from engines.drivers.metrics import gauge, labelled
from engines.drivers.sse import DONE, MAX_FRAME_BYTES, FrameBuffer, StreamReader, data_of, read_whole, split

RECORDINGS = Path(__file__).resolve().parents[2] / "vllm" / "recordings"
STREAMS = sorted(RECORDINGS.glob("*.sse"))
NEEDLES = [
    '"usage"',
    ',"usage":null',
    '"error"',
    "[DONE]",
    "data:",
    "\n\ndata: [DONE]\n\n",
    "usage",
    "error",
    "\\",
    "é🙂",
]
TEXTS = st.lists(st.sampled_from(NEEDLES) | st.text(max_size=5), max_size=4).map("".join)
CUTS = st.lists(st.integers(0, 4000), max_size=12)
STYLES = st.sampled_from([(",", ":"), (", ", ": ")])
NEWLINES = st.sampled_from(["\n", "\r\n"])


class Played(NamedTuple):
    out: bytes
    usage: Usage | None
    num_tokens: int
    error: Any
    is_done: bool


def pieces(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = [*sorted({min(cut, len(stream)) for cut in cuts}), len(stream)]
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


def play(
    stream: bytes, cuts: Iterable[int] = (), *, endpoint: Endpoint = Endpoint.CHAT, strips_usage: bool = False
) -> Played:
    """Return what a client gets of the stream, and what is known of it, if it comes in these pieces."""
    buffer, reader, out, num_tokens = FrameBuffer(), StreamReader(endpoint, strips_usage=strips_usage), b"", 0
    for piece in pieces(stream, cuts):
        if frames := buffer.feed(piece):
            out += reader.read(frames)
            num_tokens += reader.num_tokens
        if reader.error is not None:
            break
    return Played(out, reader.usage, num_tokens, reader.error, reader.is_done and reader.error is None)


def frame(event: Any, style: tuple[str, str] = (",", ":"), newline: str = "\n", name: str = "") -> bytes:
    head = f"event: {name}{newline}" if name else ""
    return f"{head}data: {json.dumps(event, separators=style, ensure_ascii=False)}{newline}{newline}".encode()


def delta(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}


LAST = {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
COUNTS = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}}
USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)


# --- chunks


@given(st.lists(TEXTS, max_size=5), CUTS, NEWLINES)
def test_frames_are_whole_and_their_bytes_are_those_that_came(texts: list[str], cuts: list[int], newline: str) -> None:
    stream = b"".join(frame(delta(text), newline=newline) for text in texts) + b"data: {"
    buffer = FrameBuffer()

    out = [buffer.feed(piece) for piece in pieces(stream, cuts)]

    assert b"".join(out) + buffer.rest == stream
    assert all(frames.endswith((newline * 2).encode()) for frames in out if frames)
    assert buffer.rest == b"data: {"


@given(st.binary(max_size=60) | st.text("\r\n :da", max_size=30).map(str.encode), CUTS)
def test_no_byte_is_lost_of_any_stream(stream: bytes, cuts: list[int]) -> None:
    buffer = FrameBuffer()

    out = b"".join(buffer.feed(piece) for piece in pieces(stream, cuts))

    assert out + buffer.rest == stream
    assert b"".join(split(stream)) == stream


def test_a_frame_without_end_is_an_error() -> None:
    buffer = FrameBuffer()

    with pytest.raises(UpstreamBroken):
        buffer.feed(b"x" * (MAX_FRAME_BYTES + 1))


def test_the_lines_of_a_frames_data_are_joined() -> None:
    assert data_of(b"event: x\r\ndata: a\r\n: no\r\ndata:b\r\n\r\n") == b"a\nb"
    assert data_of(b": ping\n\n") == b""


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
@pytest.mark.parametrize("strips_usage", [False, True])
@given(cuts=CUTS, crlf=st.booleans())
@settings(max_examples=8, deadline=None)
def test_a_recorded_stream_reads_the_same_in_any_pieces(
    path: Path, strips_usage: bool, cuts: list[int], crlf: bool
) -> None:
    stream = path.read_bytes().replace(b"\n", b"\r\n") if crlf else path.read_bytes()
    endpoint = endpoint_of(path)

    whole = play(stream, endpoint=endpoint, strips_usage=strips_usage)

    assert play(stream, cuts, endpoint=endpoint, strips_usage=strips_usage) == whole
    assert stream.startswith(whole.out) or strips_usage
    assert whole.is_done or whole.error


def endpoint_of(path: Path) -> Endpoint:
    kinds = {"messages": Endpoint.MESSAGES, "responses": Endpoint.RESPONSES, "completion": Endpoint.COMPLETIONS}
    return kinds.get(path.stem.split("_")[0], Endpoint.CHAT)


@pytest.mark.parametrize("path", [path for path in STREAMS if "died" not in path.stem], ids=lambda path: path.stem)
def test_a_recorded_stream_that_ended_well_passes_whole(path: Path) -> None:
    assert play(path.read_bytes(), endpoint=endpoint_of(path)).out == path.read_bytes()


def test_a_recorded_death_of_an_engine_is_an_error_and_hides_the_rest() -> None:
    played = play((RECORDINGS / "chat_stream_engine_died.sse").read_bytes(), strips_usage=True)

    assert played.error
    assert b"error" not in played.out


# --- taking out what we had asked for


@given(st.lists(TEXTS, min_size=1, max_size=5), CUTS, STYLES, NEWLINES)
@settings(max_examples=60)
def test_words_inside_the_text_mean_nothing(
    texts: list[str], cuts: list[int], style: tuple[str, str], newline: str
) -> None:
    stream = b"".join(frame(event, style, newline) for event in [*map(delta, texts), LAST]) + DONE

    played = play(stream, cuts, strips_usage=True)

    assert played == (stream, None, sum(map(bool, texts)), None, True)


@given(
    st.lists(TEXTS, min_size=1, max_size=4), CUTS, STYLES, NEWLINES, st.sampled_from(["null", "counts"]), st.booleans()
)
@settings(max_examples=60)
def test_without_the_usage_we_asked_for_a_stream_is_what_it_would_have_been(
    texts: list[str], cuts: list[int], style: tuple[str, str], newline: str, kind: str, is_first: bool
) -> None:
    usage = {"usage": None if kind == "null" else COUNTS}
    events = [*map(delta, texts), LAST]
    with_usage = [{**usage, **event} if is_first else {**event, **usage, "z": 1.50} for event in events]
    without = events if is_first else [{**event, "z": 1.50} for event in events]
    last = frame({"id": "c", "choices": [], "usage": COUNTS}, style, newline)

    played = play(b"".join(frame(event, style, newline) for event in with_usage) + last + DONE, cuts, strips_usage=True)

    assert played.out == b"".join(frame(event, style, newline) for event in without) + DONE
    assert played.usage == USAGE


def test_numbers_and_escapes_beside_a_usage_stay_as_they_are() -> None:
    usage = b',"usage":{"prompt_tokens":1}'
    stream = b'data: {"choices":[{"x":1.0e2,"t":"\\u00e9\\/"}]' + usage + b',"big":12345678901234567890123}\n\n'

    played = play(stream, strips_usage=True)

    assert played.out == stream.replace(usage, b"")


def test_a_usage_of_another_object_stays() -> None:
    inner = {"usage": COUNTS}
    stream = frame({"choices": [{}], "inner": inner, "usage": COUNTS})

    assert play(stream, strips_usage=True).out == frame({"choices": [{}], "inner": inner})


def test_a_client_that_asked_for_usage_gets_it() -> None:
    stream = frame(delta("a", usage=None)) + frame({"id": "c", "choices": [], "usage": COUNTS}) + DONE

    assert play(stream).out == stream
    assert play(stream).usage == USAGE


# --- the end


def test_what_follows_the_last_word_is_dropped() -> None:
    stream = frame(delta("a")) + DONE

    for cuts in ([], [len(stream)], range(200)):
        assert play(stream + DONE + frame(delta("b")), cuts)[:3] == (stream, None, 1)


@pytest.mark.parametrize("event", [{"error": {"message": "x"}}, {"type": "error", "error": {"type": "y"}}])
def test_an_error_event_ends_the_stream_before_it(event: dict[str, Any]) -> None:
    played = play(frame(delta("a")) + frame(event) + frame(delta("b")))

    assert (played.out, played.error) == (frame(delta("a")), event["error"])


@pytest.mark.parametrize("error", [None, {}, "", False])
def test_an_error_that_is_none_is_no_error(error: object) -> None:
    stream = frame(delta("a", error=error))

    assert play(stream)[0::3] == (stream, None)


def test_a_finished_stream_without_its_last_word_is_given_one() -> None:
    reader = StreamReader(Endpoint.CHAT, strips_usage=False)
    reader.read(frame(LAST))
    was_done = reader.is_done

    assert (was_done, reader.close(), reader.is_done, reader.close()) == (False, DONE, True, b"")


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.MESSAGES, Endpoint.RESPONSES])
def test_a_stream_that_breaks_off_is_an_error(endpoint: Endpoint) -> None:
    reader = StreamReader(endpoint, strips_usage=False)
    reader.read(frame({"type": "content_block_delta", **delta("finish_reason")}))

    with pytest.raises(UpstreamBroken):
        reader.close()


@pytest.mark.parametrize("first", [b"data: {nonsense\n\n", b"data: \xff\n\n", b'data: {"a":"\xff"}\n\n'])
def test_a_first_event_that_is_no_json_is_an_error(first: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        play(first)


@pytest.mark.parametrize("end", ["response.completed", "response.incomplete", "response.failed"])
def test_a_responses_stream_ends_with_its_own_event(end: str) -> None:
    stream = frame({"type": "response.output_text.delta", "delta": "a"}) + frame({"type": end, "response": {}})

    assert play(stream, endpoint=Endpoint.RESPONSES)[2:] == (1, None, True)


# --- usage


def test_anthropic_tells_the_prompt_first_and_the_answer_last() -> None:
    start = {"input_tokens": 5, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 100, "output_tokens": 1}
    stream = (
        frame({"type": "message_start", "message": {"id": "m", "usage": start}}, name="message_start")
        + frame({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 9}}, name="message_delta")
        + frame({"type": "message_stop"}, name="message_stop")
    )

    played = play(stream, endpoint=Endpoint.MESSAGES)

    assert played.usage == Usage(prompt_tokens=125, completion_tokens=9, cached_tokens=20)
    assert (played.out, played.is_done) == (stream, True)


def test_a_recorded_messages_stream_counts_cached_tokens_once() -> None:
    played = play((RECORDINGS / "messages_stream.sse").read_bytes(), endpoint=Endpoint.MESSAGES)

    assert played.usage == Usage(prompt_tokens=33, completion_tokens=8, cached_tokens=32)


def test_responses_tell_their_usage_in_the_last_event() -> None:
    usage = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 3}
    stream = frame({"type": "response.created", "response": {"usage": None, "error": None}})
    stream += frame({"type": "response.completed", "response": {"usage": usage, "error": None}})

    assert play(stream, endpoint=Endpoint.RESPONSES).usage == Usage(7, 3, 4)


def test_continuous_usage_keeps_the_last_count() -> None:
    played = play((RECORDINGS / "chat_stream_continuous_usage.sse").read_bytes(), strips_usage=True)

    assert played.usage == Usage(prompt_tokens=33, completion_tokens=8, cached_tokens=32)
    assert b'"usage"' not in played.out


def test_a_whole_answer_is_metered() -> None:
    assert read_whole(json.dumps({"usage": COUNTS}).encode()).merged_usage(None) == USAGE
    assert read_whole(b'{"id":"x"}').merged_usage(None) is None


@pytest.mark.parametrize(
    "body", [b'{"usage":"none"}', b'{"usage":{"prompt_tokens":1.5}}', b'{"message":"a","response":[]}']
)
def test_a_whole_answer_of_another_shape_is_not_metered_and_not_refused(body: bytes) -> None:
    assert read_whole(body).merged_usage(None) is None


def test_an_error_in_an_answer_of_another_shape_is_seen() -> None:
    assert read_whole(b'{"message":"a","error":{"code":1}}').error == {"code": 1}


@pytest.mark.parametrize("body", [b"", b"[]", b'"x"', b"{", b"null", b'{"a":"\xff"}x', b"<html>"])
def test_an_answer_that_is_no_object_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        read_whole(body)


# --- metrics


def test_a_gauge_is_summed_over_its_label_sets() -> None:
    text = '# HELP a x\na{l="1 }"} 2\na{l="2"} 3.5 1700000000000\na_total 9\nab 7\n'

    assert gauge(text, "a") == 5.5
    assert gauge(text, "missing") is None


@pytest.mark.parametrize("line", ["a NaN", "a +Inf", "a x", "a", "a{", "a{}"])
def test_what_is_no_finite_number_is_unknown(line: str) -> None:
    assert gauge(line, "a") is None


def test_the_gauges_of_a_real_vllm_are_read() -> None:
    text = (RECORDINGS / "metrics.txt").read_text()

    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert gauge(text, name) == 0.0
    assert labelled(text, "vllm:cache_config_info", "num_gpu_blocks", "block_size") == 46592


def test_labels_that_are_numbers_are_multiplied_and_summed_over_engines() -> None:
    text = 'a_total{x="9"} 1\na{x="2",y="3",z="None"} 1.0\na{y="5",x="4"} 1.0\n'

    assert labelled(text, "a", "x", "y") == 26.0
    assert labelled(text, "a", "x", "z") is None
    assert labelled(text, "b", "x") is None
