"""The benchmark of one CPU device: what it compares, and its config."""

from experiments.bench_cpu.__main__ import one_device, show
from experiments.common.workload import Numbers, Workload

WORK = Workload(batches=(1, 2), context=20, steps=4, prefill=64, rounds=1)


def test_bench_compares_what_both_computed():
    ours = Numbers(900.0, {1: 30.0, 2: 31.0}, {1: 32.0, 2: 33.0}, {1: [[1]], 2: [[1], [2]]})
    theirs = Numbers(700.0, {1: 40.0, 2: 41.0}, {}, {1: [[1]], 2: [[1], [3]]})
    lines = show(WORK, {"pdjax": ours, "transformers": theirs}).splitlines()
    assert lines[2].split()[-2:] == ["900", "700"]
    assert lines[5].endswith("1 of 1")
    assert lines[8].endswith("1 of 2")
    alone = show(WORK, {"pdjax": ours})
    assert "same tokens" not in alone


def test_bench_config_holds_its_workload():
    config = one_device(2, WORK)
    assert config.devices == 1
    assert config.decode.page_buckets is not None
    assert config.decode.page_buckets[-1] * config.kv.page_size >= WORK.longest
