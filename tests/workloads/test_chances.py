"""Arrival processes and lengths against their moments."""

import math
import re

import numpy as np
import pytest

from pdjax.workloads.chances import (
    Arrivals,
    Gaps,
    Lengths,
    Lognormal,
    Mix,
    Uniform,
    fixed,
    generator,
    lengths_of,
)

MANY = 40_000


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_cv_of_the_burstiness(burstiness: float):
    moments = Arrivals(5.0, burstiness).moments(MANY, seed=1)
    gaps = np.diff(moments, prepend=0.0)
    cv = 1 / math.sqrt(burstiness)
    assert (gaps >= 0).all()
    # Five standard errors of a mean; a sample's cv is a little less certain.
    assert gaps.mean() == pytest.approx(0.2, abs=5 * 0.2 * cv / math.sqrt(MANY))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_counts_of_a_poisson_process_vary_as_their_mean():
    moments = Arrivals(10.0).moments(MANY, seed=3)
    counts = np.bincount(moments.astype(int))[:-1]
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.1)


def test_constant_arrivals_are_regular_and_an_infinite_rate_is_one_moment():
    assert Arrivals(4.0, math.inf).moments(3, seed=9).tolist() == [0.0, 0.25, 0.5]
    assert Arrivals(math.inf).moments(3, seed=9).tolist() == [0.0, 0.0, 0.0]
    assert Gaps(2.0).draw(generator(0, "x"), 2).tolist() == [2.0, 2.0]


def test_a_rate_scales_moments_and_a_seed_changes_them():
    slow, fast = Arrivals(1.0, 0.5).moments(50, 7), Arrivals(4.0, 0.5).moments(50, 7)
    assert slow == pytest.approx(fast * 4)
    assert (Arrivals(1.0, 0.5).moments(50, 7) == slow).all()
    assert (Arrivals(1.0, 0.5).moments(50, 8) != slow).all()


def drawn(lengths: Lengths, seed: int = 0) -> np.ndarray:
    return lengths.draw(generator(seed, "lengths"), MANY)


def test_lengths_have_their_moments():
    assert set(drawn(fixed(7)).tolist()) == {7}
    uniform = drawn(Uniform(10, 20))
    assert (uniform.min(), uniform.max()) == (10, 20)
    assert uniform.mean() == pytest.approx(15, abs=0.1)
    assert uniform.var() == pytest.approx(10, rel=0.05)
    lognormal = drawn(Lognormal(300, 0.8))
    assert lognormal.mean() == pytest.approx(300, rel=0.03)
    assert lognormal.std() / lognormal.mean() == pytest.approx(0.8, rel=0.05)
    assert np.median(lognormal) == pytest.approx(300 / math.sqrt(1 + 0.8**2), rel=0.03)
    cut = drawn(Lognormal(3, 2.0, most=10))
    assert cut.min() >= 1 and cut.max() == 10
    mix = drawn(Mix([fixed(1), fixed(100)], [3, 1]))
    assert (mix == 1).mean() == pytest.approx(0.75, abs=0.02) and set(mix.tolist()) == {1, 100}


def test_lengths_are_read_from_text():
    assert lengths_of("512") == fixed(512)
    assert lengths_of("100-2000") == Uniform(100, 2000)
    assert lengths_of("lognormal:300:0.5") == Lognormal(300, 0.5)
    assert lengths_of("lognormal:300:0.5:1000") == Lognormal(300, 0.5, 1000)
    assert lengths_of("0.8*10-20+0.2*4096") == Mix([Uniform(10, 20), fixed(4096)], [0.8, 0.2])


@pytest.mark.parametrize("text", ["", "x", "0", "20-10", "1-2-3", "lognormal:3", "2*", "1+2", "5*"])
def test_text_that_is_no_length_is_refused(text: str):
    with pytest.raises(ValueError, match=re.escape(f"lengths={text!r}: must be as 512")):
        lengths_of(text)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Arrivals(0.0), "rate=0.0: must be more than 0"),
        (lambda: Arrivals(math.nan), "rate=nan: must be more than 0"),
        (lambda: Arrivals(1.0, 0.0), "burstiness=0.0: must be more than 0"),
        (lambda: Gaps(-1.0), "mean=-1.0: must be 0 or more"),
        (lambda: Uniform(0, 3), "lengths=0-3: must be at least 1"),
        (lambda: Lognormal(0.5, 1.0), "mean=0.5: must be at least 1"),
        (lambda: Lognormal(5, 0.0), "cv=0.0: must be more than 0"),
        (lambda: Lognormal(5, 1.0, 0), "most=0: must be at least 1"),
        (lambda: Mix([fixed(1)], [1.0, 2.0]), "must be one above 0 for each kind"),
        (lambda: Mix([fixed(1)], [0.0]), "must be one above 0 for each kind"),
        (lambda: generator(-1, "x"), "seed=-1: must be 0 or more"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, match: str):
    with pytest.raises(ValueError, match=match):
        make()
