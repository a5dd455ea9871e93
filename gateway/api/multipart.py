"""Forms with files (``multipart/form-data``, RFC 7578), from a body that is in memory already, and bounded."""

from email.message import Message
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value

import msgspec

from core.errors import InvalidRequest

_MOST_FIELDS = 32
_LONGEST_HEAD = 8192
_LONGEST_BOUNDARY = 70
_END_OF_HEAD = b"\r\n\r\n"


class Field(msgspec.Struct, frozen=True):
    """One field of a form. ``filename``: of a file."""

    name: str
    filename: str | None
    content: bytes


def fields_of(content_type: str, body: bytes) -> tuple[Field, ...]:
    """Return the fields in their order. Raises ``InvalidRequest`` for what is no such form."""
    delimiter = b"--" + _boundary(content_type)
    fields: list[Field] = []
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if at == 1:  # not found
        raise InvalidRequest("the form has no field, or its boundary is not the one in Content-Type")
    while not body.startswith(b"--", at := at + len(delimiter)):
        if len(fields) == _MOST_FIELDS:
            raise InvalidRequest(f"the form has more than {_MOST_FIELDS} fields")
        begin = body.find(_END_OF_HEAD, at, at + _LONGEST_HEAD)
        end = body.find(b"\r\n" + delimiter, begin + len(_END_OF_HEAD))
        if begin < 0 or end < 0:
            raise InvalidRequest("the form ends in the middle of a field")
        fields.append(_field(body[at:begin], body[begin + len(_END_OF_HEAD) : end]))
        at = end + 2
    return tuple(fields)


def _boundary(content_type: str) -> bytes:
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_boundary()
    if header.get_content_type() != "multipart/form-data" or not boundary or len(boundary) > _LONGEST_BOUNDARY:
        raise InvalidRequest("the body has to be a form with a file: Content-Type: multipart/form-data; boundary=…")
    return boundary.encode("latin-1", "replace")


def _field(head: bytes, content: bytes) -> Field:
    header = HeaderParser().parsestr(head.decode("utf-8", "replace").strip())
    name = header.get_param("name", header="content-disposition")
    if name is None:
        raise InvalidRequest("a field of the form has no name: Content-Disposition: form-data; name=…")
    return Field(collapse_rfc2231_value(name), header.get_filename(), content)
