import pytest

from outgrow.runtime.config import TrainConfig
from outgrow.runtime.data import DataError, Share
from outgrow.runtime.worker import num_steps, shares


class Epochs:
    """A source whose epochs hold so many batches."""

    def __init__(self, *sizes, num_batches=None):
        self.sizes, self.num_batches = sizes, num_batches

    def epoch(self, epoch):
        return (Share(None, 1, epoch) for _ in range(self.sizes[min(epoch, len(self.sizes) - 1)]))


def epochs_of(source, **arguments):
    return [share.epoch for share in shares(source, TrainConfig(**arguments))]


def test_steps_go_on_over_epochs_and_epochs_end_on_their_own():
    assert epochs_of(Epochs(2), steps=5) == [0, 0, 1, 1, 2]
    assert epochs_of(Epochs(2), steps=2) == [0, 0]
    assert epochs_of(Epochs(2), epochs=2) == [0, 0, 1, 1]


def test_an_epoch_without_batches_is_an_error_not_an_endless_loop():
    with pytest.raises(DataError, match="not one sample"):
        epochs_of(Epochs(0), steps=5)
    with pytest.raises(DataError, match="nothing in epoch 1: it gave 2 batches before"):
        epochs_of(Epochs(2, 0), steps=5)
    with pytest.raises(DataError, match="not one sample"):
        epochs_of(Epochs(0), epochs=3)


def test_number_of_steps_where_it_can_be_known():
    assert num_steps(Epochs(2), TrainConfig(steps=5)) == 5
    assert num_steps(Epochs(2, num_batches=2), TrainConfig(epochs=3)) == 6
    assert num_steps(Epochs(2), TrainConfig(epochs=3)) is None
