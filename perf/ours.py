"""Outgrow's own contestants: the engine on the same model, data and optimizer as the peers."""

from torch import Tensor

from ..runtime.engine import Engine
from .members import Trainee
from .models import CONFIGS, build_gpt, token_loss
from .peers import adamw, batches_of
from .rank import Rank

__all__ = ["outgrow"]


def outgrow(rank: Rank, config: str, data: str = "random", zero: int | None = None) -> Trainee:
    """The engine on the process group that there is, or alone."""
    rank.keep_to_cores()
    engine = Engine(build_gpt(CONFIGS[config]), optimizer=adamw, loss=token_loss, zero=zero)

    def train(inputs: Tensor, targets: Tensor) -> float:
        return engine.step((inputs, targets)).loss

    return Trainee(rank, batches_of(config, data), train, engine.close, engine.transport_name)
