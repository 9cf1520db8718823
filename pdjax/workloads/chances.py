"""What is drawn by chance: gaps between arrivals, and lengths. Each draw is from a generator that
is seeded for its purpose alone, so that another rate has the same lengths, and other lengths have
the same moments."""

import math
import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np


def generator(seed: int, purpose: str) -> np.random.Generator:
    """The chance of one purpose in a workload of a seed.

    Raises:
      ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: must be 0 or more")
    return np.random.default_rng((seed, zlib.crc32(purpose.encode())))


# Gaps, in seconds.


@dataclass(frozen=True)
class Gaps:
    """Independent gaps of a gamma distribution.

    Attributes:
      mean: seconds; 0 has no gaps.
      burstiness: shape of the distribution, as vLLM has it: the coefficient of variation is
        1 / sqrt(burstiness). 1 is exponential, and math.inf makes all gaps the mean.

    Raises:
      ValueError: a mean below 0, or a burstiness that is not more than 0.
    """

    mean: float
    burstiness: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.mean < math.inf:
            raise ValueError(f"mean={self.mean}: must be 0 or more seconds")
        if not self.burstiness > 0:
            raise ValueError(f"burstiness={self.burstiness}: must be more than 0")

    def draw(self, chance: np.random.Generator, count: int) -> np.ndarray:
        """Gaps f64[count]."""
        if self.burstiness == math.inf or self.mean == 0:
            return np.full(count, float(self.mean))
        return chance.gamma(self.burstiness, self.mean / self.burstiness, count)


@dataclass(frozen=True)
class Arrivals:
    """An arrival process: `rate` requests a second with gaps of a gamma distribution.

    Attributes:
      rate: math.inf lets all arrive at once.
      burstiness: as in `Gaps`: 1 is a Poisson process, less comes in bursts, math.inf is constant.

    vLLM's benchmark stretches its moments so that the last is exactly count / rate, whatever the
    seed; these are as they were drawn.

    Raises:
      ValueError: a rate or burstiness that is not more than 0.
    """

    rate: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}: must be more than 0 requests a second")
        Gaps(0.0, self.burstiness)

    def moments(self, count: int, seed: int) -> np.ndarray:
        """When they arrive, seconds f64[count], in order; of a constant process from 0 on."""
        gaps = Gaps(1 / self.rate, self.burstiness).draw(generator(seed, "arrivals"), count)
        moments = np.cumsum(gaps)
        return moments - gaps[:1] if self.burstiness == math.inf else moments


# Lengths, in tokens.


class Lengths(Protocol):
    """Whole numbers, each at least 1."""

    def draw(self, chance: np.random.Generator, count: int) -> np.ndarray:
        """Lengths i64[count]."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Each length between two bounds, both included, as likely as any other.

    Raises:
      ValueError: bounds in the wrong order, or below 1.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(
                f"lengths={self.least}-{self.most}: must be at least 1, and in this order"
            )

    def draw(self, chance: np.random.Generator, count: int) -> np.ndarray:
        return chance.integers(self.least, self.most, count, np.int64, endpoint=True)


def fixed(length: int) -> Uniform:
    """One length only."""
    return Uniform(length, length)


@dataclass(frozen=True)
class Lognormal:
    """Lengths of a log-normal distribution, rounded; less than 1 is 1.

    Attributes:
      mean: tokens, before rounding and bounds.
      cv: standard deviation / mean.
      most: longer ones are cut to this; None has no bound.

    Raises:
      ValueError: a mean or bound below 1, or a cv that is not more than 0.
    """

    mean: float
    cv: float
    most: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.mean < math.inf:
            raise ValueError(f"mean={self.mean}: must be at least 1 token")
        if not 0 < self.cv < math.inf:
            raise ValueError(f"cv={self.cv}: must be more than 0")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most={self.most}: must be at least 1 token")

    def draw(self, chance: np.random.Generator, count: int) -> np.ndarray:
        sigma = math.sqrt(math.log1p(self.cv**2))
        drawn = chance.lognormal(math.log(self.mean) - sigma**2 / 2, sigma, count)
        return np.clip(np.rint(drawn), 1, self.most).astype(np.int64)


@dataclass(frozen=True)
class Mix:
    """Each length is of one of several kinds.

    Attributes:
      kinds: of lengths.
      weights: how likely each kind is, in any unit.

    Raises:
      ValueError: not one positive weight for each kind.
    """

    kinds: Seq[Lengths]
    weights: Seq[float]

    def __post_init__(self) -> None:
        if not self.kinds or len(self.kinds) != len(self.weights) or not min(self.weights) > 0:
            raise ValueError(f"weights={list(self.weights)}: must be one above 0 for each kind")

    def chosen(self, chance: np.random.Generator, count: int) -> np.ndarray:
        """Numbers of kinds i64[count]."""
        likely = np.asarray(self.weights, np.float64)
        return chance.choice(len(likely), count, p=likely / likely.sum())

    def draw(self, chance: np.random.Generator, count: int) -> np.ndarray:
        chosen = self.chosen(chance, count)
        return np.stack([kind.draw(chance, count) for kind in self.kinds])[chosen, range(count)]


def lengths_of(text: str) -> Lengths:
    """Read lengths from a command line.

    Args:
      text: "512"; "100-2000", uniform; "lognormal:MEAN:CV" or "lognormal:MEAN:CV:MOST"; or several
        of these with their weights, "0.8*100-300+0.2*4096".

    Raises:
      ValueError: not of this form, or out of range.
    """
    try:
        parts = text.split("+")
        if "*" in text:
            weights, kinds = zip(*(part.split("*") for part in parts), strict=True)
            return Mix([lengths_of(kind) for kind in kinds], [float(w) for w in weights])
        [plain] = parts
        if plain.startswith("lognormal:"):
            mean, cv, *most = plain.split(":")[1:]
            bounds = [int(each) for each in most]
            return Lognormal(float(mean), float(cv), *bounds)
        least, _, last = plain.partition("-")
        return Uniform(int(least), int(last or least))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lengths={text!r}: must be as 512, 100-2000, lognormal:MEAN:CV, or with weights "
            f"0.8*100-300+0.2*4096 ({error})"
        ) from error
