"""Many random days, one a seed."""

from collections import Counter
from collections.abc import Callable

from tests.helpers.workload import Workload


def run_all(
    seeds: range,
    *,
    faults: bool = False,
    check: bool = True,
    make: Callable[..., Workload] = Workload,
) -> Counter[str]:
    """Run a workload a seed; returns what happened in all of them.

    Raises:
      AssertionError: naming the seed.
    """
    happened: Counter[str] = Counter()
    for seed in seeds:
        workload = make(seed, faults=faults)
        try:
            workload.run(check=check)
        except Exception as error:
            raise AssertionError(f"seed {seed}, faults={faults}: {error!r}") from error
        happened += workload.happened
        happened["faults"] += workload.chance.faults
        happened["lost"] += workload.transport.lost
        happened["damaged"] += workload.transport.damaged
        totals = workload.coordinator._runtime.recorder.transfers
        for name in ("transfers", "retries", "pages_skipped", "reprefilled_tokens"):
            happened[name] += getattr(totals, name)
        for pool in workload.coordinator.loop.fleet.pools.values():
            if pool.prefixes is not None and pool.pins is not None:
                happened["copied"] += pool.prefixes.totals.copied
                happened["pinned"] += pool.pins.totals.pinned
                happened["pins refused"] += pool.pins.totals.refused
        for job in workload.transport.jobs:
            source, target = (end.split("-")[0].split("/")[1] for end in (job.source, job.target))
            happened[f"{source} to {target}"] += 1
    return happened
