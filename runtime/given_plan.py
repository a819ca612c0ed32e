"""A plan that the caller gives: whether it can be run as it stands.

Owns reading it and the checks against the model, the training and the machine. Does not own whether its bytes fit
(`runtime/planning.py`).
"""

import os
from pathlib import Path

from ..memory.budget import Memory
from ..scheduler.plan import Plan

__all__ = ["check_alone", "check_given", "read_plan"]


def read_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """The plan itself, or what a `plan.json` says.

    Raises:
        ValueError: no such file, or one that holds no plan.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | os.PathLike):
        raise ValueError(f"plan must be an outgrow Plan or the path of a plan.json, got {plan!r}")
    path = Path(plan).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"there is no plan at {path}: {error.strerror}") from error
    try:
        return Plan.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path} holds no plan that can be run: {error}") from error


def check_alone(plan: Plan, **words: object) -> None:
    """Raise ValueError where arguments decide again what the plan decides."""
    given = [name for name, value in words.items() if value is not None]
    if given:
        raise ValueError(
            f"plan= decides everything about memory, and {', '.join(f'{name}=' for name in given)} would decide it "
            f"again: leave {'it' if len(given) == 1 else 'them'} out, or plan="
        )


def check_given(plan: Plan, base: Plan, num_units: int, memory: Memory) -> None:
    """Raise ValueError where a plan is for another model, training or machine than `base`, which says these."""
    names = {
        "world_size": "ranks",
        "micro_batches": "micro-batches",
        "precision": "precision",
        "clips_gradients": "clipping of gradients",
        "unified": "device and host being the same memory",
    }
    for name, words in names.items():
        ours, theirs = getattr(base, name), getattr(plan, name)
        if ours != theirs:
            raise ValueError(f"the plan was made for {words}: {theirs}, and this training has {ours}; plan it again")
    # A rank of a pipeline has chunks of its own stages: how they are treated is what such a plan says of them.
    if plan.pipeline is None and len(plan.chunks) != len(base.chunks):
        raise ValueError(
            f"the plan decides about {len(plan.chunks)} chunks, and this model has {len(base.chunks)}: it was made for "
            "another model, or for other units"
        )
    if plan.activations and len(plan.activations) != num_units:
        raise ValueError(
            f"the plan decides about {len(plan.activations)} units, and this model has {num_units}: it was made for "
            "another model, or for other units"
        )
    if plan.uses_disk and memory.disk is None:
        raise ValueError("the plan puts state on disk: give memory=Memory(disk='/a/folder/on/a/disk')")
