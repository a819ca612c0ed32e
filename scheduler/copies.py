"""How many bytes of gathered copies may be alive together, in any legal run of a program.

Owns that one sum. Does not own which copies take memory of their own (a figure of the machine's transport).
"""

from collections.abc import Mapping

from ..parallel.actions import Kind
from .happens import Order
from .program import Program

__all__ = ["gathered_peak"]


def gathered_peak(program: Program, copy_bytes: Mapping[int, int], order: Order | None = None) -> tuple[int, str]:
    """The most bytes, and the gather at which they are there.

    A copy counts from the begin of its gather to the end of the drop that follows it; while a later gather goes on, it
    is there unless its drop is over before.

    Args:
        copy_bytes: chunk -> bytes of a copy that comes and goes; chunks left out take nothing.
        order: of the program, if it is known already.
    """
    spans: list[tuple[int, int, int | None]] = []  # chunk, gather, drop
    opened: dict[int, int] = {}
    for position, instruction in enumerate(program.instructions):
        action = instruction.action
        c = action.index
        if c is None or c not in copy_bytes:
            continue
        if action.kind is Kind.GATHER and c not in opened:
            opened[c] = position
        elif action.kind is Kind.DROP and action.slot is None and c in opened:
            spans.append((c, opened.pop(c), position))
    spans += [(c, position, None) for c, position in opened.items()]
    order = order or (Order(program) if spans else None)
    most, where = 0, ""
    alive: list[tuple[int, int, int | None]] = []
    for span in sorted(spans, key=lambda span: span[1]):
        assert order is not None
        now = span[1]  # one lane does all gathers in order: what is gone at one of them is gone at the next
        alive = [each for each in alive if each[2] is None or not order.is_before(each[2], now)] + [span]
        held = sum(copy_bytes[c] for c, _, _ in alive)
        if held > most:
            most, where = held, str(program.instructions[now].action)
    return most, where
