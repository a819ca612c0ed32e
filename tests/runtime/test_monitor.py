import pickle

from outgrow.runtime.events import Finished, MemoryHeld, Rows, Started
from outgrow.runtime.monitor import Monitor, MonitorSink


class Remote:
    """What Ray makes of an actor, without Ray: `actor.method.remote(...)`."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name):
        return type("Method", (), {"remote": staticmethod(getattr(self._target, name))})


def test_events_are_fetched_once_and_in_order():
    monitor = Monitor()
    monitor.put([Rows(({"step": 1},))])
    monitor.put([MemoryHeld(0, 1, {"host": 5})])
    assert monitor.drain() == [Rows(({"step": 1},)), MemoryHeld(0, 1, {"host": 5})]
    assert monitor.drain() == []


def test_a_cancelled_run_lets_no_rank_start():
    monitor = Monitor()
    assert monitor.register(0, "actor 0")
    assert monitor.cancel() == ["actor 0"]
    assert not monitor.register(1, "actor 1")


def test_rows_are_bundled_and_only_the_last_memory_is_sent():
    monitor = Monitor()
    sink = MonitorSink(Remote(monitor), interval_s=1e9)
    sink.send(Rows(({"step": 1},)))
    sink.send(MemoryHeld(0, 1, {"host": 5}))
    sink.send(Rows(({"step": 2},)))
    sink.send(MemoryHeld(0, 2, {"host": 6}))
    assert monitor.drain() == []
    finished = Finished(0, None, {})
    sink.send(finished)
    assert monitor.drain() == [MemoryHeld(0, 2, {"host": 6}), Rows(({"step": 1}, {"step": 2})), finished]


def test_rows_are_sent_at_once_where_no_time_is_given():
    monitor = Monitor()
    sink = MonitorSink(Remote(monitor), interval_s=0)
    sink.send(Rows(({"step": 1},)))
    assert monitor.drain() == [Rows(({"step": 1},))]


def test_events_travel():
    for event in (Started(0, 2, None, {"host": 1}, 7, "plan"), Finished(1, {"traceEvents": []}, {"param": 3})):
        assert pickle.loads(pickle.dumps(event)) == event
