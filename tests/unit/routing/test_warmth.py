"""What a worker's prefix cache is taken to hold."""

from core.chat import Prefix
from routing.scheduler.warmth import Warmth

A, AB, AC = Prefix(1, 100), Prefix(2, 300), Prefix(3, 500)
X, Y = Prefix(8, 100), Prefix(9, 100)


def test_the_longest_beginning_that_was_run_is_saved() -> None:
    warmth = Warmth()
    warmth.note((A, AB), most_roots=4, most_tokens=None)

    assert warmth.saved((A, AB)) == 300
    assert warmth.saved((A, AC)) == 100
    assert warmth.saved((X, AB)) == 0
    assert warmth.saved(()) == 0
    assert warmth.holds((A, AB), AB)
    assert not warmth.holds((A, AC), AC)


def test_where_memory_is_not_known_there_are_as_many_roots_as_slots() -> None:
    warmth = Warmth()
    for one in (A, X, A, Y):
        warmth.note((one,), most_roots=2, most_tokens=None)

    assert [warmth.saved((one,)) for one in (A, X, Y)] == [100, 0, 100]


def test_where_it_is_known_there_are_as_many_as_it_has_room_for() -> None:
    warmth = Warmth()
    warmth.note((A, AC), most_roots=1, most_tokens=650)
    warmth.note((X,), most_roots=1, most_tokens=650)
    assert (warmth.saved((A, AC)), warmth.saved((X,))) == (500, 100)

    warmth.note((Y,), most_roots=1, most_tokens=650)

    assert (warmth.saved((A, AC)), warmth.saved((X,)), warmth.saved((Y,))) == (0, 100, 100)


def test_of_one_root_so_many_beginnings_are_remembered() -> None:
    warmth = Warmth()
    for digest in range(10, 200):
        warmth.note((A, Prefix(digest, 300)), most_roots=1, most_tokens=None)

    assert warmth.saved((A, Prefix(199, 300))) == 300
    assert warmth.saved((A, Prefix(10, 300))) == 100


def test_a_new_engine_holds_nothing() -> None:
    warmth = Warmth()
    warmth.note((A,), most_roots=1, most_tokens=1000)
    warmth.clear()

    assert warmth.saved((A,)) == 0


def test_what_was_not_computed_after_all_is_not_held() -> None:
    warmth = Warmth()
    warmth.note((A, AB), most_roots=4, most_tokens=1000)
    warmth.lose((A, AB), (AB.digest,))
    assert warmth.saved((A, AB)) == 100

    warmth.lose((A,), (A.digest,))
    warmth.lose((X,), (X.digest,))
    assert warmth.saved((A, AB)) == 0
