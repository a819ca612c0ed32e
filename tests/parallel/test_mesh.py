import pytest

from outgrow.parallel.mesh import Mesh, open_mesh


def test_ranks_that_share_a_stage_stand_next_to_each_other():
    places = [(mesh.data_rank, mesh.pipeline_rank) for mesh in (Mesh(rank, 2, 3) for rank in range(6))]
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert Mesh(5, 2, 3).num_ranks == 6


def test_one_process_is_a_mesh_of_its_own():
    assert open_mesh(1) == Mesh()
    for num_pipeline in (2, 0):
        with pytest.raises(ValueError, match=f"pipeline={num_pipeline}: each pipeline takes so many ranks"):
            open_mesh(num_pipeline)
