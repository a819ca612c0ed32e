"""The memory that one micro-batch takes, unit run by unit run, measured without computing and without taking it.

Owns the pass over forward, loss and backward, and what is read out of its log of storages. Does not own the pass
(`trace.py`) nor what a program makes of the numbers.

Bytes are those of storages that operators make, parameters, buffers and the batch excluded, each rounded up to 64 (what
the CPU allocator aligns to), with what kernels take for themselves (`workspace.py`). A pass is cut into *phases*: an
action begins where the run before it hands over, so that phases follow each other without a gap and a level at one's
end is the level at the next one's begin. What is live at the begin of an action, in any order of micro-batches and with
any policy for each unit, is the sum over `MemoryProfile.storages` of those that are still referred to or kept; to that
comes the peak of the action's own phase.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..parallel.units import Unit
from .storage_replay import NOTHING_FRESH, Fresh, PhaseMemory, Replay, round_up
from .storage_watch import StorageWatch
from .trace import Forward, InputDtype, Loss, Phase, Trace, record, record_without_values
from .twin import Shapes, shared_twin

__all__ = ["MemoryProfile", "PhaseMemory", "StorageLife", "UnitMemory", "measure_memory"]


@dataclass(frozen=True, slots=True)
class StorageLife:
    """A storage that outlives the phase in which it was made. Gradients of parameters are not among them.

    Attributes:
        num_bytes: of the storage.
        made_in: the phase.
        dropped_in: the phase in which the last reference went that is not autograd's: from then on it is there only
            where a unit keeps it. None: after the pass.
        saved_by: unit runs that saved it for their backward, in order. The first of them owns it where it is moved.
        saved_between: whether code outside of every unit saved it: it stays whatever the units' policies are.
        released_in: the phase in which autograd let go of it, None where it was not saved.
        passed_to: unit runs that were given it: what recomputing them needs.
        kept_by: the unit run that made it and keeps it where it is recomputed selectively.
    """

    num_bytes: int
    made_in: Phase
    dropped_in: Phase | None
    saved_by: tuple[int, ...]
    saved_between: bool
    released_in: Phase | None
    passed_to: tuple[int, ...]
    kept_by: int | None = None


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Bytes of one run of a unit.

    Attributes:
        name: of the unit's module.
        unit: index of the unit.
        forward: from its begin to the next run's, or to the loss.
        backward: from the begin of its backward to the next one's; all zero where it has none.
        recompute_peak_bytes: of running it once more with everything saved, above what was there.
        recompute_churn_bytes, recompute_fresh: all that it makes then, added up.
        saved: indices into `MemoryProfile.storages` of what it was the first to save, its inputs among them.
        inputs: indices into `MemoryProfile.storages` of what it was given, the batch's tensors excluded.
        saved_bytes: the sum over `saved`: what offloading the unit moves.
        saved_input_bytes: the part of `saved_bytes` that the unit did not make itself.
        input_bytes: the sum over `inputs`: what recomputing the unit keeps.
        output_bytes: of what it returned and made itself.
        selective_again_bytes: as `recompute_peak_bytes`, of running again what selective recomputation does not keep.
        kept_beside_bytes: of what that keeps and is not among `MemoryProfile.storages`, since nothing else needs it.
    """

    name: str
    unit: int
    forward: PhaseMemory
    backward: PhaseMemory
    recompute_peak_bytes: int
    recompute_churn_bytes: int
    saved: tuple[int, ...]
    inputs: tuple[int, ...]
    saved_bytes: int
    saved_input_bytes: int
    input_bytes: int
    output_bytes: int
    selective_again_bytes: int = 0
    kept_beside_bytes: int = 0
    recompute_fresh: Fresh = NOTHING_FRESH


@dataclass(frozen=True)
class MemoryProfile:
    """What one micro-batch takes.

    Attributes:
        trace: the order of unit runs, from the same pass.
        how: "fake", "meta" (attention by its generic kernels, which save more) or "real".
        units: one for each unit run.
        before: from the begin to the first unit.
        loss: from the end of the model's forward to the end of the loss.
        loss_backward: from there to the first unit's backward.
        storages: those that outlive the phase in which they were made.
        order: the phases of the pass, in the order in which they happened.
        peak_bytes: of the whole pass, everything kept, without gradients of parameters.
        summing_peak_bytes: likewise with each gradient from its making until it is added to a sum that lies elsewhere.
        collecting_peak_bytes: likewise with each gradient from its making to the end.
        library_bytes: what libraries of kernels keep for the whole process after the first pass; in no other number.
    """

    trace: Trace
    how: str
    units: tuple[UnitMemory, ...]
    before: PhaseMemory
    loss: PhaseMemory
    loss_backward: PhaseMemory
    storages: tuple[StorageLife, ...]
    order: tuple[Phase, ...]
    peak_bytes: int
    summing_peak_bytes: int
    collecting_peak_bytes: int
    library_bytes: int

    def staging_bytes(self, run: int) -> int:
        """Of a buffer that holds everything that unit run `run` was the first to save, each storage at a multiple of
        64."""
        return self.units[run].saved_bytes

    def selective_bytes(self, run: int) -> int:
        """What unit run `run` holds from forward to backward where it is recomputed selectively: its inputs, and the
        outputs of its matrix products and attention."""
        kept = {number for number, life in enumerate(self.storages) if life.kept_by == run}
        numbers = kept | set(self.units[run].inputs)
        return sum(self.storages[number].num_bytes for number in numbers) + self.units[run].kept_beside_bytes


def measure_memory(
    model: nn.Module,
    units: Sequence[Unit],
    forward: Forward,
    loss: Loss,
    micro_batch: Any,
    shapes: Shapes | None = None,
    input_dtype: InputDtype | None = None,
) -> MemoryProfile:
    """The profile of `loss(forward(model, micro_batch), micro_batch)` and its backward pass.

    The model, its buffers, gradients and the random numbers stay as they are. A model that needs values runs for real,
    on its own parameters and copies of its buffers; its saved tensors stay alive then, and `unsaved_peak_bytes` counts
    them.

    Args:
        shapes, input_dtype: as in `trace_model`.

    Raises:
        whatever the model raises when a real pass fails.
    """
    found = record_without_values(model, units, forward, loss, micro_batch, shapes, input_dtype)
    if found is None:
        watch = StorageWatch(replaces=False)
        with torch.random.fork_rng():
            trace = record(shared_twin(model), units, forward, loss, micro_batch, watch, input_dtype)
        found = trace, watch, "real"
    return _profile(*found, [units[call.unit].name for call in found[0].calls])


def _profile(trace: Trace, watch: StorageWatch, how: str, names: Sequence[str]) -> MemoryProfile:
    replay = Replay(watch)
    lives = tuple(
        StorageLife(
            round_up(storage.num_bytes),
            storage.phase,
            replay.dropped_in.get(id(storage)),
            tuple(run for run in storage.saved_by if run is not None),
            None in storage.saved_by,
            replay.released_in.get(id(storage)),
            tuple(storage.passed_to),
            storage.kept_by,
        )
        for storage in replay.lasting
    )
    made_by: dict[int, int] = {}
    for storage in watch.records:
        for run in storage.returned_by:
            if storage.phase == ("F", run):
                made_by[run] = made_by.get(run, 0) + round_up(storage.num_bytes)
    lasting = {id(storage) for storage in replay.lasting}
    beside: dict[int, int] = {}
    for storage in watch.records:
        if storage.kept_by is not None and id(storage) not in lasting:
            beside[storage.kept_by] = beside.get(storage.kept_by, 0) + round_up(storage.num_bytes)
    owned: dict[int, list[int]] = {}
    given: dict[int, list[int]] = {}
    for number, life in enumerate(lives):
        if life.saved_by and not life.saved_between:
            owned.setdefault(life.saved_by[0], []).append(number)
        for run in life.passed_to:
            given.setdefault(run, []).append(number)
    units = tuple(
        _unit(
            name,
            call.unit,
            run,
            replay,
            lives,
            owned.get(run, ()),
            given.get(run, ()),
            made_by.get(run, 0),
            beside.get(run, 0),
        )
        for run, (name, call) in enumerate(zip(names, trace.calls, strict=True))
    )
    return MemoryProfile(
        trace,
        how,
        units,
        replay.phases.get(("before", 0), PhaseMemory()),
        replay.phases.get(("loss", 0), PhaseMemory()),
        replay.phases.get(("loss", 1), PhaseMemory()),
        lives,
        tuple(replay.phases),
        replay.peak_bytes,
        replay.summing_peak_bytes,
        replay.collecting_peak_bytes,
        watch.library_bytes,
    )


def _unit(
    name: str,
    unit: int,
    run: int,
    replay: Replay,
    lives: Sequence[StorageLife],
    owned: Sequence[int],
    given: Sequence[int],
    output_bytes: int,
    kept_beside_bytes: int,
) -> UnitMemory:
    return UnitMemory(
        name=name,
        unit=unit,
        forward=replay.phases.get(("F", run), PhaseMemory()),
        backward=replay.phases.get(("B", run), PhaseMemory()),
        recompute_peak_bytes=replay.recompute_peak_bytes.get(run, 0),
        recompute_churn_bytes=replay.recompute_churn_bytes.get(run, 0),
        saved=tuple(owned),
        inputs=tuple(given),
        saved_bytes=sum(lives[number].num_bytes for number in owned),
        saved_input_bytes=sum(lives[number].num_bytes for number in owned if lives[number].made_in != ("F", run)),
        input_bytes=sum(lives[number].num_bytes for number in given),
        output_bytes=output_bytes,
        selective_again_bytes=replay.selective_again_bytes.get(run, 0),
        kept_beside_bytes=kept_beside_bytes,
        recompute_fresh=replay.recompute_fresh.get(run, NOTHING_FRESH),
    )
