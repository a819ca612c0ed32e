"""A plan of four units whose bytes are added up by hand, for what chooses among plans."""

from outgrow.scheduler.assessment import Assessment, Open
from outgrow.scheduler.ledger import Ledger
from outgrow.scheduler.plan import Activations, ChunkPlan, Home, MicroBatchOrder, Plan
from outgrow.scheduler.program import Buffer, Program

__all__ = ["EVERYTHING", "NUM_UNITS", "PLAN", "assess"]

NUM_UNITS = 4
EVERYTHING = Open(homes=True, activations=True, order=True, update=True)
PLAN = Plan(1, 0, 2, "float32", False, 1, (ChunkPlan(),) * NUM_UNITS)


def assess(plan: Plan) -> Assessment:
    """Bytes by hand: 100 a chunk for slots, 50 for parameters, 20 a unit kept, 60 for sums of several micro-batches."""
    slots = sum(100 for chunk in plan.chunks if chunk.optimizer_home is Home.HOST)
    parameters = sum(50 for chunk in plan.chunks if chunk.parameter_home is Home.HOST)
    kept = sum(20 for unit in range(NUM_UNITS) if plan.activations_of(unit) is Activations.KEEP)
    sums = 60 if plan.order is MicroBatchOrder.SEQUENTIAL else 0
    buffers = 0 if parameters else max(10 + 10 * plan.prefetch, plan.cache_bytes)
    parts = {"state": slots + parameters, "activations": kept, "gradients": sums, "buffers": buffers}
    program = Program((), (Buffer("b", "host", 0, buffers),) if buffers else ())
    return Assessment(plan, program, Ledger(sum(parts.values()), "B3.1", parts))
