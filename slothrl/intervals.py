"""95% intervals of held-out scores: how far a number can be trusted that comes from a few dozen prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964  # the 97.5% point of the normal distribution
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A 95% interval around `value`, and the method behind it."""

    value: float
    low: float
    high: float
    method: str

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The mean of `values`: Wilson's interval where all are 0 or 1, the bootstrap's elsewhere; None of nothing."""
    if not values:
        return None
    return wilson(sum(values), len(values)) if binary(values) else bootstrap(values)


def binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def wilson(successes: float, count: int) -> Interval:
    """Wilson's score interval (1927) of a share; it stays inside [0, 1] and is no point at 0 or 1."""
    share, z2 = successes / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    # The ends are exactly 0 and 1 there; rounding must not put the share outside.
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return Interval(share, low, high, f"Wilson, {count} prompts")


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Percentile bootstrap (Efron, 1979) of a mean. Below about 20 values it is narrower than it should be."""
    draw, count = random.Random(seed), len(values)
    means = sorted(sum(draw.choices(values, k=count)) / count for _ in range(RESAMPLES))
    low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
    return Interval(sum(values) / count, low, high, f"bootstrap, {count} prompts")


def change_interval(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """The change of a mean score on the same prompts in the same order; None where there are none.

    Scores of 0 and 1: Newcombe's interval for paired shares (1998, method 10). Others: bootstrap over the prompts.
    """
    if not before or len(before) != len(after):
        return None
    if not binary([*before, *after]):
        return bootstrap([b - a for a, b in zip(before, after, strict=True)])
    count = len(before)
    first, last = wilson(sum(before), count), wilson(sum(after), count)
    correlation = _phi(before, after)
    down, up = (last.value - last.low, first.high - first.value), (last.high - last.value, first.value - first.low)
    change = last.value - first.value
    low, high = change - _joint(*down, correlation), change + _joint(*up, correlation)
    return Interval(change, low, high, f"Newcombe, {count} pairs")


def _joint(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))


def _phi(before: Sequence[float], after: Sequence[float]) -> float:
    """The correlation of two lists of 0 and 1; 0 where one of them is constant. Newcombe's correction when positive."""
    count, pairs = len(before), list(zip(before, after, strict=True))
    both, neither = pairs.count((1, 1)), pairs.count((0, 0))
    lost, won = pairs.count((1, 0)), pairs.count((0, 1))
    spread = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    if not spread:
        return 0.0
    product = both * neither - lost * won
    if product > 0:
        product = max(product - count / 2, 0)
    return product / math.sqrt(spread)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The unbiased estimate that one of `k` completions is right, from `samples` of which `correct` are
    (Chen et al., 2021)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
