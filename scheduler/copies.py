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

    A copy counts from the begin of its gather to the end of the drop that follows it; while another gather goes on, it
    is there unless its drop is over before, or its own gather comes after.

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
    for _, now, _ in spans:
        assert order is not None
        alive = sum(
            copy_bytes[c]
            for c, gather, drop in spans
            if not order.is_before(now, gather) and not (drop is not None and order.is_before(drop, now))
        )
        if alive > most:
            most, where = alive, str(program.instructions[now].action)
    return most, where
