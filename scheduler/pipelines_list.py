"""List scheduling: any placement, any times, a memory limit per rank; one greedy pass in simulated time.

Owns `list_schedule` and `Rules`. Which rules to try, and what to keep, is `pipelines_auto.py`'s. A rank that becomes
free takes, of the forwards and input gradients whose inputs are there, the one its rules prefer; weight gradients fill
the gaps, unless something better arrives within a part of their time. Micro-batches keep their order on every stage and
kind, so gradients are summed in one order under every schedule.

No deadlock: a forward is admitted only if the later chunks of the same rank still find room afterwards, so the deepest
chunk can always run, and what it frees lets the next deepest run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from ..parallel.actions import Kind
from .pipeline_data import Draft, Op, StageCosts, per_rank

__all__ = ["Rules", "list_schedule"]

F, I, W, B = Kind.F, Kind.I, Kind.W, Kind.B  # noqa: E741
_UNKNOWN = float("inf")
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Rules:
    """What a free rank prefers.

    Attributes:
        forward_first: a ready forward before a ready backward (else after it).
        deep_first: among backwards, the later stage first; among forwards the later stage is always first.
        spacing: the first stage starts a forward no earlier than this part of the busiest rank's work for one
            micro-batch after the one before; 0 starts them as memory allows, 1 spreads them as in steady state.
        burst: this many forwards of the first stage are not spaced.
        patience: wait instead of starting a weight gradient when something better arrives within this part of its time.
        whole: run backward passes whole instead of splitting them.
    """

    forward_first: bool = False
    deep_first: bool = True
    spacing: float = 0.0
    burst: int = 0
    patience: float = 0.5
    whole: bool = False


def list_schedule(
    placement: Sequence[int],
    num_micro_batches: int,
    costs: StageCosts,
    limits: Sequence[float],
    rules: Rules,
    guide: dict[Op, float] | None = None,
) -> Draft | None:
    """One greedy pass.

    Args:
        placement: rank of each stage.
        num_micro_batches: m.
        costs: of exactly these stages.
        limits: most activations of each rank, in the unit of the costs.
        rules: preferences.
        guide: a wished time for each F and I; of what is ready, the earliest wish goes first.

    Returns:
        The draft, or None if a rank has no room for one micro-batch.
    """
    num_stages, m, num_ranks = len(placement), num_micro_batches, len(limits)
    last = num_stages - 1
    held = costs.activations
    local: list[list[int]] = [[] for _ in range(num_ranks)]
    for stage, rank in enumerate(placement):
        local[rank].append(stage)
    room = [0.0] * num_stages  # what a forward needs free: itself and the later chunks of its rank
    for stages in local:
        need = 0.0
        for stage in reversed(stages):
            need += held[stage]
            room[stage] = need
    caps = [limit * (1 + _EPSILON) + _EPSILON for limit in limits]
    if any(room[stages[0]] > cap for stages, cap in zip(local, caps, strict=True) if stages):
        return None
    forward_s, weight_s, comm_s = costs.forward_s, costs.weight_s, costs.comm_s
    backward_kind = B if rules.whole else I
    backward_s = [i + (w if rules.whole else 0.0) for i, w in zip(costs.input_s, weight_s, strict=True)]
    spacing_s = rules.spacing * max(per_rank(costs.total_s, placement, num_ranks))
    # When the inputs of the next actions of each stage are there.
    forward_at = [[0.0] * m if stage == 0 else [_UNKNOWN] * m for stage in range(num_stages)]
    backward_at = [[_UNKNOWN] * m for _ in range(num_stages)]
    next_forward, next_backward = [0] * num_stages, [0] * num_stages
    pending: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    pending_head = [0] * num_ranks
    used, free_at = [0.0] * num_ranks, [0.0] * num_ranks
    orders: list[list[Op]] = [[] for _ in range(num_ranks)]
    events = [(0.0, rank) for rank in range(num_ranks)]
    remaining = num_stages * m * (2 if rules.whole else 3)
    last_release = -_UNKNOWN
    while events and remaining:
        now, rank = heappop(events)
        if free_at[rank] > now + _EPSILON:
            continue
        soon = now + _EPSILON
        best_key: tuple[float, ...] | None = None
        best: tuple[Kind, int, int] | None = None
        arrival = _UNKNOWN
        for stage in local[rank]:
            j = next_backward[stage]
            if j < m:
                at = backward_at[stage][j]
                if at <= soon:
                    if guide is not None:
                        key = (guide[I, stage, j],)
                    else:
                        key = (1.0 if rules.forward_first else 0.0, -stage if rules.deep_first else stage)
                    if best_key is None or key < best_key:
                        best_key, best = key, (backward_kind, stage, j)
                elif at < arrival:
                    arrival = at
            j = next_forward[stage]
            if j < m:
                at = forward_at[stage][j]
                if stage == 0 and j > rules.burst and spacing_s:
                    at = max(at, last_release + spacing_s)
                if used[rank] + room[stage] > caps[rank]:
                    continue
                if at <= soon:
                    key = (guide[F, stage, j],) if guide is not None else (0.5, -stage)
                    if best_key is None or key < best_key:
                        best_key, best = key, (F, stage, j)
                elif at < arrival:
                    arrival = at
        queue, head = pending[rank], pending_head[rank]
        if best is None and head < len(queue):
            stage, j = queue[head]
            if arrival - now >= rules.patience * weight_s[stage] - _EPSILON:
                best = (W, stage, j)
                pending_head[rank] += 1
        if best is None:
            if arrival < _UNKNOWN:
                heappush(events, (arrival, rank))
            continue
        kind, stage, j = best
        orders[rank].append(best)
        remaining -= 1
        if kind is F:
            end = now + forward_s[stage]
            used[rank] += held[stage]
            next_forward[stage] += 1
            if stage == 0:
                last_release = now
            if stage == last:
                backward_at[stage][j] = end
            else:
                other = placement[stage + 1]
                at = forward_at[stage + 1][j] = end + (comm_s if other != rank else 0.0)
                if other != rank:
                    heappush(events, (at, other))
        elif kind is W:
            end = now + weight_s[stage]
            used[rank] -= held[stage]
        else:
            end = now + backward_s[stage]
            next_backward[stage] += 1
            if kind is I:
                queue.append((stage, j))
            else:
                used[rank] -= held[stage]
            if stage:
                other = placement[stage - 1]
                at = backward_at[stage - 1][j] = end + (comm_s if other != rank else 0.0)
                if other != rank:
                    heappush(events, (at, other))
        free_at[rank] = end
        heappush(events, (end, rank))
    return (tuple(placement), orders) if not remaining else None
