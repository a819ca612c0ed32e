"""`outgrow perf scale --largest`: the largest GPT that trains within a budget, by Outgrow, plain PyTorch and DeepSpeed.

Owns the search, the family of models that the peers are searched over, and the ratios. It does not own the runs
(`confined.py`): each is one training step in a memory cgroup of the budget, on the same batch of tokens, in a folder of
its own that goes away with it, since a run that the kernel kills cannot clear up.

Ours are GPTs as wide as the configuration says. A block of width 3072 has 113 million parameters, of which the peers
hold a few at the most: theirs are GPTs 768 wide, as configuration M, with the same tokens, and their blocks are
checkpointed, so that neither the size of a block nor activations decide. (DeepSpeed's pools of buffers have the size of
the embedding: 1024 wide it trains a tenth less.) The peers' largest is found to the block, ours, where a run takes
minutes, to within a tenth: if anything, the ratios are too low.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

from .confined import Job, Outcome, run_confined
from .figures import Figure
from .suite import Findings

__all__ = ["largest_count", "search"]

_MIB = 1 << 20
_OURS = "Outgrow"
_OUR_TOLERANCE = 0.1
_PEER_GROWTH = 1.25  # a peer's first guess is a good one, and runs at the limit of memory are slow ones
_PEER_SHAPE = {"width": 768, "num_heads": 12}
# Name, job, what it has to import, and the bytes a parameter for the first guess.
_PEERS = (("plain PyTorch", "plain", None, 17), ("DeepSpeed", "deepspeed", "deepspeed", 7))


@dataclass(frozen=True, slots=True)
class _Found:
    """Of one contestant: the most blocks that trained (None: not one), and what every number came to."""

    job: Job
    num_blocks: int | None
    outcomes: dict[int, Outcome]

    def num_parameters(self, num_blocks: int) -> int:
        return _num_parameters(_with_blocks(self.job, num_blocks))

    @property
    def billions(self) -> float | None:
        return None if self.num_blocks is None else self.num_parameters(self.num_blocks) / 1e9

    @property
    def note(self) -> str:
        """How many blocks, and why not more."""
        shape = f"{self.job.model['width']} wide"
        more = [count for count in self.outcomes if count > (self.num_blocks or 0)]
        least = min(more)  # a search ends on a number that was too great
        above = f"{least} ({self.num_parameters(least) / 1e9:.2f} billion): {_end(self.outcomes[least])}"
        if self.num_blocks is None:
            return f"not even one block {shape}; {above}"
        return f"{self.num_blocks} blocks {shape}; not {above}"

    @property
    def tried(self) -> str:
        return "; ".join(f"{count} {_end(each)}" for count, each in sorted(self.outcomes.items()))


def search(job: Job, say: Callable[[str], None]) -> Findings:
    """The largest of each, peers first as they are quick. `job` is ours: its model is where the search begins.

    Raises:
        CgroupUnavailable: no group can be made.
    """
    assert job.budget_bytes is not None
    assert job.folder is not None
    section = (
        f"the largest GPT in {job.budget_bytes / _MIB:,.0f} MiB, a step of {job.model['batch_size']}x"
        f"{job.model['length']} tokens"
    )
    found: dict[str, _Found] = {}
    figures: list[Figure] = []
    for name, who, module, bytes_each in _PEERS:
        if module is not None and find_spec(module) is None:
            figures.append(Figure(section, name, "billion", (), note=f"missing: {module}"))
            continue
        model = {**job.model, **_PEER_SHAPE}
        peer = replace(job, who=who, model=model, activations="recompute")
        guess = _first_guess(peer, job.budget_bytes // bytes_each)
        found[name] = _largest(name, _with_blocks(peer, guess), say, growth=_PEER_GROWTH)
        figures.append(_size(section, name, found[name]))
    ours = found[_OURS] = _largest(_OURS, job, say, tolerance=_OUR_TOLERANCE)
    figures.insert(0, _size(section, _OURS, ours))
    for name, *_ in _PEERS:
        figures.append(_ratio(section, name, ours, found.get(name)))
    if ours.num_blocks is not None:
        best = ours.outcomes[ours.num_blocks]
        figures.append(Figure(section, f"{_OURS}, start-up", "s", (best.startup_s,), note=best.plan))
        figures.append(Figure(section, f"{_OURS}, a step", "s", best.step_s, note=best.peaks))
    return Findings(
        tuple(figures),
        (
            f"The largest that trained is given: to {_OUR_TOLERANCE:.0%} for {_OURS}, to the block for the "
            "peers, which checkpoint their blocks. float32, AdamW, 1 rank of 2 threads.",
            *(f"{name}, blocks tried: {each.tried}" for name, each in found.items()),
        ),
    )


def _largest(name: str, job: Job, say: Callable[[str], None], tolerance: float = 0.0, growth: float = 2.0) -> _Found:
    outcomes: dict[int, Outcome] = {}

    def trains(num_blocks: int) -> bool:
        here = replace(_with_blocks(job, num_blocks), num_steps=1)
        say(f"{name}: {num_blocks} blocks, {_num_parameters(here) / 1e9:.2f} billion parameters")
        with tempfile.TemporaryDirectory(dir=job.folder) as folder:
            outcomes[num_blocks] = run_confined(replace(here, folder=folder), job.budget_bytes)
        return outcomes[num_blocks].end == "trained"

    return _Found(job, largest_count(trains, job.model["num_blocks"], tolerance, growth), outcomes)


def _with_blocks(job: Job, num_blocks: int) -> Job:
    return replace(job, model={**job.model, "num_blocks": num_blocks})


def _num_parameters(job: Job) -> int:
    from .models import GPTConfig  # torch, which only a run needs

    return GPTConfig(**job.model).num_parameters


def _first_guess(job: Job, num_parameters: int) -> int:
    """Blocks of a model of about so many parameters."""
    one, two = (_num_parameters(_with_blocks(job, count)) for count in (1, 2))
    return max(1, 1 + (num_parameters - one) // (two - one))


def _size(section: str, name: str, found: _Found) -> Figure:
    samples = () if found.billions is None else (found.billions,)
    return Figure(section, name, "billion", samples, note=found.note)


def _ratio(section: str, name: str, ours: _Found, peer: _Found | None) -> Figure:
    ours_billions, peer_billions = ours.billions, None if peer is None else peer.billions
    if not ours_billions or not peer_billions:
        return Figure(section, f"{_OURS} / {name}", "ratio", (), note="one of them was not measured")
    return Figure(section, f"{_OURS} / {name}", "ratio", (ours_billions / peer_billions,))


def _end(outcome: Outcome) -> str:
    """How it ended: a refusal says the most at its beginning, a traceback in its last line."""
    lines = outcome.message.strip().splitlines() or [""]
    return f"{outcome.end} {(lines[0] if outcome.end == 'refused' else lines[-1])[:250]}".strip()


def largest_count(trains: Callable[[int], bool], first: int, tolerance: float = 0.0, growth: float = 2.0) -> int | None:
    """The largest number that `trains`, where fewer do too; None: not even 1.

    From `first` on it tries `growth` times as many each time, then halves between.

    With a tolerance, the search ends where the least that is known not to train is no more than this part greater than
    what is returned.

    Raises:
        ValueError: `first` is less than 1, a negative tolerance, or no growth.
    """
    if first < 1 or tolerance < 0 or growth <= 1:
        raise ValueError(f"a model has a block, got {first}, a tolerance of {tolerance} and a growth of {growth}")
    good, bad = 0, first
    while trains(bad):
        good, bad = bad, max(bad + 1, int(growth * bad))
    while bad - good > max(1, tolerance * good):
        middle = (good + bad) // 2
        if trains(middle):
            good = middle
        else:
            bad = middle
    return good or None
