"""Tokens, answers and embeddings that need no model and no state: every value is a function of its text.

Ids are packed text, so any process can read what another one wrote: up to six characters of `_ALPHABET`, else
up to three UTF-8 bytes, stand in one id below 2**31. A word of the answers with its leading space is one token.
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import sqrt
from typing import NamedTuple

_ALPHABET = " abcdefghijklmnopqrstuvwxyz.,'-\n"
_DIGIT = {letter: number for number, letter in enumerate(_ALPHABET, start=1)}
_LETTER_BASE = len(_ALPHABET) + 1
_LETTERS_PER_ID = 6
_BYTE_BASE = 257
_BYTES_PER_ID = 3
_LETTERS_FROM = _BYTE_BASE**_BYTES_PER_ID
_IDS_END = _LETTERS_FROM + _LETTER_BASE**_LETTERS_PER_ID
_PIECE = re.compile(r" ?\S+|\s")
_LONGEST_CACHED_PIECE = 32

_FIRST = ["ba", "de", "fi", "go", "ha", "ke", "li", "mo", "na", "pe", "ri", "so", "ta", "ve", "wi", "zo"]
_SECOND = [
    *("ban", "cor", "del", "fin", "gar", "hem", "jus", "kin"),
    *("lor", "mat", "nes", "pol", "ran", "sit", "ton", "ver"),
]
WORDS: tuple[str, ...] = tuple(first + second for first in _FIRST for second in _SECOND)


class InvalidTokenError(ValueError):
    """An id that no text is encoded to."""


class Piece(NamedTuple):
    """One token of an answer: the text it adds to the stream and its id."""

    text: str
    id: int


def _pack(digits: Sequence[int], base: int) -> int:
    number = 0
    for digit in reversed(digits):
        number = number * base + digit
    return number


def _unpack(number: int, base: int) -> Iterator[int]:
    while number:
        number, digit = divmod(number, base)
        if digit:
            yield digit


def _piece_ids(piece: str) -> tuple[int, ...]:
    if all(letter in _DIGIT for letter in piece):
        digits = [_DIGIT[letter] for letter in piece]
        starts = range(0, len(digits), _LETTERS_PER_ID)
        return tuple(_LETTERS_FROM + _pack(digits[at : at + _LETTERS_PER_ID], _LETTER_BASE) for at in starts)
    octets = [octet + 1 for octet in piece.encode("utf-8", "replace")]
    starts = range(0, len(octets), _BYTES_PER_ID)
    return tuple(_pack(octets[at : at + _BYTES_PER_ID], _BYTE_BASE) for at in starts)


_cached_piece_ids = lru_cache(maxsize=65536)(_piece_ids)


def encode(text: str) -> list[int]:
    """Return the ids of `text`; `decode` gives the text back."""
    ids: list[int] = []
    for piece in _PIECE.findall(text):
        ids.extend(_cached_piece_ids(piece) if len(piece) <= _LONGEST_CACHED_PIECE else _piece_ids(piece))
    return ids


@lru_cache(maxsize=65536)
def token_bytes(token: int) -> bytes:
    """Return the UTF-8 bytes of one id, which may end inside a character."""
    if not 0 < token < _IDS_END:
        raise InvalidTokenError(f"Token id {token} is out of vocabulary")
    if token < _LETTERS_FROM:
        return bytes(digit - 1 for digit in _unpack(token, _BYTE_BASE))
    letters = _unpack(token - _LETTERS_FROM, _LETTER_BASE)
    return "".join(_ALPHABET[digit - 1] for digit in letters).encode()


def decode(ids: Iterable[int]) -> str:
    """Return the text of `ids`; raises InvalidTokenError for an id outside the vocabulary."""
    return b"".join(map(token_bytes, ids)).decode("utf-8", "replace")


def pieces_of(ids: Iterable[int]) -> list[Piece]:
    """Split `ids` into pieces whose texts join to `decode(ids)`.

    As engines do it: tokens that end inside a character are held back, with all their text, until it is whole.
    """
    pieces: list[Piece] = []
    held = b""
    for token in ids:
        held += token_bytes(token)
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            if error.end == len(held) and "unexpected end" in error.reason:
                pieces.append(Piece("", token))
                continue
            text = held.decode("utf-8", "replace")
        pieces.append(Piece(text, token))
        held = b""
    if held:
        pieces[-1] = Piece(held.decode("utf-8", "replace"), pieces[-1].id)
    return pieces


_AFTER_SPACE = tuple(encode(" " + word)[0] for word in WORDS)
_AT_LINE_START = tuple(encode(word)[0] for word in WORDS)
# Words of several tokens, which part inside a character.
_GLYPHS = tuple(tuple(encode(f" {word}")) for word in ("🙂", "世界", "日本語", "über", "ж"))
_REST_OF_GLYPH = {ids[at]: ids[at + 1] for ids in _GLYPHS for at in range(len(ids) - 1)}
_GLYPH_EVERY = 4
_ANSWER_IDS = frozenset(_AFTER_SPACE + _AT_LINE_START + sum(_GLYPHS, ()))


@dataclass(frozen=True, slots=True)
class Author:
    """Writes an endless answer in which each word depends on every token before it.

    Two authors with one salt write the same; `voice` separates the choices of one request. With `has_glyphs`, one
    word in four is of several tokens.
    """

    salt: str = ""
    has_glyphs: bool = False

    def words(self, ids: Sequence[int], voice: int = 0) -> Iterator[int]:
        """Yield the ids which follow `ids`, without end."""
        state = self._state(ids, voice)
        last = ids[-1] if ids else None
        while True:
            last = self._next_id(state, last)
            yield last
            state.update(_octets((last,)))

    def already_written(self, ids: Sequence[int], voice: int = 0) -> int:
        """Return how many tokens at the end of `ids` this author wrote, so that an answer ends once only."""
        start = len(ids)
        while start and ids[start - 1] in _ANSWER_IDS:
            start -= 1
        if start == len(ids):
            return 0
        state = self._state(ids[:start], voice)
        last = ids[start - 1] if start else None
        run = 0
        for token in ids[start:]:
            run = run + 1 if token == self._next_id(state, last) else 0
            state.update(_octets((token,)))
            last = token
        return run

    def write(self, ids: Sequence[int], length: int, voice: int = 0) -> list[int]:
        """Return the `length` ids that follow `ids`."""
        return list(islice(self.words(ids, voice), length))

    def _state(self, ids: Sequence[int], voice: int) -> "hashlib.blake2b":
        state = hashlib.blake2b(f"{self.salt}|{voice}|".encode(), digest_size=1)
        state.update(_octets(ids))
        return state

    def _next_id(self, state: "hashlib.blake2b", last: int | None) -> int:
        if self.has_glyphs and last in _REST_OF_GLYPH:
            return _REST_OF_GLYPH[last]
        # Chosen so that encode(text so far) always equals the ids so far: after a newline, encode puts no space.
        at_line_start = last is None or token_bytes(last).endswith(b"\n")
        lot = state.digest()[0]
        if self.has_glyphs and not at_line_start and lot % _GLYPH_EVERY == 0:
            return _GLYPHS[lot // _GLYPH_EVERY % len(_GLYPHS)][0]
        return (_AT_LINE_START if at_line_start else _AFTER_SPACE)[lot]


def _octets(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


@lru_cache(maxsize=16384)
def _word_vector(word: str, dims: int) -> tuple[int, ...]:
    return tuple(octet - 128 for octet in hashlib.shake_128(word.encode()).digest(dims))


def embed(text: str, dims: int) -> list[float]:
    """Return a unit vector of `text`; texts that share words are near each other."""
    total = [0.0] * dims
    for word in re.findall(r"\w+", text.lower()) or [text]:
        total = [a + b for a, b in zip(total, _word_vector(word, dims), strict=True)]
    norm = sqrt(sum(value * value for value in total)) or 1.0
    return [value / norm for value in total]
