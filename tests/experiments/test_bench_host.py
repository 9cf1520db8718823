"""The benchmark of the host: every row decodes while it is timed."""

from experiments.bench_host import __main__ as bench_host


def test_the_host_is_timed_while_every_row_decodes():
    coordinator = bench_host.decoding(rows=6, stages=2, prompt=5, steps=20)
    times = bench_host.step_seconds(coordinator, 20)
    assert len(times) == 20 and times == sorted(times)
    told = [len(coordinator.step()) for _ in range(4)]
    assert told == [3, 3, 3, 3]  # a microbatch a tick
