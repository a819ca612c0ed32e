import pytest

from outgrow.memory.timeline import Span, Timeline
from outgrow.perf.bound import Bandwidth, Moved, least_seconds, least_seconds_shared, line_through, moved_in


def test_bytes_are_those_of_the_disk_s_lanes() -> None:
    timeline = Timeline(
        (
            Span("read", "READ c0", 0.0, 1.0, 10),
            Span("compute", "F0.0", 1.0, 4.0, 1000),
            Span("read", "READ c1", 1.0, 1.5, 20),
            Span("write", "WRITE c0", 4.0, 6.0, 7),
        )
    )
    assert moved_in(timeline) == Moved(30, 7, {"read": 1.5, "compute": 3.0, "write": 2.0})


@pytest.mark.parametrize(
    ("compute_s", "bound"), [(5.0, (5.0, "compute")), (3.0, (4.0, "write"))], ids=["compute", "write"]
)
def test_the_bound_is_the_slowest_of_three(compute_s: float, bound: tuple[float, str]) -> None:
    assert least_seconds(compute_s, Moved(300, 200, {}), Bandwidth(100.0, 50.0, 70.0)) == bound


def test_reading_may_be_the_slowest() -> None:
    assert least_seconds(1.0, Moved(300, 200, {}), Bandwidth(50.0, 100.0, 70.0)) == (6.0, "read")


def test_both_directions_may_share_the_device() -> None:
    moved = Moved(300, 200, {})
    assert least_seconds_shared(1.0, moved, Bandwidth(100.0, 100.0, 125.0)) == (4.0, "both")
    assert least_seconds_shared(1.0, moved, Bandwidth(100.0, 100.0, 200.0)) == (3.0, "read")
    assert least_seconds_shared(5.0, moved, Bandwidth(100.0, 100.0, 125.0)) == (5.0, "compute")


def test_a_disk_that_does_not_move_is_refused() -> None:
    with pytest.raises(ValueError, match="both directions, got 0"):
        Bandwidth(0.0, 1.0, 1.0)


def test_a_line_goes_on_beyond_its_points() -> None:
    assert line_through((1.0, 5.0), (3.0, 9.0), 26.0) == 55.0
    with pytest.raises(ValueError, match="two different places"):
        line_through((1.0, 5.0), (1.0, 9.0), 2.0)
