"""How ranks are laid out: data-parallel groups, and the pipelines that cross them.

Owns the arithmetic and the process groups. World rank = pipeline rank * data ranks + data rank: the ranks that share a
stage's state stand next to each other. Does not own what is exchanged in the groups (`collectives.py`, `mail.py`).
"""

from dataclasses import dataclass

import torch.distributed as dist

__all__ = ["Mesh", "open_mesh"]


@dataclass(frozen=True)
class Mesh:
    """Where a rank stands.

    Attributes:
        rank: in the world.
        num_data: ranks that share the state of a stage.
        num_pipeline: ranks of a pipeline.
        data_group: the ranks of this one's stage; None where there is one alone.
        pipeline_group: the ranks of this one's pipeline; None where there is one alone.
    """

    rank: int = 0
    num_data: int = 1
    num_pipeline: int = 1
    data_group: dist.ProcessGroup | None = None
    pipeline_group: dist.ProcessGroup | None = None

    @property
    def num_ranks(self) -> int:
        return self.num_data * self.num_pipeline

    @property
    def data_rank(self) -> int:
        return self.rank % self.num_data

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.num_data


def open_mesh(num_pipeline: int) -> Mesh:
    """The mesh of the process group that there is, or of this process alone. Collective.

    Raises:
        ValueError: ranks that the pipeline does not divide.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_pipeline < 1 or ranks % num_pipeline:
        raise ValueError(
            f"pipeline={num_pipeline}: each pipeline takes so many ranks, and there are {ranks}; give a number that "
            f"divides {ranks}, or another number of workers"
        )
    rank = dist.get_rank() if ranks > 1 else 0
    num_data = ranks // num_pipeline
    if num_pipeline == 1:
        return Mesh(rank, num_data)
    data_group = pipeline_group = None
    for stage in range(num_pipeline):
        group = dist.new_group(range(stage * num_data, (stage + 1) * num_data), backend="gloo")
        data_group = group if stage == rank // num_data and num_data > 1 else data_group
    for place in range(num_data):
        group = dist.new_group(range(place, ranks, num_data), backend="gloo")
        pipeline_group = group if place == rank % num_data else pipeline_group
    return Mesh(rank, num_data, num_pipeline, data_group, pipeline_group)  # pyright: ignore[reportArgumentType]
