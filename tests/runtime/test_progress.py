import io

from rich.console import Console

from outgrow.runtime.events import Drifted, Failure, MemoryHeld, Rows, Started
from outgrow.runtime.progress import LiveDisplay
from outgrow.scheduler.drift import Drift

ROW = {"step": 3, "loss": 1.25, "tokens_per_s": 12345.6, "lr": 1e-3, "grad_norm": 0.5, "step_s": 2.0}
EVENTS = (
    Started(0, 2, 10, {"host": 2 << 30}, 7, None),
    Started(1, 2, 10, {"host": 2 << 30}, 7, None),
    MemoryHeld(0, 3, {"host": 512 << 20}),
    MemoryHeld(1, 3, {"host": 256 << 20}),
    Rows((ROW,)),
)


def shown(events, terminal):
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=terminal, width=160, color_system=None))
    for event in events:
        display.show(event)
    display.close()
    return stream.getvalue()


def test_a_terminal_shows_step_loss_speed_memory_against_budget_and_time_left():
    text = shown(EVENTS, terminal=True)
    for words in ("training", "3/10", "loss 1.2500", "12,346 tokens/s", "norm 0.5", "14 s left", "rank 1"):
        assert words in text, words
    assert "512.00 MiB of 2.00 GiB" in text
    assert "256.00 MiB of 2.00 GiB" in text


def test_no_terminal_gets_lines_without_control_codes():
    text = shown(EVENTS, terminal=False)
    assert text.splitlines()[0] == "outgrow: starting"
    assert "step 3/10  loss 1.2500  12,346 tokens/s" in text
    assert "rank 0 host 512.00 MiB, rank 1 host 256.00 MiB" in text
    assert "\x1b" not in text


def test_a_run_of_unknown_length_and_a_failure():
    failure = Failure(1, 4, "head", "KeyError", "boom", "", None, False, False)
    text = shown((Started(0, 1, None, {}, 7, None), Rows((ROW | {"grad_norm": None},)), failure), terminal=True)
    assert "KeyError (rank 1, step 4, unit head)" in text
    assert "step 3  loss" in text


def test_a_run_that_fails_before_its_first_step():
    assert "waiting for the first step" in shown((), terminal=True)
    assert shown((), terminal=False) == "outgrow: starting\n"


def test_a_lane_that_drifts_is_shown_once_whichever_rank_says_so():
    for terminal in (True, False):
        drifts = [Drifted(rank, Drift(30, 21, "read", 0.5, 1.05)) for rank in (1, 0, 2)]
        text = shown((*EVENTS, *drifts), terminal)
        assert text.count("since step 21 disk reads take 2.1 times what was predicted") == 1
        assert "outgrow: rank 1: since" in text
