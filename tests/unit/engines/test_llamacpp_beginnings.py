"""Beginnings of prompts in files: whose they are, which one makes room, and what becomes of a file that failed."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from core.errors import ForebayError, UpstreamBroken, WorkerLost
from core.ids import TenantId
from engines.drivers.llamacpp_beginnings import WORTH, Beginnings, parts
from engines.drivers.wire import Wire

A, B = TenantId("a"), TenantId("b")
SYSTEM = b"s" * WORTH


class Engine(Wire):
    """Answers as llama.cpp does, and notes what it was asked; ``fails`` says what instead."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", None)
        self.asked: list[tuple[str, str]] = []
        self.fails: Callable[[str], ForebayError | None] = lambda path: None
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def ask(self, path: str, body: Any = None, *, timeout_s: float = 2.0) -> Any:
        self.asked.append((path, body["filename"]))
        await self.may_answer.wait()
        if error := self.fails(path):
            raise error
        return {"n_saved": 9, "n_written": 100, "n_restored": 9}


async def put(beginnings: Beginnings, tenant: TenantId, prompt: bytes, slot: int = 1) -> bool:
    """Put what is most like the prompt into a slot."""
    beginning, _ = beginnings.like(tenant, prompt)
    assert beginning is not None
    return await beginnings.put(beginning, slot)


async def test_what_a_tenants_prompts_have_in_common_is_put_into_any_slot() -> None:
    engine = Engine()
    beginnings = Beginnings(engine, ["f"])
    await beginnings.keep(A, SYSTEM + b"one", 0)

    assert beginnings.like(A, SYSTEM + b"two")[1] == WORTH
    assert await put(beginnings, A, SYSTEM + b"two", 3)
    assert engine.asked == [("/slots/0?action=save", "f"), ("/slots/3?action=restore", "f")]


async def test_another_tenant_finds_nothing_though_it_asks_the_same() -> None:
    beginnings = Beginnings(Engine(), ["f"])
    await beginnings.keep(A, SYSTEM, 0)
    assert beginnings.like(B, SYSTEM) == (None, 0)


async def test_little_in_common_is_not_worth_a_copy() -> None:
    beginnings = Beginnings(Engine(), ["f"])
    await beginnings.keep(A, SYSTEM, 0)
    assert beginnings.like(A, SYSTEM[1:] + b"x") == (None, 0)


async def test_the_one_unused_for_longest_makes_room() -> None:
    beginnings = Beginnings(Engine(), ["f", "g"])
    one, two, three = (bytes([letter]) * WORTH for letter in b"xyz")
    await beginnings.keep(A, one, 0)
    await beginnings.keep(A, two, 0)
    await put(beginnings, A, one)
    await beginnings.keep(A, three, 0)
    assert [beginnings.like(A, prompt)[1] for prompt in (one, two, three)] == [WORTH, 0, WORTH]


async def test_files_take_no_more_memory_than_they_may() -> None:
    engine = Engine()
    beginnings = Beginnings(engine, ["f", "g", "h"], most_bytes=250)
    for letter in b"wxyz":
        await beginnings.keep(A, bytes([letter]) * WORTH, 0)
    assert {file for _, file in engine.asked} == {"f", "g"}, "a third hundred of bytes is above 250"


async def test_what_is_like_no_other_prompt_of_the_tenant_is_not_worth_keeping() -> None:
    beginnings = Beginnings(Engine(), ["f"])
    held = SYSTEM + b"one"
    beginnings.saw(A, held)
    beginnings.saw(B, SYSTEM + b"two")
    assert not beginnings.is_worth_keeping(A, held)
    beginnings.saw(A, SYSTEM + b"three")
    assert beginnings.is_worth_keeping(A, held)
    assert beginnings.is_worth_keeping(A, SYSTEM + b"another")
    await beginnings.keep(A, held, 0)
    assert not beginnings.is_worth_keeping(A, held), "it is kept"
    assert not beginnings.is_worth_keeping(A, SYSTEM + b"another"), "what others begin with is kept"


async def test_the_next_turn_of_a_chat_takes_the_place_of_the_last() -> None:
    engine = Engine()
    beginnings = Beginnings(engine, ["f", "g"])
    await beginnings.keep(A, SYSTEM, 0)
    await beginnings.keep(A, SYSTEM + b"more" * WORTH, 0)
    await beginnings.keep(A, b"x" * WORTH, 0)
    assert beginnings.like(A, SYSTEM + b"more" * WORTH)[1] == 5 * WORTH
    assert beginnings.like(A, b"x" * WORTH)[1] == WORTH


async def test_only_so_many_prompts_are_remembered() -> None:
    beginnings = Beginnings(Engine(), ["f"])
    beginnings.saw(A, SYSTEM + b"one")
    for number in range(64):
        beginnings.saw(B, str(number).encode())
    assert not beginnings.is_worth_keeping(A, SYSTEM + b"two")


async def test_with_no_file_to_spare_nothing_is_kept() -> None:
    engine = Engine()
    await Beginnings(engine, []).keep(A, SYSTEM, 0)
    assert engine.asked == []


async def test_who_comes_while_it_is_being_saved_waits_for_it() -> None:
    engine = Engine()
    engine.may_answer.clear()
    beginnings = Beginnings(engine, ["f"])
    saving = asyncio.create_task(beginnings.keep(A, SYSTEM, 0))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(put(beginnings, A, SYSTEM + b"two"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert engine.asked == [("/slots/0?action=save", "f")]
    engine.may_answer.set()
    await saving
    assert await waiting


async def test_a_file_is_not_given_away_while_the_engine_reads_it_though_the_reader_has_gone() -> None:
    engine = Engine()
    beginnings = Beginnings(engine, ["f"])
    await beginnings.keep(A, SYSTEM, 0)
    engine.may_answer.clear()
    reader = asyncio.create_task(put(beginnings, A, SYSTEM))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader

    await beginnings.keep(B, b"x" * WORTH, 2)
    assert beginnings.like(B, b"x" * WORTH) == (None, 0)
    engine.may_answer.set()
    for _ in range(5):
        await asyncio.sleep(0)
    await beginnings.keep(B, b"x" * WORTH, 2)
    assert beginnings.like(B, b"x" * WORTH)[1] == WORTH


@pytest.mark.parametrize("action", ["save", "restore"])
async def test_what_the_engine_refused_is_forgotten_and_the_file_used_again(action: str) -> None:
    engine = Engine()
    beginnings = Beginnings(engine, ["f"])
    engine.fails = lambda path: UpstreamBroken("no", status=500) if action in path else None
    await beginnings.keep(A, SYSTEM, 0)
    if action == "restore":
        assert not await put(beginnings, A, SYSTEM)
    assert beginnings.like(A, SYSTEM) == (None, 0)

    engine.fails = lambda path: None
    await beginnings.keep(B, SYSTEM, 0)
    assert await put(beginnings, B, SYSTEM)


@pytest.mark.parametrize("action", ["save", "restore"])
async def test_a_file_that_the_engine_did_not_answer_for_is_never_used_again(action: str) -> None:
    engine = Engine()
    beginnings = Beginnings(engine, ["f"])
    engine.fails = lambda path: WorkerLost("silent") if action in path else None
    await beginnings.keep(A, SYSTEM, 0)
    if action == "restore":
        assert not await put(beginnings, A, SYSTEM)

    engine.fails = lambda path: None
    num_asked = len(engine.asked)
    await beginnings.keep(B, SYSTEM, 0)
    assert beginnings.like(B, SYSTEM) == (None, 0)
    assert len(engine.asked) == num_asked


async def test_of_two_that_read_a_file_which_fails_the_last_one_frees_it_once() -> None:
    engine = Engine()
    beginnings = Beginnings(engine, ["f"])
    await beginnings.keep(A, SYSTEM, 0)
    engine.fails = lambda path: UpstreamBroken("no", status=500) if "restore" in path else None
    assert not any(await asyncio.gather(put(beginnings, A, SYSTEM, 1), put(beginnings, A, SYSTEM, 2)))

    for letter in b"xy":
        await beginnings.keep(A, bytes([letter]) * WORTH, 0)
    assert [beginnings.like(A, bytes([letter]) * WORTH)[1] for letter in b"xy"] == [0, WORTH], "there is one file"


@pytest.mark.parametrize(
    ("held", "prompt", "does_part"),
    [
        (b'[{"role":"user","content":"A"}]', b'[{"role":"user","content":"A"},{"role":"assistant"}]', False),
        (b'[{"role":"user","content":"a long A"}]', b'[{"role":"user","content":"a B"}]', True),
        (b'"once upon"', b'"once upon a time"', False),
        (b"[1,2,3]", b"[1,2,3,4]", False),
        (b"", b'"anything"', False),
    ],
)
def test_a_prompt_parts_from_another_where_it_does_not_only_go_on(held: bytes, prompt: bytes, does_part: bool) -> None:
    assert parts(prompt, held) is does_part
