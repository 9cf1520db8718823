"""What does HTTP add to the first token and to those after it, on a model?

The same requests, Poisson arrivals of random prompts, come twice to one deployment: from a thread
of its process to the session (in the loop), and over HTTP from a process of their own, as streamed
completions. Of each rate a table has both, what HTTP adds to a request at the median, and, where
the shapes and the devices are those of the runs, vLLM's numbers (`baselines/vllm.py`).

Prediction (two H200, Llama-3-8B shapes, one prefills and one decodes): HTTP adds 1 to 2 ms to the
first token, most of it to read 2,048 token ids of JSON, and at most 0.1 ms to TPOT.

  python -m experiments.over_http --model=llama3_8b
  python -m experiments.over_http --model=llama3_8b --colocated --rate=2 --rate=6
  python -m experiments.over_http --model=tiny --prompt=24 --output=8 --rate=20 --seconds=1
"""

import asyncio
from dataclasses import replace
from typing import Any

from absl import flags

from experiments.baselines import vllm
from experiments.bench_fronts.ways import serving
from experiments.common.origin import origin, save
from experiments.common.shapes import MODELS, SHAPES, chosen_model, random_model
from experiments.common.tables import number, table
from experiments.over_http.loads import Load, added, in_the_loop, over_http, summary
from pdjax.async_llm import AsyncLLM
from pdjax.config import Config, DecodeConfig, KVConfig, PrefillConfig
from pdjax.flags import new_flags, run
from pdjax.serving import logs

FLAGS = new_flags()
_OF: dict[str, Any] = {"flag_values": FLAGS}
_MODEL = flags.DEFINE_enum("model", None, list(MODELS), SHAPES, **_OF)
_COLOCATED = flags.DEFINE_bool("colocated", False, "both phases on one device", **_OF)
_PROMPT = flags.DEFINE_integer("prompt", 2048, "tokens of a prompt", **_OF)
_OUTPUT = flags.DEFINE_integer("output", 256, "tokens of an answer", **_OF)
_RATES = flags.DEFINE_multi_float("rate", [2, 6, 10, 14], "requests a second", **_OF)
_SECONDS = flags.DEFINE_float("seconds", 20.0, "of arrivals", **_OF)
_ROWS = flags.DEFINE_integer("rows", 64, "rows of decode", **_OF)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "tokens a page", **_OF)
_FRONTS = flags.DEFINE_integer("fronts", 2, "processes of HTTP; 0: the engines' own", **_OF)
_SEED = flags.DEFINE_integer("seed", 0, "of arrivals and prompts", **_OF)
_OUT = flags.DEFINE_string("out", "results/over_http.json", "JSON file to write", **_OF)

COLUMNS = ("ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p90", "itl_p99")


def make_config(model: str | None) -> Config:
    """The config that all loads share."""
    prompt, output, page = _PROMPT.value or 1, _OUTPUT.value or 1, _PAGE_SIZE.value or 1
    config = Config(
        kv=KVConfig(page_size=page, prefix_cache=False),
        prefill=PrefillConfig(token_budget=max(prompt, page), max_sequences=8),
        decode=DecodeConfig(rows=_ROWS.value or 1, lookahead=2),
        colocated=bool(_COLOCATED.value),
    )
    longest = -(-(prompt + output) // page) * page
    return replace(config, model=random_model(chosen_model(model, config), longest))


def vllms(rate: float) -> dict[str, dict[str, float]]:
    """vLLM's rows of a rate, by their names."""
    found = vllm.POISSON if (_PROMPT.value, _OUTPUT.value) == (2048, 256) else {}
    return {name: rates[rate] for name, rates in found.items() if rate in rates}


def measure(llm: AsyncLLM, port: int, rate: float) -> dict[str, dict[str, float]]:
    """Both ways of one rate, and what lies between."""
    vocab_size, seed = llm.llm.spec.vocab_size, _SEED.value or 0
    prompt, output, seconds = _PROMPT.value or 1, _OUTPUT.value or 1, _SECONDS.value or 1.0
    load = Load.poisson(rate, seconds, prompt, output, vocab_size, seed)
    loop, http = in_the_loop(llm.llm, load), over_http(port, load)
    return {
        "in the loop": summary(loop, output),
        "over HTTP": summary(http, output) | added(http, loop, output),
    }


def main() -> None:
    """Run the experiment; see the module."""
    logs.set_up("warning")
    config, rates = make_config(_MODEL.value), sorted(_RATES.value or ())
    llm, found = AsyncLLM(config), dict[str, Any]()
    with serving(llm, _FRONTS.value or 0) as port:
        measure(llm, port, rates[0])  # the first requests find nothing warm
        for rate in rates:
            found[f"{rate:g}"] = told = measure(llm, port, rate)
            ttft, tpot = (told["over HTTP"][f"{what}_added"] for what in ("ttft", "tpot"))
            print(f"{rate:g}/s: HTTP adds {ttft:.2f} ms to TTFT, {tpot:.3f} to TPOT", flush=True)
    asyncio.run(llm.close())
    rows = [
        [f"{rate}/s, {way}", *(number(told.get(column), 2) for column in COLUMNS)]
        + [number(told.get(column), 2) for column in ("ttft_added", "tpot_added")]
        for rate, ways in found.items()
        for way, told in (ways | vllms(float(rate))).items()
    ]
    heads = [f"{column.replace('_', ' ')}, ms" for column in COLUMNS]
    print(table(["", *heads, "added to TTFT, ms", "to TPOT, ms"], rows))
    asked = {flag.name: flag.value for flag in (_PROMPT, _OUTPUT, _SECONDS, _ROWS, _FRONTS, _SEED)}
    colocated = {"colocated": config.colocated}
    save({**origin("uvicorn", "fastapi"), **asked, **colocated, "rates": found}, _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
