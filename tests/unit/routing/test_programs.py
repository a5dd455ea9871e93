"""A tenant's own order: classes, programs by what their calls have had, arrival; and nobody waits for ever."""

import msgspec

from core.chat import Role
from core.ids import RequestId
from routing.fairness.programs import HALF_LIFE_S, LEVEL_S, LOOK_AHEAD, RANK_S, REMEMBERED, Ladder, Programs


class Call(msgspec.Struct):
    id: RequestId
    program: str
    rank: int
    number: int
    arrived_at: float
    role: Role | None = None


class Tenant:
    """Calls of one tenant; the ladder has seen enough calls of service 100."""

    def __init__(self, *, is_flat: bool = False, knows_runs: bool = True) -> None:
        self.ladder = Ladder()
        for _ in range(Ladder.SKIPPED):
            self.ladder.observe(100)
        self.programs: Programs[Call] = Programs(self.ladder, is_flat=is_flat, knows_runs=knows_runs)
        self.number = 0

    def call(
        self, program: str = "", rank: int = 0, at: float = 0.0, *, front: bool = False, role: Role | None = None
    ) -> Call:
        self.number += 1
        made = Call(RequestId(f"{program}{self.number}"), program, rank, self.number, at, role)
        self.programs.open(program, at)
        self.programs.push(made, front=front)
        return made

    def served(self, program: str, service: int, at: float = 0.0) -> None:
        """A call of the program has come and gone."""
        self.programs.open(program, at)
        self.programs.close(program, service, at)

    def order(self) -> list[str]:
        order: list[str] = []
        while (call := self.programs.first()) is not None:
            self.programs.remove(call)
            order.append(call.id)
        return order


def test_inside_a_tenant_the_most_urgent_goes_first_and_equals_in_order_of_arrival() -> None:
    tenant = Tenant()
    for program, rank in (("batch", 2), ("standard", 1), ("now", 0), ("too", 0)):
        tenant.call(program, rank)

    assert tenant.order() == ["now3", "too4", "standard2", "batch1"]


def test_a_program_that_has_had_much_goes_behind_one_that_has_had_little() -> None:
    tenant = Tenant()
    tenant.served("long", 1000)
    tenant.call("long")
    tenant.call("short")
    tenant.call()

    assert tenant.order() == ["short2", "3", "long1"]


def test_who_waits_long_enough_goes_first_whatever_its_program_has_had() -> None:
    tenant = Tenant()
    tenant.served("long", 100_000)
    tenant.call("long", at=0.0)
    tenant.call("short", at=5 * LEVEL_S + 1)

    assert tenant.order() == ["long1", "short2"]


def test_who_waits_long_enough_goes_first_whatever_its_class() -> None:
    tenant = Tenant()
    tenant.call("batch", 2, at=0.0)
    tenant.call("now", 0, at=2 * RANK_S + 1)

    assert tenant.order() == ["batch1", "now2"]


def test_a_call_that_has_run_goes_before_the_rest_of_its_program() -> None:
    tenant = Tenant()
    tenant.call("p", at=1.0)
    tenant.call("p", at=0.5, front=True)

    assert tenant.order() == ["p2", "p1"]


def test_what_a_program_has_had_is_forgotten_while_it_does_nothing() -> None:
    tenant = Tenant()
    tenant.served("long", 1000, at=0.0)
    tenant.call("long", at=10 * HALF_LIFE_S)
    tenant.call("short", at=10 * HALF_LIFE_S)

    assert tenant.order() == ["long1", "short2"]


def test_a_call_that_came_elsewhere_before_a_program_was_idle_here_adds_nothing_to_what_it_has_had() -> None:
    tenant = Tenant()
    tenant.served("long", 1000, at=190.0)
    tenant.programs.open("long", 100.0)

    assert tenant.programs._known["long"].service == 1000


def test_programs_are_runs_while_a_call_of_theirs_is_of_one() -> None:
    programs = Tenant().programs
    programs.open("chat", 0.0)
    programs.open("run", 0.0)
    for _ in range(2):
        programs.open("run", 0.0, is_run=True)
    assert programs.num_runs == 1

    for left in (1, 1, 0):
        programs.close("run", 1, 1.0)
        assert programs.num_runs == left


def test_all_programs_are_equal_before_the_ladder_is_calibrated() -> None:
    ladder = Ladder()
    for _ in range(Ladder.SKIPPED - 1):
        ladder.observe(100)
    assert ladder.level(10**9) == 0

    ladder.observe(100)

    assert [ladder.level(service) for service in (99, 100, 200, 400, 10**9)] == [0, 1, 2, 3, 5]


def test_a_flat_order_is_arrival_alone() -> None:
    tenant = Tenant(is_flat=True)
    tenant.served("long", 1000)
    for program, rank in (("long", 2), ("short", 0)):
        tenant.call(program, rank)

    assert tenant.order() == ["long1", "short2"]


def test_a_program_with_open_calls_is_never_forgotten() -> None:
    tenant = Tenant()
    for index in range(REMEMBERED + 10):
        tenant.call(f"p{index}")

    assert len(tenant.order()) == REMEMBERED + 10
    assert len(tenant.programs._known) == REMEMBERED + 10


def test_no_more_programs_are_remembered_than_a_bound() -> None:
    tenant = Tenant()
    for index in range(2 * REMEMBERED):
        tenant.served(f"p{index}", 1)

    assert len(tenant.programs._known) == REMEMBERED


def test_a_call_of_a_run_goes_before_those_of_runs_that_began_later() -> None:
    tenant = Tenant()
    tenant.call("young", at=5.0, role=Role(age_s=1.0))
    tenant.call("old", at=10.0, role=Role(age_s=7.0))

    assert tenant.order() == ["old2", "young1"]


def test_of_runs_of_one_age_the_shorter_one_goes_first() -> None:
    tenant = Tenant()
    tenant.call("long", role=Role(0.0, 1.0, run_s=9.0))
    tenant.call("short", role=Role(0.0, 3.0, run_s=3.0))

    assert tenant.order() == ["short2", "long1"]


def test_inside_a_run_the_call_with_the_longest_path_behind_it_goes_first() -> None:
    tenant = Tenant()
    for remaining_s in (1.0, 5.0, 3.0):
        tenant.call("run", role=Role(0.0, remaining_s, run_s=5.0))
    tenant.call("run", role=Role(0.0, 1.0, run_s=5.0), front=True)

    assert tenant.order() == ["run4", "run2", "run3", "run1"]


def test_beside_other_programs_runs_count_as_their_call_that_waits_longest() -> None:
    tenant = Tenant()
    tenant.call("old", at=10.0, role=Role(age_s=1000.0))
    tenant.call("young", at=6.0, role=Role(age_s=1.0))
    tenant.call("chat", at=5.0)
    tenant.call("chat", at=7.0)

    assert tenant.order() == ["chat3", "old1", "young2", "chat4"]


def test_no_age_of_a_run_makes_up_for_a_class() -> None:
    tenant = Tenant()
    tenant.call("batch", 2, at=10.0, role=Role(age_s=86_400.0))
    tenant.call("chat", 0, at=20.0)

    assert tenant.order() == ["chat2", "batch1"]


def test_what_runs_have_before_them_can_be_left_out_of_it() -> None:
    for tenant in (Tenant(knows_runs=False), Tenant(is_flat=True)):
        tenant.call("young", at=5.0, role=Role(1.0, 1.0))
        tenant.call("old", at=10.0, role=Role(60.0, 1.0))
        tenant.call("old", at=10.0, role=Role(60.0, 9.0))

        assert tenant.order() == ["young1", "old2", "old3"]


def test_who_stands_back_lets_those_of_its_row_go_first_until_it_comes_forward_and_all_do_after_a_few() -> None:
    tenant = Tenant()
    runs = [tenant.call(f"run{number}", role=Role(run_s=float(number))) for number in range(LOOK_AHEAD + 2)]
    other = tenant.call("other")
    for call in runs[:LOOK_AHEAD]:
        assert tenant.programs.first() is call
        tenant.programs.stand_back(call)
    assert tenant.programs.first() is other
    tenant.programs.remove(other)
    assert tenant.programs.first() is None

    tenant.programs.come_forward()
    assert tenant.order() == [call.id for call in runs]


def test_who_stands_back_may_leave_and_so_may_all_others() -> None:
    tenant = Tenant()
    first, second = (tenant.call(f"run{number}", role=Role(run_s=float(number))) for number in range(2))
    tenant.programs.stand_back(first)
    tenant.programs.remove(second)
    assert tenant.programs.first() is None
    tenant.programs.remove(first)
    tenant.programs.come_forward()
    assert tenant.programs.first() is None
    assert not tenant.programs

    again = tenant.call("run0", role=Role())
    assert tenant.programs.first() is again
