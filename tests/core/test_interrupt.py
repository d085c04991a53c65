"""What may be interrupted, and when."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from rlhf_lightning.core.interrupt import Interrupts, PeerLost, Stopped, interruptible, interrupts


@pytest.fixture
def mine() -> Interrupts:
    return Interrupts()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    interrupts.reset()
    yield
    interrupts.reset()


def test_nothing_is_raised_outside_of_a_section(mine: Interrupts) -> None:
    mine.tell(Stopped())
    mine.strike()
    with pytest.raises(Stopped):
        mine.check()


def test_a_section_is_interrupted_once(mine: Interrupts) -> None:
    reached = []

    def work() -> None:
        mine.tell(Stopped(signal.SIGINT))
        try:
            mine.strike()
        finally:
            mine.strike()  # what cleans up is not interrupted again
            reached.append("cleaned up")

    with pytest.raises(Stopped) as stopped, mine.section():
        work()
    assert stopped.value.code == 130
    assert reached == ["cleaned up"]


def test_one_who_was_told_before_does_not_begin(mine: Interrupts) -> None:
    mine.tell(Stopped())
    with pytest.raises(Stopped), mine.section():
        pytest.fail("the section was entered")


def test_code_that_swallows_everything_ends_in_the_same_way(mine: Interrupts) -> None:
    def work() -> None:
        mine.tell(Stopped())
        with contextlib.suppress(BaseException):
            mine.strike()

    with pytest.raises(Stopped), mine.section():
        work()


def test_a_closed_part_is_finished_first(mine: Interrupts) -> None:
    done = []

    def work() -> None:
        with mine.closed():
            mine.tell(Stopped())
            mine.strike()
            done.append("closed part")
        done.append("rest")

    with pytest.raises(Stopped), mine.section():
        work()
    assert done == ["closed part"]


def test_all_leave_together(mine: Interrupts) -> None:
    said: list[bool] = []

    def meet(stop: bool) -> bool:
        said.append(stop)
        return True  # somebody else wants to stop

    mine.meet = meet
    with pytest.raises(Stopped), mine.section():
        pass
    assert said == [False]
    with pytest.raises(Stopped), mine.section():
        pass
    assert said == [False, True]


def test_a_lost_peer_overrides_a_stop_and_waits_for_nobody(mine: Interrupts) -> None:
    mine.meet = lambda stop: pytest.fail("met")
    mine.tell(Stopped())
    mine.tell(PeerLost("process 1 is gone"))
    mine.tell(PeerLost("process 2 is gone"))
    mine.tell(Stopped())
    with pytest.raises(PeerLost) as lost, mine.section():
        pass
    assert lost.value.message == "process 1 is gone"
    assert lost.value.code == "error: process 1 is gone"


def test_other_errors_pass_through(mine: Interrupts) -> None:
    with pytest.raises(KeyError), mine.section():
        raise KeyError
    mine.tell(Stopped())
    mine.strike()


def test_without_a_trainer_a_section_is_nothing_special() -> None:
    with interruptible():
        pass
