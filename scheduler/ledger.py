"""The host bytes of a program at its fullest moment, known before the first step.

Owns adding up what lives when: state, buffers, gradients, activations. Does not own the numbers themselves (a
`MemoryProfile`, the layouts of chunks), what a device with memory of its own holds (`device_ledger.py`), nor what is
done where they do not fit (`fit.py`).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from ..parallel.actions import Action, Kind
from .copies import gathered_peak
from .memory_levels import Keeping, Levels, levels_under
from .memory_profile import MemoryProfile
from .plan import Activations, MicroBatchOrder, Plan, UpdateTime
from .program import Program, StepShape
from .trace import Phase

_KEEPING = {Activations.RECOMPUTE: Keeping.RECOMPUTE, Activations.SELECTIVE: Keeping.SELECTIVE}
_MOST_FREED = 0.07  # of the whole peak: more room than that would hardly be used

__all__ = ["ActivationWalk", "HostFigures", "Ledger", "host_ledger", "keeping"]


@dataclass(frozen=True, slots=True)
class HostFigures:
    """What does not follow from the program.

    Attributes:
        process_bytes: resident before the model: interpreter, libraries, the worker.
        state_bytes: chunk -> bytes that lie in host memory from step to step, under the plan in question.
        gradient_bytes: chunk -> bytes of its gradients while they are kept.
        exchange_bytes: buffers between ranks, gathered copies excluded.
        update_bytes: chunk -> what an update takes beside the slots.
        is_summed: whether gradients are summed into float32 buffers of their own.
        reserve_bytes: for what nobody counts: the heap's gaps, threads' stacks, kernels' leftovers.
        copy_bytes: chunk -> bytes of a gathered copy that comes and goes.
        freed_share: of what a step's tensors take at the most, in freed blocks that may stay on top, where a plan keeps
            any: what fits into holes between those in use, and beside them. No more than 7% of the whole peak counts.
    """

    process_bytes: int
    state_bytes: Mapping[int, int]
    gradient_bytes: Mapping[int, int]
    exchange_bytes: int
    update_bytes: Mapping[int, int]
    is_summed: bool
    reserve_bytes: int
    copy_bytes: Mapping[int, int] = field(default_factory=dict)
    freed_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Ledger:
    """The fullest moment.

    Attributes:
        peak_bytes: in host memory, the whole process.
        where: the action.
        parts: what the bytes are for.
        levels: (position in the program, bytes) of every action that was added up: the others hold no more than the
            one before them.
        growth_bytes: phase, or STEP of a chunk -> by how much the heap grows in it at the most, where freed blocks are
            kept.
        fresh_shares: phase -> part of what it makes that lies in fresh pages there.
    """

    peak_bytes: int
    where: str
    parts: dict[str, int]
    levels: tuple[tuple[int, int], ...] = ()
    growth_bytes: Mapping[Phase, int] = field(default_factory=dict)
    fresh_shares: Mapping[Phase, float] = field(default_factory=dict)


def host_ledger(program: Program, shape: StepShape, plan: Plan, profile: MemoryProfile, figures: HostFigures) -> Ledger:
    """Walk the compute lane in its order: everything that host memory holds is bound to it. Activations count where
    units compute in host memory. A backward action waits for the exchange of the one before the last
    (`scheduler/link.py`), a forward action for none."""
    levels = levels_under(profile, keeping(program, shape, plan), in_buffers=True)  # what a LOAD brings is in the arena
    fixed = {
        "process": figures.process_bytes + profile.library_bytes,
        "state": sum(figures.state_bytes.values()),
        "buffers": program.arena_bytes("host"),
        "exchange": figures.exchange_bytes,
        "gathered": gathered_peak(program, figures.copy_bytes)[0],
        "reserve": figures.reserve_bytes,
    }
    if figures.is_summed and plan.update is UpdateTime.AFTER:  # the sums stay from step to step
        fixed["gradients"] = sum(figures.gradient_bytes.values())
        gradients = dict.fromkeys(figures.gradient_bytes, 0)
    else:
        gradients = dict(figures.gradient_bytes)
    walk = ActivationWalk(levels, plan.keeps_freed)
    # Gradients of the last backward actions that an exchange may still be taking; from a device they go to buffers.
    flying: deque[int] = deque(maxlen=2)
    held: set[int] = set()
    fixed_bytes, held_bytes = sum(fixed.values()), 0
    best = Ledger(0, "", {})
    sizes: list[tuple[int, int]] = []
    begun: list[tuple[Phase, int]] = []
    for position, instruction in enumerate(program.instructions):
        action = instruction.action
        activations = update = in_flight = 0
        if action.kind in (Kind.F, Kind.B):
            in_flight = flying[-1] if flying and action.kind is Kind.B else sum(flying)
            if action.kind is Kind.B:
                if plan.world_size > 1 and plan.unified:
                    flying.append(sum(shape.chunks[chunk].num_bytes for chunk in _reduced(action, shape)))
                held |= _completed(action, shape)
                held_bytes = sum(gradients.get(chunk, 0) for chunk in held)
            assert action.index is not None
            begun.append(((str(action.kind), action.index), fixed_bytes + held_bytes + walk.now))
            activations = walk.top(action) if plan.unified else 0
        elif action.kind is Kind.STEP:
            assert action.index is not None
            activations = walk.now if plan.unified else 0
            update = figures.update_bytes.get(action.index, 0)
        else:
            continue
        total = fixed_bytes + held_bytes + in_flight + activations + update
        sizes.append((position, total))
        if total > best.peak_bytes:
            sums = {"gradients": fixed.get("gradients", 0) + held_bytes + in_flight}
            best = Ledger(total, str(action), fixed | sums | {"activations": activations, "update": update})
        if action.kind is Kind.STEP and action.index is not None and action.index in held:
            held.discard(action.index)
            held_bytes -= gradients.get(action.index, 0)
    if not plan.keeps_freed:
        return replace(best, levels=tuple(sizes))
    heap_bytes = best.peak_bytes - best.parts["process"] - best.parts["reserve"]
    freed_bytes = int(min(figures.freed_share * heap_bytes, _MOST_FREED * best.peak_bytes))
    if freed_bytes:
        parts = best.parts | {"freed blocks": freed_bytes}
        best = replace(best, peak_bytes=best.peak_bytes + freed_bytes, parts=parts)
    growth = _growth(levels, fixed["gathered"] + _library_again(profile, plan), _sums(program, shape, gradients, plan))
    updates = {(str(Kind.STEP), chunk): num_bytes for chunk, num_bytes in figures.update_bytes.items()}
    held_back = [(phase, size - figures.reserve_bytes) for phase, size in begun]
    fresh = _fresh_shares(held_back, levels, growth, best.peak_bytes - figures.reserve_bytes // 2)
    return replace(best, levels=tuple(sizes), growth_bytes=growth | updates, fresh_shares=fresh)


def _growth(levels: Levels, anywhere_bytes: int, sums: Mapping[Phase, int]) -> dict[Phase, int]:
    """What each phase may add to a heap that gives nothing back: what it makes itself, and what other lanes make
    meanwhile.

    Args:
        anywhere_bytes: that may come in any phase.
        sums: phase of a unit -> what reductions may make in it; what comes between units is as the forward actions are.
    """
    between = max((size for (kind, _), size in sums.items() if kind == "F"), default=0)
    made = zip(levels.order, levels.growth_bytes, strict=True)
    return {phase: growth + anywhere_bytes + sums.get(phase, between) for phase, growth in made}


def _library_again(profile: MemoryProfile, plan: Plan) -> int:
    """Where micro-batches take turns, libraries' buffers are let go of at every turn, and taken again."""
    return profile.library_bytes if plan.order is MicroBatchOrder.BY_UNIT else 0


def _sums(program: Program, shape: StepShape, gradients: Mapping[int, int], plan: Plan) -> dict[Phase, int]:
    """Sums of gradients that come and go are made when a chunk is reduced: behind its backward action or, on a lane of
    its own, also behind the next one (`scheduler/link.py`: a backward action waits for those of the one before the
    last)."""
    if not plan.sums_gradients:
        return {}
    found: dict[Phase, int] = {}
    latest: deque[int] = deque(maxlen=2 if plan.world_size > 1 else 1)
    for action in program.actions():
        if action.kind not in (Kind.F, Kind.B) or action.index is None:
            continue
        if action.kind is Kind.B:
            latest.append(sum(gradients.get(chunk, 0) for chunk in _completed(action, shape)))
        phase = (str(action.kind), action.index)
        found[phase] = max(found.get(phase, 0), sum(latest))
    return found


def _fresh_shares(
    begun: Sequence[tuple[Phase, int]], levels: Levels, growth: Mapping[Phase, int], most_bytes: int
) -> dict[Phase, float]:
    """How much of what each phase makes lies in fresh pages, where a heap keeps freed blocks within `most_bytes`, from
    step to step: behind each time that it had to give them back. The mean over micro-batches.

    Args:
        begun: the phases in their order, with what is held at the begin of each.
        growth: what each phase may add, as the heap is told.
    """
    place = {phase: position for position, phase in enumerate(levels.order)}
    shares: dict[Phase, list[float]] = {}
    resident = 0
    for position, (phase, held) in enumerate((*begun, *begun)):  # the first of two steps says what the second one finds
        if (at := place.get(phase)) is None:
            continue
        if position == len(begun):
            shares.clear()
        resident = max(resident, held)
        if resident + growth[phase] > most_bytes:
            resident = held
        top = held + levels.summing_top_bytes[at] - levels.begin_bytes[at]
        shares.setdefault(phase, []).append(min(1.0, max(0, top - resident) / max(1, levels.growth_bytes[at])))
        resident = max(resident, top)
    return {phase: fmean(found) for phase, found in shares.items()}


def _completed(action: Action, shape: StepShape) -> set[int]:
    """Chunks that get gradients in a backward action."""
    assert action.index is not None
    chunks = (*shape.held, *shape.uses(action.index))
    return {chunk for chunk in chunks if shape.chunks[chunk].trainable}


def _reduced(action: Action, shape: StepShape) -> set[int]:
    """Chunks that are exchanged behind a backward action."""
    assert action.index is not None
    return {chunk for chunk in _completed(action, shape) if shape.last_backward_of(chunk) in (action.index, None)}


def keeping(program: Program, shape: StepShape, plan: Plan) -> list[Keeping]:
    """What happens to what each unit run saves, in the memory that it computes in. Activations whose backward follows
    at once stay where they are, whatever the plan says."""
    moved = {action.index for action in program.actions(Kind.SAVE)}
    policies: list[Keeping] = []
    for run, use in enumerate(shape.units):
        word = plan.activations_of(use.unit)
        policies.append(Keeping.OFFLOAD if run in moved else _KEEPING.get(word, Keeping.KEEP))
    return policies


class ActivationWalk:
    """Live activation bytes of all micro-batches; or, `with_freed`, of what is freed within an action too."""

    def __init__(self, levels: Levels, with_freed: bool = False) -> None:
        self._levels = levels
        self._top_bytes = levels.kept_top_bytes if with_freed else levels.summing_top_bytes
        self._place = {phase: position for position, phase in enumerate(levels.order)}
        self._done: dict[int, int] = {}
        self.now = 0

    def top(self, action: Action) -> int:
        """The most during `action`, what lies between it and the one before it in its micro-batch included."""
        assert action.index is not None
        assert action.micro_batch is not None
        phase = self._place.get((str(action.kind), action.index))
        if phase is None:
            return self.now
        done = self._done.get(action.micro_batch, 0)
        others = self.now - self._begin(done)
        top = others + max(self._top_bytes[done : phase + 1], default=0)
        self._done[action.micro_batch] = phase + 1
        self.now = others + self._begin(phase + 1)
        return top

    def _begin(self, position: int) -> int:
        return self._levels.begin_bytes[position] if 0 < position < len(self._levels.order) else 0
