"""How many of twelve devices should prefill? The production coordinator on simulated engines.

You see a row for each split of twelve engines: latencies, and the share of requests that met both
bounds. Few prefill engines make the first token late, few decode engines make every token late.
Nothing waits: the clock is virtual, and the same run gives the same numbers.
"""

from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, PrefillConfig
from pdjax.sim.cluster import Cluster
from pdjax.sim.costs import StepCosts
from pdjax.workloads.synthetic import poisson

TTFT, TPOT = 0.3, 0.0057  # bounds, seconds
COSTS = StepCosts(tick=5e-3, tick_row=60e-6)  # as of Llama-3-8B on one GPU, roughly

print("prefill decode  p90 TTFT ms  p90 TPOT ms  within both bounds")
for engines in (2, 3, 6, 10):
    config = Config(
        kv=KVConfig(page_size=64),
        prefill=PrefillConfig(engines=engines, token_budget=2048),
        decode=DecodeConfig(engines=12 - engines, rows=64),
        handoff=HandoffConfig(layer_groups=4),
    )
    cluster = Cluster(config, costs=COSTS)
    cluster.expect(poisson(rate=60.0, count=80, prompt=(500, 3000), output=(10, 50)))
    run = cluster.run()
    good = [each for each in run.requests if each.ttft <= TTFT and (each.tpot or 0) <= TPOT]
    ttft, tpot = run.report["p90_ttft_ms"], run.report["p90_tpot_ms"]
    share = len(good) / len(run.requests)
    print(f"{engines:7} {12 - engines:6} {ttft:12.0f} {tpot:12.2f} {share:19.0%}")
