"""The bytes of a program on a device with memory of its own at its fullest moment, known before the first step.

Owns adding up what lives there when: resident state, the arena, gathered copies, the micro-batch's inputs, activations,
gradients until they are summed or have gone down. Does not own the host's share (`ledger.py`), nor the numbers
themselves.
"""

from dataclasses import replace

from ..parallel.actions import Action, Kind
from .copies import gathered_peak
from .ledger import ActivationWalk, HostFigures, Ledger, keeping
from .memory_levels import levels_under
from .memory_profile import MemoryProfile
from .plan import MicroBatchOrder, Plan, UpdateTime
from .program import Program, StepShape

__all__ = ["device_ledger"]


def device_ledger(
    program: Program,
    shape: StepShape,
    plan: Plan,
    profile: MemoryProfile,
    figures: HostFigures,
    batch_bytes: int,
) -> Ledger:
    """Walk the program in its order: what other lanes have not yet moved away is counted as long as nothing has waited
    for them.

    Args:
        figures: of the device; `gradient_bytes` are those of the sums that lie there, of chunks that it updates.
        batch_bytes: of a micro-batch's inputs.
    """
    levels = levels_under(profile, keeping(program, shape, plan), in_buffers=True)
    together = plan.micro_batches if plan.order is MicroBatchOrder.BY_UNIT else 1
    fixed = {
        "state": sum(figures.state_bytes.values()),
        "buffers": program.arena_bytes("device"),
        "gathered": gathered_peak(program, figures.copy_bytes)[0],
        "inputs": batch_bytes * together,
    }
    sums = dict(figures.gradient_bytes)
    if plan.update is UpdateTime.AFTER:  # they stay from step to step
        fixed["sums"], sums = sum(sums.values()), {}
    walk = ActivationWalk(levels)
    waiting = _Waiting(shape, profile)
    summed: set[int] = set()
    best = Ledger(0, "", {})
    sizes: list[tuple[int, int]] = []
    for position, instruction in enumerate(program.instructions):
        action = instruction.action
        update = 0
        if action.kind in (Kind.F, Kind.B):
            waiting.begin(action)
            activations = walk.top(action)
        elif action.kind is Kind.STEP and action.index is not None:
            activations, update = walk.now, figures.update_bytes.get(action.index, 0)
        else:
            waiting.note(action)
            continue
        if action.kind is Kind.B:
            summed |= set(_trained(action, shape))
        parts = fixed | {
            "sums": fixed.get("sums", 0) + sum(sums.get(chunk, 0) for chunk in summed),
            "gradients": waiting.gradient_bytes,
            "activations": activations + waiting.saved_bytes,
            "update": update,
        }
        total = sum(parts.values())
        sizes.append((position, total))
        if total > best.peak_bytes:
            best = Ledger(total, str(action), parts)
        if action.kind is Kind.B:
            waiting.made(_trained(action, shape))
        elif action.kind is Kind.STEP and action.index is not None:
            summed.discard(action.index)
    return replace(best, levels=tuple(sizes))


def _trained(action: Action, shape: StepShape) -> list[int]:
    """Chunks that get gradients in a backward action."""
    assert action.index is not None
    chunks = (*shape.held, *shape.uses(action.index))
    return [chunk for chunk in chunks if shape.chunks[chunk].trainable]


class _Waiting:
    """What has been made and not yet surely left: gradients before and during DOWN, activations during SAVE. A backward
    waits for the gradients that went down before the last one, a forward for all activations but the last ones."""

    def __init__(self, shape: StepShape, profile: MemoryProfile) -> None:
        self._shape = shape
        self._profile = profile
        self._alive: set[int] = set()
        self._going: tuple[int, int] = 0, 0  # bytes that go down since the last backward, and since the one before
        self._saves: list[tuple[int | None, int | None]] = []

    @property
    def gradient_bytes(self) -> int:
        """What the action that begins does not make itself."""
        return sum(self._shape.chunks[chunk].num_bytes for chunk in self._alive) + sum(self._going)

    @property
    def saved_bytes(self) -> int:
        return sum(self._profile.units[run].saved_bytes for run, _ in self._saves if run is not None)

    def begin(self, action: Action) -> None:
        if action.kind is Kind.B:
            self._going = 0, self._going[0]
        else:
            self._saves = self._saves[-1:]

    def made(self, chunks: list[int]) -> None:
        self._alive |= set(chunks)

    def note(self, action: Action) -> None:
        """An action that computes nothing."""
        place = action.index, action.micro_batch
        if action.kind is Kind.SAVE:
            self._saves = [*self._saves[-1:], place]
        elif action.kind is Kind.LOAD and place in self._saves:
            self._saves = self._saves[self._saves.index(place) + 1 :]
        elif action.kind is Kind.DOWN and action.index is not None:
            self._going = self._going[0] + self._shape.chunks[action.index].num_bytes, self._going[1]
            self._alive.discard(action.index)
        elif action.kind is Kind.REDUCE and action.index is not None:
            self._alive.discard(action.index)
