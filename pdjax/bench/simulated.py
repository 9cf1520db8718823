"""A workload to simulated engines, on the virtual clock of a cluster."""

from dataclasses import replace

from pdjax.bench.record import Played, Record, ended_badly
from pdjax.config import Config
from pdjax.deploy import deploy
from pdjax.host.metrics.summary import work_of
from pdjax.sim.cluster import LLAMA3_8B, Cluster, wiring
from pdjax.sim.costs import StepCosts
from pdjax.sim.links import Link
from pdjax.workloads.arrival import Arrival


def cluster_of(
    config: Config, costs: StepCosts | None = None, link: Link | None = None
) -> tuple[Cluster, int]:
    """The engines of a config, simulated, and the longest sequence in tokens. KV has the shapes of
    Llama 3 8B unless the config has a `model.spec`.

    Args:
      costs, link: of steps, and of a link; None takes the usual constants.
    """
    if config.model.spec is not None:
        deployment = deploy(config, "sim", costs=costs, link=link)
        return deployment.backing, deployment.max_model_len
    longest = config.model.max_model_len or 8192
    layout = replace(LLAMA3_8B, page_size=config.kv.page_size, tp=config.prefill.tp)
    return Cluster(config, layout, max_model_len=longest, **wiring(config, costs, link)), longest


def play(cluster: Cluster, arrivals: list[Arrival], salt: str = "") -> Played:
    """Serve a workload to its end; nothing else has been expected.

    Args:
      cluster: keeps as many requests as there are, `config.max_recorded`.
      arrivals: the workload, whose ids are those of no workload before.
      salt: another salt gives other prompts, of which no prefix cache knows.
    """
    cluster.recorder.clear()
    start = cluster.clock.now()
    cluster.expect(arrivals, start=start, salt=salt)
    run = cluster.run()
    # The recorder adds "#" and the number of the choice to an id, which may have a "#" of its own.
    of = {metrics.id.rpartition("#")[0]: metrics for metrics in run.requests}
    refused = set(run.refused)
    records = []
    for number, arrival in enumerate(arrivals):
        name = arrival.id
        if (metrics := of.get(name)) is not None:
            error = next((s.error for s in cluster.sequences[name]), None)
            records.append(Record(number, arrival, metrics, metrics.arrival, error))
        elif name in refused:
            due = start + arrival.moment
            sent: float | None = due
            reason, error = "shed", "QueueFull: the waiting queue has no room"
            if arrival.after and not (of.get(arrival.after) and of[arrival.after].completed):
                sent, reason = None, "error"
                error = f"never sent: {arrival.after} has not ended well"
            records.append(ended_badly(number, arrival, due, sent, reason, error))
        else:
            raise AssertionError(f"{name}: neither ended nor refused")
    # The virtual clock's zero stands for 1970, so that a second run does the same bytes.
    return Played(start, round(start * 1e9), records, work_of(cluster.recorder))
