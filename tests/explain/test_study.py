"""Capacities, winners and verdicts, of modes whose outcomes are known."""

import pytest

from pdjax.explain.modes import Variant
from pdjax.explain.study import ATTAINMENT, Study
from pdjax.explain.text import cell_text
from pdjax.explain.trial import Scale, Trial
from pdjax.explain.verdict import around, verdict, warnings
from tests.explain.made import APART, BOUNDS, LOST, MIXED, outcome, trial

COUNT = 400


def study(
    apart: float,
    mixed: float,
    *,
    first: float = 0.1,
    count: int = COUNT,
    told: list[str] | None = None,
) -> Study:
    """Modes all of whose requests are good up to a rate, and then fewer: as many as that rate is of
    the one offered. First tokens of the disaggregated one come after `first` seconds."""

    def run(mode: Variant, rate: float) -> Trial:
        limit = apart if mode is APART else mixed
        good = count if rate <= limit else int(count * limit / rate)
        ttft = first if mode is APART else 0.1
        outcomes = [outcome(ttft)] * good + [LOST] * (count - good)
        return trial(mode, rate, outcomes, p90_ttft_ms=(50 if mode is APART else 20) + rate * 2)

    return Study([APART, MIXED], run, tell=(told if told is not None else []).append)


def test_capacities_are_found_and_each_trial_is_made_once():
    told = list[str]()
    found = study(12.0, 20.0, told=told)
    found.search(4.0, 0.02)
    first, second = found.standings()
    assert first.mode is MIXED and second.mode is APART
    assert 20.0 <= first.rate <= 20.0 / 0.9 and 12.0 <= second.rate <= 12.0 / 0.9
    assert len(told) == len(set(told)), "no trial was made twice"
    assert told[0] == "1P1D at 4 requests/s: 400 of 400 good"
    best = first.found.best
    assert (
        best is not None and (best.good, best.total) == (found.trial(MIXED, best.rate).point()[1:])
    )


def test_all_modes_are_measured_at_rates_around_the_best():
    found = study(12.0, 20.0)
    found.search(4.0, 0.1)
    found.sweep(found.grid)
    assert set(found.grid) <= set(found.rates)
    highest = found.standings()[0].rate
    assert found.rates[-1] > highest > found.rates[0]


def test_the_winner_changes_where_the_lines_cross():
    found = study(100.0, 10.0)
    found.sweep([5.0, 10.0, 20.0])
    reigns = found.reigns("p90_ttft_ms")
    assert [(r.winner, r.start, r.end) for r in reigns] == [("2 x mixed 512", 5.0, 20.0)]
    first, then = study(100.0, 10.0, first=0.2), found
    first.sweep([5.0, 10.0, 20.0])
    before, after = first.reigns(ATTAINMENT)
    assert (before.winner, after.winner) == ("2 x mixed 512", "1P1D")
    assert before.end == after.start and 10.0 <= before.end <= 20.0
    assert len(then.reigns(ATTAINMENT)) <= 2


def test_lines_that_cross_say_where():
    def run(mode: Variant, rate: float) -> Trial:
        ttft = 10 * rate if mode is APART else 60.0
        return trial(mode, rate, [outcome()], p90_ttft_ms=ttft)

    found = Study([APART, MIXED], run, tell=lambda line: None)
    found.sweep([2.0, 4.0, 8.0])
    before, after = found.reigns("p90_ttft_ms")
    assert (before.winner, after.winner) == ("1P1D", "2 x mixed 512")
    assert before.end == pytest.approx(6.0)


def test_other_slos_have_other_winners():
    found = study(30.0, 10.0, first=0.2)  # the disaggregated one meets 0.2 s, not half of 0.3
    found.sweep([5.0, 10.0, 20.0, 30.0])
    [[tight], [usual]] = [[row[1]] for row in found.cells([0.5, 1.0])]
    assert (tight.winners, tight.rate, tight.second) == ((MIXED,), 10.0, None)
    assert (usual.winners, usual.rate, usual.second) == ((APART,), 30.0, 10.0)
    assert usual.at_least and not tight.at_least
    assert cell_text(usual) == "1P1D (≥ 30/s)" and cell_text(tight) == "2 x mixed 512 (10/s)"
    nothing = found.cells([0.01])[0][0]
    assert (nothing.winners, nothing.rate) == ((), None) and cell_text(nothing) == "nothing"
    assert around(found.cells([0.01, 1.0])) == (
        "Of 4 SLOs around this one, disaggregated wins 1, nothing holds 3."
    )
    assert around(found.cells([1.0])) == "Of the one SLO of the grid, disaggregated wins 1."


def test_under_other_slos_modes_are_compared_where_all_were_measured():
    """One mode was tried at 128 requests a second, too, and held it."""
    found = study(200.0, 200.0)
    found.sweep([8.0, 100.0])
    found.trial(APART, 128.0)
    cell = found.cells([8.0])[0][0]
    assert (cell.winners, cell.rate, cell.at_least, cell.second) == (
        (APART, MIXED),
        100.0,
        True,
        None,
    )
    assert cell_text(cell) == "tie of 1P1D, 2 x mixed 512 (≥ 100/s)"
    assert around(found.cells([4.0, 8.0])) == "Of 4 SLOs around this one, kinds tie in 4."
    assert found.to_json([8.0], 2)["slo_grid"] == [
        {
            "ttft_scale": 8.0,
            "tpot_scale": 8.0,
            "winners": ["1P1D", "2 x mixed 512"],
            "rate": 100.0,
            "at_least": True,
            "best_of_another_kind": None,
        }
    ]
    more = cell._replace(winners=(APART, MIXED, MIXED))
    assert cell_text(more) == "tie of 1P1D, 2 x mixed 512, 1 more (≥ 100/s)"


def test_a_scale_multiplies_bounds():
    assert Scale(0.5, 2).of(BOUNDS).ttft == 0.15 and Scale(0.5, 2).of(BOUNDS).tpot == 0.02
    assert outcome(0.2).good() and not outcome(0.2).good(Scale(ttft=0.5))
    assert not LOST.good(Scale(100, 100)) and not LOST.late()


@pytest.mark.parametrize(
    ("apart", "mixed", "begins"),
    [
        (20.0, 12.0, "Yes: 1P1D holds"),
        (12.0, 20.0, "No: 2 x mixed 512 holds"),
        (20.0, 20.5, "It makes little difference: 1P1D holds"),
    ],
)
def test_the_verdict_follows_from_capacities(apart: float, mixed: float, begins: str):
    found = study(apart, mixed)
    found.search(4.0, 0.05)
    told = verdict(found, 0.05)
    assert told.startswith(begins)
    assert f"{found.standings()[0].rate:.3g} requests a second" in told


def test_an_slo_that_nothing_holds_is_said_to_be():
    found = study(0.0, 0.0)
    found.search(4.0, 0.1)
    assert verdict(found, 0.1).startswith("No mode holds this SLO at any rate, down to 0.00391")
    assert found.grid == [] and warnings(found) == []


def test_one_kind_alone_has_no_rival():
    def run(mode: Variant, rate: float) -> Trial:
        return trial(mode, rate, [outcome()])

    found = Study([APART], run, tell=lambda line: None)
    found.sweep([1.0])
    assert "no mode of the other way to serve" in verdict(found, 0.1)


@pytest.mark.parametrize("limits", [(20.0, 12.0), (20.0, 20.5), (20.0, 0.0)])
def test_a_workload_that_is_too_short_is_said_to_be(limits: tuple[float, float]):
    """A hundred requests, which come in 5 s and take 0.6 s each."""
    found = study(*limits, count=100)
    found.search(4.0, 0.1)
    short, few = warnings(found)
    assert short.startswith("Requests came for") and "--num_prompts" in short
    assert few.startswith("Of 100 requests, a share of 90% has a standard error of 3.0 points")
    told = verdict(found, 0.1)
    assert told.startswith(
        ("Too short to say: 1P1D holds", "Too short to say: 2 x mixed 512 holds")
    )
