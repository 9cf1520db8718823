"""What do unguided neighbours pay for guided rows?

All rows of one deployment decode; in turns none of them is guided, or the last few are, by a form
that no answer completes. The gaps between tokens of the same unguided rows are compared within a
turn; the order of a turn's cases is turned round from one to the next. Two ways to serve a guided
row, whose mask the host knows only when it has read the row's last token:

  sits out  the row sits out the ticks until then, and its neighbours go on: decode.lookahead=1
  waits     every tick waits until then, though not longer than a turn does: decode.lookahead=0

Forms: `schema`, records in JSON; `regex`, sentences, whose masks take llguidance ten times as
long; `any`, masks that cost nothing to work out. Weights and prompts are random, and so is the
vocabulary, since a model of random weights has none: `random_tokenizer` draws a byte-level one of
the model's size. Tokens are drawn at temperature 1, so that texts differ.

Prediction (one H200, Llama-3-8B shapes, 64 rows, colocated, against no guided row that sits out):
(1) beside 1 and 8 rows of the schema the neighbours' p50 is within 1%, beside 16 within 2%; p99
within 10%. (2) Beside 16 of the regex, p50 is 1.5 times or more: the coordinator works out 16 masks
of a millisecond one after another, every second tick. (3) Ticks that wait cost the neighbours 10%
with no guided row, and 25% beside 16 of the schema. (4) The guided rows' own p50 is two ticks where
they sit out, and one where all wait. The second prediction is of masks that the coordinator's own
thread works out, as up to commit b8e274c. Threads do so since, and a turn waits 2 ms for them
at the most: (2) then becomes a p50 within 2% and a p99 within 30% where rows sit out, and the 16
rows have a token every third tick or more seldom; where ticks wait, p50 is 2 ms over (3)'s.

  python -m experiments.guided --model=llama3_8b --colocated
  python -m experiments.guided --model=tiny --rows=4 --guided=1 --steps=10 --forms=any --turns=1
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from absl import flags

from experiments.common.origin import origin, save
from experiments.common.shapes import MODELS, SHAPES, chosen_model, random_model
from experiments.common.tables import number, table
from experiments.guided.forms import FORMS, form_maker
from experiments.guided.phases import Load, Phase, Rows
from pdjax import LLM, Config
from pdjax.config import DecodeConfig, KVConfig, PrefillConfig
from pdjax.flags import new_flags, run

FLAGS = new_flags()
_OF: dict[str, Any] = {"flag_values": FLAGS}
_MODEL = flags.DEFINE_enum("model", None, list(MODELS), SHAPES, **_OF)
_COLOCATED = flags.DEFINE_bool("colocated", False, "both phases on one device", **_OF)
_ROWS = flags.DEFINE_integer("rows", 64, "rows of decode, all of them busy", **_OF)
_GUIDED = flags.DEFINE_multi_integer("guided", [1, 8, 16], "rows that are guided", **_OF)
_FORMS = flags.DEFINE_multi_enum("forms", ["schema", "regex"], FORMS, "what guides them", **_OF)
_PROMPT = flags.DEFINE_integer("prompt", 128, "tokens of a prompt", **_OF)
_STEPS = flags.DEFINE_integer("steps", 120, "gaps of a row and phase", **_OF)
_WARM = flags.DEFINE_integer("warm", 20, "ticks dropped as a phase begins", **_OF)
_TURNS = flags.DEFINE_integer("turns", 4, "turns through all cases", **_OF)
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "tokens a page", **_OF)
_OUT = flags.DEFINE_string("out", "results/guided.json", "JSON file to write", **_OF)

WAYS = {"sits out": 1, "waits": 0}
"""Each way, and its `decode.lookahead`."""

Case = tuple[str, str, int]
"""A way, a form and the number of guided rows."""

QUIET: Case = ("sits out", "", 0)
BUDGET = 2048
"""Tokens of a prefill step."""


def make_config(model: str, load: Load, page_size: int, lookahead: int, colocated: bool) -> Config:
    """A config with the buckets that this load needs, and room for all of it at once."""
    row = -(-(load.prompt + load.output) // page_size)
    sequences = max(1, min(load.rows, BUDGET // load.prompt))
    budget = min(BUDGET, sequences * load.prompt)
    return Config(
        model=random_model(model, row * page_size),
        kv=KVConfig(page_size=page_size, prefix_cache=False),
        prefill=PrefillConfig(
            pages=1 + load.rows * row,
            token_budget=budget,
            max_sequences=sequences,
            token_buckets=(budget,),
            page_buckets=(max(row, -(-budget // page_size) + sequences),),
        ),
        # One page more for each: the coordinator keeps it in reserve for a decoding sequence.
        decode=DecodeConfig(
            rows=load.rows,
            pages=1 + load.rows * (row + 1),
            lookahead=lookahead,
            page_buckets=(row,),
        ),
        colocated=colocated,
        cpu_devices=2,
        warm_up=False,  # no progress bar is needed here
    )


def ratios(quiet: Phase, phase: Phase) -> dict[str, float]:
    """Percentiles of the rows without a guide, by those of the same rows in `quiet`."""
    same = quiet.gaps[: len(phase.gaps)]
    return {f"p{q}": float(np.percentile(phase.gaps, q) / np.percentile(same, q)) for q in (50, 99)}


def turn(rows: Mapping[str, Rows], cases: list[Case]) -> list[dict[str, Any]]:
    """Each case once."""
    phases = {case: rows[case[0]].phase(*case[1:]) for case in cases}
    quiet = phases[QUIET]
    return [
        {"way": way, "form": form, "guided": guided}
        | phases[way, form, guided].to_json()
        | {"ratio": ratios(quiet, phases[way, form, guided])}
        for way, form, guided in cases
    ]


def show(turns: list[list[dict[str, Any]]], cases: list[Case]) -> str:
    """A row for each case; medians over the turns, and the least and the most of a ratio."""
    lines = []
    for way, form, guided in cases:
        seen = [
            each
            for of_turn in turns
            for each in of_turn
            if (each["way"], each["form"], each["guided"]) == (way, form, guided)
        ]

        def median(key: str, q: str, seen: list[dict[str, Any]] = seen) -> float | None:
            found = [each[key][q] for each in seen if each[key] is not None]
            return float(np.median(found)) if found else None

        spans = []
        for q in ("p50", "p99"):
            each = [one["ratio"][q] for one in seen]
            spans.append(f"{np.median(each):.3f} ({min(each):.3f}-{max(each):.3f})")
        lines.append(
            [
                f"{way}, {guided} {form}".rstrip(),
                *(number(median("itl_ms", q), 2) for q in ("p50", "p99")),
                *spans,
                *(number(median("guided_itl_ms", q), 2) for q in ("p50", "p99")),
                *(number(median("mask_us", q), 0) for q in ("mean", "p99")),
            ]
        )
    head = ["way, guided rows", "p50, ms", "p99", "p50 / quiet", "p99 / quiet"]
    return table([*head, "guided p50, ms", "p99", "a mask, us", "p99"], lines)


def main() -> None:
    """Measure, print, save; see the module."""
    load = Load(_ROWS.value or 1, _PROMPT.value or 1, _STEPS.value or 1, _WARM.value or 1)
    counts = [(form, guided) for form in _FORMS.value or () for guided in _GUIDED.value or ()]
    if any(not 0 < guided < load.rows for _, guided in counts):
        raise ValueError(f"guided={_GUIDED.value}: must be between 1 and rows - 1")
    cases: list[Case] = [(way, *each) for way in WAYS for each in [("", 0), *counts]]
    page_size, colocated = _PAGE_SIZE.value or 1, bool(_COLOCATED.value)
    model = chosen_model(_MODEL.value, make_config("tiny", load, page_size, 1, colocated))
    make, turns = form_maker(MODELS[model].vocab_size), list[list[dict[str, Any]]]()
    whole = {"load": asdict(load), "colocated": colocated, "model": model, "turns": turns}
    whole |= origin("llguidance", "tokenizers")
    with ExitStack() as stack:
        llms = {}
        for way, lookahead in WAYS.items():
            config = make_config(model, load, page_size, lookahead, colocated)
            llms[way] = stack.enter_context(LLM(config))
            llms[way].coordinator.warm_up()
        short = replace(load, steps=1)  # the first phases find nothing warm
        turn({way: Rows(llm, short, make) for way, llm in llms.items()}, cases)
        rows = {way: Rows(llm, load, make) for way, llm in llms.items()}
        for i in range(_TURNS.value or 1):
            began = time.perf_counter()
            turns.append(turn(rows, cases[:: -1 if i % 2 else 1]))
            seconds = time.perf_counter() - began
            print(f"turn {i + 1} of {_TURNS.value}: {seconds:.0f} s", flush=True)
            save(whole, _OUT.value)
    print(show(turns, cases))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
