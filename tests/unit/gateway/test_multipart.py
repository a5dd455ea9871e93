"""Forms with files, as clients send them."""

import httpx
import pytest

from core.errors import InvalidRequest
from gateway.api.multipart import Field, fields_of


def form(*parts: bytes, boundary: bytes = b"b") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def part(content: bytes, disposition: bytes = b'form-data; name="file"; filename="x.jsonl"') -> bytes:
    return b"Content-Disposition: " + disposition + b"\r\nContent-Type: x/y\r\n\r\n" + content


def test_what_a_client_sends_is_read() -> None:
    content = bytes(range(256)) * 3 + b"\r\n--not-the-boundary\r\n"
    request = httpx.Request(
        "POST", "http://x", data={"purpose": "batch"}, files={"file": ("é “1”.jsonl", content, "application/jsonl")}
    )
    purpose, file = fields_of(request.headers["content-type"], request.read())
    assert purpose == Field("purpose", None, b"batch")
    assert (file.name, file.content) == ("file", content)
    assert file.filename is not None
    assert file.filename.endswith(".jsonl")


def test_a_field_may_be_empty_and_text_may_stand_before_the_first() -> None:
    body = b"hello\r\n" + form(part(b""), part(b"x", b"form-data; name=purpose"))
    assert fields_of("multipart/form-data; boundary=b", body) == (
        Field("file", "x.jsonl", b""),
        Field("purpose", None, b"x"),
    )


def test_a_form_without_fields_is_one() -> None:
    assert fields_of('multipart/form-data; boundary="b"', b"--b--\r\n") == ()


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("", form(part(b"x"))),
        ("application/json", form(part(b"x"))),
        ("multipart/form-data", form(part(b"x"))),
        ("multipart/form-data; boundary=" + "b" * 71, form(part(b"x"), boundary=b"b" * 71)),
        ("multipart/form-data; boundary=c", form(part(b"x"))),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", form(part(b"x"))[:-7]),
        ("multipart/form-data; boundary=b", b"--b"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=file\r\n--b--"),
        ("multipart/form-data; boundary=b", form(part(b"x", b"form-data"))),
        ("multipart/form-data; boundary=b", form(b"\r\nx")),
        ("multipart/form-data; boundary=b", form(part(b"x", b"form-data; name=" + b"n" * 9000))),
        ("multipart/form-data; boundary=b", form(*[part(b"x")] * 33)),
    ],
)
def test_what_is_no_form_is_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        fields_of(content_type, body)
