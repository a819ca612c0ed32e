"""Run folders for tests of the report: a small program, simulated twice, the second time on a slower disk."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from steps import chain, plan_of

from outgrow.memory.timeline import chrome_trace
from outgrow.parallel.actions import Kind
from outgrow.scheduler.ledger import Ledger
from outgrow.scheduler.passes import compile_program
from outgrow.scheduler.prediction import Fate, Prediction
from outgrow.scheduler.program import Instruction
from outgrow.scheduler.simulate import Work, simulate

__all__ = ["GIB", "write_run"]

GIB = 1 << 30
SECONDS = {Kind.F: 0.02, Kind.B: 0.045, Kind.STEP: 0.01, Kind.READ: 0.018, Kind.WRITE: 0.02}
SLOWER = {Kind.READ: 1.8, Kind.F: 1.05}


def write_run(
    folder: Path, num_units: int = 6, micro_batches: int = 2, predicted: bool = True, measured: bool = True, **more: Any
) -> Prediction:
    """Write a run of `num_units` with state on disk; what stands in `more` is added to result.json."""
    shape = chain(*[(unit,) for unit in range(num_units)], pages=1000)
    shape = replace(shape, units=tuple(replace(use, name=f"h.<{n}>") for n, use in enumerate(shape.units)))
    program = compile_program(shape, plan_of(shape, micro_batches=micro_batches, prefetch=1, update="backward"))

    def cost(instruction: Instruction) -> Work:
        return Work(SECONDS.get(instruction.action.kind, 0.0))

    def real_cost(instruction: Instruction) -> Work:
        return Work(cost(instruction).seconds * SLOWER.get(instruction.action.kind, 1.0))

    counted = [n for n, i in enumerate(program.instructions) if i.action.kind in (Kind.F, Kind.B, Kind.STEP)]
    rng = random.Random(1)
    levels = tuple((n, GIB // 2 + rng.randrange(GIB // 4)) for n in counted)
    peak = max(size for _, size in levels)
    ledger = Ledger(peak, "B1.0", {"process": GIB // 4, "activations": peak - GIB // 4}, levels)
    fates = (
        Fate("optimizer on disk, <6> units recomputed", 1.5, peak, "chosen"),
        Fate("everything in memory", None, 3 * peak, "refused: 1.00 GiB too much at B5.0"),
    )
    simulated = simulate(program, cost)
    prediction = Prediction.of(program, shape, simulated, {"host": ledger}, {"host": 2 * peak}, fates)
    real = simulate(program, real_cost)
    folder.mkdir(parents=True)
    if predicted:
        (folder / "prediction.json").write_text(prediction.to_json())
    rows = [{"step": n, "step_s": real.seconds * 1.01, "loss": 1.0} for n in range(1, 21 if measured else 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if measured:
        notes = {"step": 17, "step_s": real.seconds * 1.01, "units": list(prediction.units)}
        (folder / "timeline.json").write_text(json.dumps(chrome_trace([real.timeline]) | {"otherData": notes}))
    peaks = {"0": {"host": int(0.96 * peak)}, "1": {"host": int(0.97 * peak)}} if measured else {}
    summary = {"status": "finished", "peak_bytes": peaks, "budget_bytes": {"0": {"host": 2 * peak}}}
    (folder / "result.json").write_text(json.dumps(summary | more))
    return prediction
