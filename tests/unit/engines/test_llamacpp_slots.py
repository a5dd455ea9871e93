"""Whose slot is whose: what one tenant leaves in a slot serves no other."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.ids import RequestId, TenantId
from engines.drivers.llamacpp_beginnings import num_shared
from engines.drivers.llamacpp_slots import Seat, SlotBook

A, B = TenantId("a"), TenantId("b")
LONG = b"a prompt that is long enough to be recognised"


def take(book: SlotBook, tenant: TenantId, prompt: bytes = LONG) -> Seat:
    """Take a seat that is there at once."""
    seat = book.take(tenant, prompt)
    assert seat is not None
    return seat


def run(book: SlotBook, tenant: TenantId, prompt: bytes = LONG) -> Seat:
    """Take a seat and leave it, as a request does that ends."""
    seat = take(book, tenant, prompt)
    book.leave(seat, has_ended=True)
    return seat


def test_a_tenant_comes_back_to_its_own_slot_and_its_cache() -> None:
    book = SlotBook(2)
    first, other, again = run(book, A), run(book, B), run(book, A)
    assert (first.is_cached, other.is_cached, again.is_cached) == (False, False, True)
    assert first.slot == again.slot != other.slot


def test_a_slot_that_changes_hands_is_used_without_its_cache() -> None:
    book = SlotBook(1)
    assert [run(book, tenant).is_cached for tenant in (A, A, B, B, A)] == [False, True, False, True, False]


def test_a_slot_tells_what_is_about_to_be_overwritten_and_whose_that_is() -> None:
    book = SlotBook(1)
    assert [run(book, tenant, prompt).held for tenant, prompt in ((A, b"one"), (A, b"two"), (B, b"three"))] == [
        None,
        (A, b"one"),
        (A, b"two"),
    ]


@pytest.mark.parametrize(("num_brought", "is_left"), [(40, False), (60, True)])
def test_a_slot_that_holds_less_than_is_brought_is_left_to_what_it_holds(num_brought: int, is_left: bool) -> None:
    book = SlotBook(2)
    other, one = run(book, B, b"y" * 50), run(book, A, b"x" * 50)
    seat = book.take(A, b"x" * 50 + b"z" * 50, brings_cache=True, num_brought=num_brought)
    assert seat is not None
    assert (seat.slot, seat.is_cached) == ((other if is_left else one).slot, True)


def test_the_slot_with_the_most_alike_prompt_is_preferred() -> None:
    book = SlotBook(3)
    one, two = take(book, A, b"x" * 50), take(book, A, b"y" * 50)
    for seat in (one, two):
        book.leave(seat, has_ended=True)
    assert run(book, A, b"x" * 50 + b"more").slot == one.slot
    assert run(book, A, b"y" * 50 + b"more").slot == two.slot
    assert run(book, A, b"z" * 50).slot not in {one.slot, two.slot}


def cut(book: SlotBook, tenant: TenantId, request: str, prompt: bytes = LONG) -> Seat:
    """Take a seat for a request and leave it in the middle; the engine has let go."""
    seat = book.take(tenant, prompt, RequestId(request))
    assert seat is not None
    book.leave(seat, has_ended=False)
    book.observe([])
    return seat


def test_a_slot_that_may_yet_be_parked_is_avoided_until_all_that_was_cut_has_settled() -> None:
    book = SlotBook(2)
    left, other = cut(book, A, "one"), run(book, B)
    assert run(book, B, b"something else").slot == other.slot != left.slot, "though the other is unused for longer"
    book.settled()
    assert run(book, B, b"yet another").slot == left.slot


async def test_of_two_slots_that_were_cut_the_one_that_was_parked_is_taken() -> None:
    book = SlotBook(2)
    first, second = cut(book, A, "one"), cut(book, A, "two")
    async with book.parked(A, RequestId("two")) as slot:
        assert slot == second.slot
    assert take(book, B, b"another").slot == second.slot != first.slot, "though the other is unused for longer"


def test_a_slot_that_was_left_is_working_as_long_as_the_engine_says_so_whatever_else_is_on_its_way() -> None:
    book = SlotBook(2)
    left = book.take(A, LONG, RequestId("one"))
    assert left is not None
    book.leave(left, has_ended=False)
    coming = take(book, B)
    assert coming.slot != left.slot

    book.observe([left.slot or 0])  # the engine does not know of the other yet: as many work as should
    assert book.is_leaving(A, RequestId("one"))

    book.observe([coming.slot or 0])
    assert not book.is_leaving(A, RequestId("one"))


async def test_a_slot_is_held_to_be_parked_while_the_engine_still_works_on_it() -> None:
    book = SlotBook(2)
    left = book.take(A, LONG, RequestId("one"))
    assert left is not None
    book.leave(left, has_ended=False)
    async with book.parked(A, RequestId("one")) as slot:
        assert slot is not None
        assert slot == left.slot
        assert take(book, B).slot != slot
        assert book.is_leaving(A, RequestId("one"))
        book.stopped(slot)
    assert not book.is_leaving(A, RequestId("one"))


def test_one_queues_behind_what_was_left_rather_than_behind_what_runs() -> None:
    book = SlotBook(3)
    seats = [take(book, A, bytes([number]) * 40) for number in range(3)]
    book.leave(seats[1], has_ended=False)
    assert take(book, B).slot == seats[1].slot


def test_a_request_that_goes_on_comes_back_to_its_own_slot() -> None:
    book = SlotBook(3)
    seats = [cut(book, A, request, request.encode() * 20) for request in ("one", "two", "three")]
    again = book.take(A, LONG, RequestId("two"))
    assert again is not None
    assert (again.slot, again.is_own, again.is_cached) == (seats[1].slot, True, True)


def test_a_slot_is_a_requests_own_no_more_once_others_have_had_it() -> None:
    book = SlotBook(1)
    cut(book, A, "one")
    run(book, A)
    again = book.take(A, LONG, RequestId("one"))
    assert again is not None
    assert (again.is_own, again.is_cached) == (False, True)


@pytest.mark.parametrize(("tenant", "is_own"), [(A, True), (B, False)])
async def test_an_id_that_two_tenants_chose_opens_no_slot_of_the_other(tenant: TenantId, is_own: bool) -> None:
    book = SlotBook(2)
    cut(book, A, "same")
    async with book.parked(tenant, RequestId("same")) as slot:
        assert (slot is not None) == is_own
    seat = book.take(tenant, LONG, RequestId("same"))
    assert seat is not None
    assert (seat.is_own, seat.is_cached) == (is_own, is_own)


async def test_what_is_saved_of_a_slot_counts_only_if_nobody_has_come_to_it_meanwhile() -> None:
    book = SlotBook(1)
    cut(book, A, "one")
    async with book.parked(A, RequestId("one")) as slot:
        assert slot == 0
        assert book.holds(slot, A, RequestId("one"))
        take(book, A)
        assert not book.holds(slot, A, RequestId("one"))


def test_who_brings_a_cache_is_not_followed_before_it_has_entered() -> None:
    book = SlotBook(1)
    run(book, B)
    seat = book.take(A, LONG, RequestId("one"), brings_cache=True)
    assert seat is not None
    assert (seat.is_cached, seat.is_own) == (True, False)
    assert book.take(A, LONG) is None
    book.entered(seat)
    assert book.take(A, LONG) is not None


def test_with_no_slots_known_nothing_is_placed_or_cached() -> None:
    book = SlotBook()
    assert [(seat.slot, seat.is_cached) for seat in (run(book, A), run(book, A))] == [(None, False)] * 2


def test_requests_of_two_tenants_that_wait_for_one_slot_leave_it_to_nobody() -> None:
    book = SlotBook(1)
    first = take(book, A)
    book.entered(first)
    for seat in (first, take(book, B)):
        book.leave(seat, has_ended=True)
    assert [run(book, B).is_cached, run(book, B).is_cached] == [False, True]


def test_nobody_queues_behind_a_request_that_may_yet_save_what_lies_in_its_slot() -> None:
    book = SlotBook(1)
    run(book, A)
    first = take(book, B)
    assert not first.is_cached
    assert book.take(B, LONG) is None
    book.entered(first)
    assert book.take(B, LONG) is not None


async def test_nobody_queues_behind_a_request_that_is_about_to_use_its_cache() -> None:
    book = SlotBook(1)
    run(book, A)
    seat = take(book, A)
    queued = asyncio.create_task(book.seat(B, LONG))
    await asyncio.sleep(0)
    assert not queued.done()

    book.entered(seat)
    assert not (await queued).is_cached


def test_a_slot_whose_request_was_cut_is_avoided_until_the_engine_has_let_go_of_all() -> None:
    book = SlotBook(2)
    cut = take(book, A)
    book.leave(cut, has_ended=False)
    assert run(book, A).slot != cut.slot

    book.observe([cut.slot or 0])
    assert run(book, A, b"another" * 9).slot == 1 - (cut.slot or 0)

    book.observe([])
    book.settled()
    assert run(book, A, b"yet another" * 9).slot == cut.slot


async def test_a_scattered_request_leaves_every_slot_to_nobody() -> None:
    book = SlotBook(2)
    run(book, A)
    async with book.scattered():
        assert not run(book, A).is_cached
    assert [run(book, A).is_cached, run(book, A).is_cached] == [False, True]


async def test_a_scattered_request_waits_for_those_that_are_about_to_use_a_cache() -> None:
    book = SlotBook(2)
    run(book, A)
    seat = take(book, A)
    assert seat.is_cached
    entered = asyncio.Event()

    async def scatter() -> None:
        async with book.scattered():
            entered.set()

    task = asyncio.create_task(scatter())
    await asyncio.sleep(0)
    assert not entered.is_set()
    assert not take(book, B).is_cached

    book.entered(seat)
    await task
    assert entered.is_set()


async def test_a_scattered_request_that_was_cut_keeps_caches_off_until_the_engine_has_let_go() -> None:
    book = SlotBook(2)
    with pytest.raises(RuntimeError):
        async with book.scattered():
            raise RuntimeError("the client has gone")
    book.observe([1])
    assert [run(book, A).is_cached, run(book, A).is_cached] == [False, False]

    book.observe([])
    assert [run(book, A).is_cached, run(book, A).is_cached] == [False, True]


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_the_shared_beginning_is_counted_to_the_byte(head: bytes, one: bytes, other: bytes) -> None:
    expected = 0
    for left, right in zip(head + one, head + other, strict=False):
        if left != right:
            break
        expected += 1
    assert num_shared(head + one, head + other) == expected


class Engine:
    """What llama.cpp does with slots: each runs its requests in their order, and keeps the last one's tenant."""

    def __init__(self, num_slots: int) -> None:
        self.held: list[TenantId | None] = [None] * num_slots

    def run(self, tenant: TenantId, seat: Seat) -> None:
        assert seat.slot is not None
        if seat.is_cached:
            assert self.held[seat.slot] == tenant, "one tenant was served from another's cache"
        self.held[seat.slot] = tenant


@given(
    num_slots=st.integers(1, 2),
    steps=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["take", "take", "end", "cut"]), st.integers(0, 3)),
        max_size=12,
    ),
)
@settings(max_examples=400, deadline=None)
def test_no_tenant_is_ever_served_from_anothers_cache(num_slots: int, steps: list[tuple[str, str, int]]) -> None:
    """Requests overlap, are cut, and those that share a busy slot reach the engine in any order."""
    book, engine = SlotBook(num_slots), Engine(num_slots)
    waiting: list[tuple[TenantId, Seat]] = []
    for name, act, which in steps:
        if act == "take":
            seat = book.take(TenantId(name), name.encode() * 20)
            if seat is not None:
                waiting.append((TenantId(name), seat))
        elif waiting:
            tenant, seat = waiting.pop(which % len(waiting))
            engine.run(tenant, seat)
            book.leave(seat, has_ended=act == "end")
            if act == "cut":
                book.observe([])
