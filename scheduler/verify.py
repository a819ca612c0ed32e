"""Whether a program can run and does what a step is: checked before anything moves.

Owns the rules and the refusal. It looks at the finished program alone, not at how it was made (`link.py`). The rules:

    1 meaning       taken in the order in which it is written, every use finds its data, every unit and micro-batch runs
                    once each way, every trainable chunk is updated once with all of its gradients (`holdings.py`)
    2 order         two instructions that touch the same thing, one of them changing it, are ordered by lanes and
                    dependencies: every legal run then gives what the written order gives
    3 buffers       no two live buffers share bytes, and what filled and used a buffer before is over when it is filled
    4 bytes         the fullest moment stays within every tier's capacity; copies whose way to disk goes on stay few
    5 ranks         collectives come in the same order on every rank, sends find their receivers, nobody waits in a
                    circle (`rank_check.py`)

Dependencies point backwards (`Program` sees to it), so that lanes and dependencies of one rank have no circle.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from ..memory.budget import format_bytes
from ..memory.errors import InvalidProgram
from ..parallel.actions import Action, Kind
from .happens import Accesses, Order
from .holdings import Holdings, Refused, is_gathered, needs
from .ledger import Ledger
from .plan import Plan, UpdateTime
from .program import Buffer, Lane, Program, StepShape
from .rank_check import check_ranks
from .stage_holdings import TRANSFERS, StageHoldings

__all__ = ["verify"]

_MOST_SAVING = 1  # activations whose way to disk may go on while the next unit runs


def verify(
    program: Program,
    shape: StepShape,
    plan: Plan,
    peers: Sequence[Program] = (),
    capacity_bytes: Mapping[str, int] | None = None,
    ledgers: Mapping[str, Ledger] | None = None,
) -> None:
    """Refuse a program that would deadlock, overflow or compute something else.

    Args:
        peers: the other ranks' programs, where there are any.
        capacity_bytes: tier -> the most that it may hold.
        ledgers: tier -> the fullest moment of this program, for those tiers.

    Raises:
        InvalidProgram: says at which instruction, and why.
    """
    leaves = frozenset(f"c{a.index}:{a.slot}" for a in program.actions()[: program.num_carried])
    _Check(program, shape, plan, leaves).run()
    if program.num_carried:  # the first step reads what the others find
        _Check(program.without_carried(), shape, plan, leaves).run()
    for tier, ledger in (ledgers or {}).items():
        capacity = (capacity_bytes or {}).get(tier)
        if capacity is not None and ledger.peak_bytes > capacity:
            raise InvalidProgram(
                f"{tier} holds {format_bytes(ledger.peak_bytes)} at {ledger.where}, "
                f"{format_bytes(ledger.peak_bytes - capacity)} more than its {format_bytes(capacity)}"
            )
    for tier in {buffer.tier for buffer in program.buffers}:
        capacity = (capacity_bytes or {}).get(tier)
        if capacity is not None and program.arena_bytes(tier) > capacity:
            raise InvalidProgram(
                f"the buffers on {tier} need {format_bytes(program.arena_bytes(tier))}, it has {format_bytes(capacity)}"
            )
    if peers:
        check_ranks([program, *peers])


class _Check:
    """One program, once. `leaves`: slots whose writes are left to the next step."""

    def __init__(self, program: Program, shape: StepShape, plan: Plan, leaves: frozenset[str]) -> None:
        self.program, self.shape, self.plan = program, shape, plan
        self.order = Order(program)
        self.accesses = Accesses(self.order)
        carried = [instruction.action for instruction in program.instructions[: program.num_carried]]
        for position, action in enumerate(carried):
            if action.kind is not Kind.WRITE:
                self._refuse(position, "only writes run into the next step")
        found = frozenset(f"c{a.index}:{a.slot}" for a in carried)
        self.holdings = _holdings(program, shape, plan, found, leaves)
        self.kept = program.kept
        self.kept_reads = {
            position
            for position, i in enumerate(program.instructions)
            if i.action.kind is Kind.READ and not i.num_bytes
        }
        self.buffers = {buffer.name: buffer for buffer in program.buffers}
        self.overlapping = _overlapping(program.buffers)
        self.users: dict[str, dict[Lane, int]] = {}  # buffer -> lane -> last instruction that used it
        self.saving: list[int] = []

    def run(self) -> None:
        for position, instruction in enumerate(self.program.instructions):
            action = instruction.action
            if action.kind.is_compute and instruction.lane is not Lane.COMPUTE:
                self._refuse(position, f"it is on lane {instruction.lane}, and units run on the compute lane")
            moves = position not in self.kept_reads
            if moves:
                self._check_buffers(position, action)
            try:
                self.holdings.apply(action) if moves else self.holdings.find_kept(action)
            except Refused as refused:
                self._refuse(position, str(refused))
            if position == self.program.num_carried - 1 and self.holdings.live_buffers() - self.kept:
                self._refuse(position, "something else than what the last step left is in memory")
            reads, changes = touched(action, self.shape, self.plan)
            if not moves:  # it looks whether the slot is there
                reads, changes = changes, []
            if position < self.program.num_carried and changes[0] in self.kept:  # it looks at what is used meanwhile
                reads, changes = changes[:1], changes[1:]
            found = self.accesses.add(position, reads, changes)
            if found is not None:
                self._refuse(position, f"nothing orders it behind {self._name(found.first)}; both touch {found.what}")
            self._note_users(position, {*reads, *changes})
            self._check_saving(position, action)
        try:
            self.holdings.finish()
        except Refused as refused:
            raise InvalidProgram(f"at the end of the step: {refused}") from None

    def _check_buffers(self, position: int, action: Action) -> None:
        for filled in _filled(action, self.plan, self.holdings):
            if filled not in self.buffers:
                self._refuse(position, f"there is no buffer {filled}")
            live = self.holdings.live_buffers()
            for other in self.overlapping[filled]:
                if other in live and other != filled:
                    self._refuse(position, f"its buffer shares bytes with {other}, which is in use")
                for user in self.users.get(other, {}).values():
                    if not self.order.is_before(user, position):
                        self._refuse(position, f"nothing orders it behind {self._name(user)}, which uses these bytes")

    def _note_users(self, position: int, touched_names: set[str]) -> None:
        instruction = self.program.instructions[position]
        names = {name for name in touched_names if name in self.buffers}
        action = instruction.action
        if action.kind is Kind.F:  # what it saves lies elsewhere until SAVE
            names = {name for name in names if not name.startswith("a")}
        elif not self.plan.unified and (action.kind is Kind.LOAD or action.kind.is_compute):
            names |= {f"a{action.index}.{action.micro_batch}:device"} & self.buffers.keys()
        for name in names:
            self.users.setdefault(name, {})[instruction.lane] = position

    def _check_saving(self, position: int, action: Action) -> None:
        """Activations that wait for the disk are still in memory: they must not pile up."""
        if action.kind is Kind.SAVE:
            self.saving.append(position)
        elif action.kind is Kind.F:
            late = [save for save in self.saving if not self.order.is_before(save, position)]
            if len(late) > _MOST_SAVING:
                self._refuse(position, f"{len(late)} units' activations may still be on their way to disk")

    def _name(self, position: int) -> str:
        return f"{self.program.instructions[position].action} at {position}"

    def _refuse(self, position: int, why: str) -> NoReturn:
        around = self.program.instructions[max(0, position - 3) : position + 4]
        raise InvalidProgram(
            f"{self._name(position)} on lane {self.program.instructions[position].lane}: {why}. "
            f"Around it: {', '.join(str(instruction.action) for instruction in around)}"
        )


def _holdings(
    program: Program, shape: StepShape, plan: Plan, carried: frozenset[str], leaves: frozenset[str]
) -> Holdings:
    if plan.pipeline is None:
        return Holdings(shape, plan, carried, leaves, program.kept)
    runs = frozenset(a.index for a in program.actions(Kind.F) if a.index is not None)
    transfers = frozenset((a.kind, a.index) for a in program.actions() if a.kind in TRANSFERS and a.index is not None)
    return StageHoldings(shape, plan, carried, leaves, program.kept, runs=runs, transfers=transfers)


def _overlapping(buffers: Sequence[Buffer]) -> dict[str, list[str]]:
    """Buffer -> those with bytes in common, itself included."""
    return {
        one.name: [
            other.name
            for other in buffers
            if one.tier == other.tier
            and one.start_bytes < other.start_bytes + other.num_bytes
            and other.start_bytes < one.start_bytes + one.num_bytes
        ]
        for one in buffers
    }


def _filled(action: Action, plan: Plan, holdings: Holdings) -> list[str]:
    """The buffers that an action puts something new into."""
    saved = f"a{action.index}.{action.micro_batch}"
    match action.kind:
        case Kind.READ:
            return [f"c{action.index}:{action.slot}"]
        case Kind.UP:
            return [f"c{action.index}:device"]
        case Kind.DOWN:
            return [f"c{action.index}:grad"]
        case Kind.SAVE:
            return [saved]
        case Kind.LOAD:
            waits = saved in holdings.live_buffers()  # on the host, and is copied up from there
            return [saved] * (not waits) + [f"{saved}:device"] * (not plan.unified)
        case _:
            return []


def touched(action: Action, shape: StepShape, plan: Plan) -> tuple[list[str], list[str]]:
    """What an action reads, and what it changes.

    Slots in memory (`c3:optim`), gathered copies (`c3 gathered`), gradients (`c3 gradients`), sums over micro-batches
    (`c3 sums`), activations (`a4.1`), and what lies on disk (`disk c3:param`).
    """
    c, m = action.index, action.micro_batch
    slot = f"c{c}:{action.slot}"
    match action.kind:
        case Kind.READ:
            return [f"disk {slot}"], [slot]
        case Kind.WRITE:
            return [], [slot, f"disk {slot}"]
        case Kind.DROP:
            return [], [f"c{c} gathered" if action.slot is None else slot]
        case Kind.GATHER:
            assert c is not None
            return [f"c{c}:device" if plan.brings_up(c) else f"c{c}:param"], [f"c{c} gathered"]
        case Kind.UP:
            return [f"c{c}:param"], [f"c{c}:device"]
        case Kind.DOWN:
            return [], [f"c{c} gradients", f"c{c}:grad"]
        case Kind.SAVE | Kind.LOAD:
            return [], [f"a{c}.{m}", f"disk a{c}.{m}"]
        case Kind.REDUCE:
            assert c is not None
            given = f"c{c}:grad" if plan.updates_on_host(c) else f"c{c} gradients"
            return [], [given, f"c{c} sums", f"c{c} squares"]
        case Kind.STEP:
            assert c is not None
            changes = [f"c{c}:param", f"c{c}:optim", f"c{c} gradients", f"c{c} sums", f"c{c} gathered"]
            takes_norms = plan.world_size == 1 and plan.update is UpdateTime.BACKWARD
            return [], changes + [f"c{c} squares"] * takes_norms
        case Kind.NORM:
            return _touched_by_norm(shape, plan)
        case kind if kind.is_compute:
            assert c is not None
            chunks = needs(c, shape)
            reads = [_parameters(chunk, plan) for chunk in chunks]
            trained = [chunk for chunk in chunks if shape.chunks[chunk].trainable]
            # The last forward goes on until a backward begins: code behind the last unit gives gradients meanwhile.
            gives = shape.held if kind is Kind.F and c == len(shape.units) - 1 else ()
            gradients = [f"c{n} gradients" for n in trained if kind in (Kind.B, Kind.W) or n in gives]
            return reads, [f"a{c}.{m}", "losses", *gradients]
        case _:
            return [], []


def _touched_by_norm(shape: StepShape, plan: Plan) -> tuple[list[str], list[str]]:
    trained = [c for c, chunk in enumerate(shape.chunks) if chunk.trainable]
    squares = [f"c{c} squares" for c in trained]
    sums = [f"c{c} {what}" for c in trained for what in ("gradients", "sums")]
    if plan.clips_gradients:
        return ["losses", *squares], sums
    return ["losses", *squares, *(sums if plan.world_size == 1 and plan.update is UpdateTime.AFTER else [])], []


def _parameters(chunk: int, plan: Plan) -> str:
    if is_gathered(chunk, plan):
        return f"c{chunk} gathered"
    return f"c{chunk}:device" if plan.brings_up(chunk) else f"c{chunk}:param"
