"""What trial calls say about a reward function: its scores by kind of completion, its times, and what looks wrong."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from slothrl.reward_samples import EMPTY, GOLD, Sample

SLOW = 1.0  # seconds a call
LENGTH_BOUND = 0.8  # |correlation| of score and length that is worth a remark
FEWEST = 8  # completions from which on a correlation means something
_CLOSE = 1e-6
Scores = list[float | None]


@dataclass
class Measured:
    """One function's trial: every sample was scored twice.

    Attributes:
        name: the function's.
        range: lowest and highest score that it documents (its attribute `reward_range`), or None.
        first, second: scores of each sample, in the two passes; the second may stop early.
        seconds: of every call, in order.
        statuses: completions by what became of them; "ok", "none", and what workers report.
        metrics: the last value of each name that the function gave to `log_metric`.
        error: what ended the trial of this function, or None.
    """

    name: str
    range: tuple[float, float] | None = None
    first: list[Scores] = field(default_factory=list)
    second: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    def numbers(self) -> list[float]:
        return [score for scores in self.first for score in scores if score is not None]

    def by_kind(self, samples: list[Sample]) -> dict[str, Scores]:
        found: dict[str, Scores] = {}
        for sample, scores in zip(samples, self.first, strict=False):  # an error leaves some out
            found.setdefault(sample.kind, []).extend(scores)
        return found

    @property
    def full(self) -> float:
        """The best score there is, as far as it is known."""
        return self.range[1] if self.range else max(self.numbers(), default=0.0)


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile; NaN without values."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.nan


def remarks(measured: Measured, samples: list[Sample]) -> list[str]:
    """What looks wrong with a function, a line each; nothing for one whose trial ended in an error."""
    if measured.error is not None:
        return []
    numbers = measured.numbers()
    if not numbers:
        return ["scores nothing: None for every completion"]
    found = []
    total = sum(map(len, measured.first))
    if max(numbers) - min(numbers) < _CLOSE and total > 1:
        found.append(f"constant: every completion that it scores gets {numbers[0]:.4g}; there is nothing to learn from")
    elif measured.full > 0:  # a penalty's best score means that it has nothing to say
        found += _gold_remarks(measured, samples) + _empty_remarks(measured, samples)
    return found + _range_remarks(measured, numbers) + _call_remarks(measured) + _length_remarks(measured, samples)


def _gold_remarks(measured: Measured, samples: list[Sample]) -> list[str]:
    kinds = [scores for kind, scores in measured.by_kind(samples).items() if kind in GOLD]
    if not kinds:
        return []
    best = [max((score for score in scores if score is not None), default=None) for scores in zip(*kinds, strict=True)]
    scored = [score for score in best if score is not None]
    if not scored:
        return ["no gold answer is scored: None for each of them, in every form"]
    low = [row for row, score in enumerate(best) if score is not None and score < measured.full - _CLOSE]
    if not low:
        return []
    gold = next(sample for sample in samples if sample.kind == GOLD[0])
    example = " ".join(gold.completions[low[0]].split())[:60]
    many = f"{len(low)} of {len(best)} gold answers get less than the full score of {measured.full:.4g} in every form"
    return [f"{many}; the first, {example!r}, gets {best[low[0]]:.4g}"]


def _empty_remarks(measured: Measured, samples: list[Sample]) -> list[str]:
    scores = measured.by_kind(samples).get(EMPTY, [])
    full = [score for score in scores if score is not None and score >= measured.full - _CLOSE]
    if not full:
        return []
    return [f"the empty completion gets the full score of {measured.full:.4g} ({len(full)} of {len(scores)} rows)"]


def _range_remarks(measured: Measured, numbers: list[float]) -> list[str]:
    if measured.range is None:
        return []
    low, high = measured.range
    outside = [score for score in numbers if not low - _CLOSE <= score <= high + _CLOSE]
    if not outside:
        return []
    return [f"{len(outside)} scores outside its range of {low:g} to {high:g}, such as {outside[0]:.4g}"]


def _call_remarks(measured: Measured) -> list[str]:
    found = []
    slowest = max(measured.seconds[1:], default=0.0)  # the first call may load something
    if slowest > SLOW:
        found.append(f"slow: a call took {slowest:.1f} s")
    pairs = [pair for both in zip(measured.first, measured.second, strict=False) for pair in zip(*both, strict=True)]
    changed = [(a, b) for a, b in pairs if (a is None) != (b is None) or abs((a or 0.0) - (b or 0.0)) > _CLOSE]
    if changed:
        shown = " and then ".join("None" if score is None else f"{score:.4g}" for score in changed[0])
        found.append(
            f"unstable: {len(changed)} of {len(pairs)} completions got another score the second time ({shown})"
        )
    return found


def _length_remarks(measured: Measured, samples: list[Sample]) -> list[str]:
    points = [
        (float(len(text)), score)
        for sample, scores in zip(samples, measured.first, strict=True)
        for text, score in zip(sample.completions, scores, strict=True)
        if sample.kind == "given" and score is not None
    ]
    r = correlation(points) if len(points) >= FEWEST else None
    if r is None or abs(r) <= LENGTH_BOUND:
        return []
    return [f"follows length: the correlation of score and characters is {r:+.2f} over {len(points)} completions"]


def correlation(points: list[tuple[float, float]]) -> float | None:
    """Pearson's r; None where one side does not vary."""
    count = len(points)
    mean_x, mean_y = (sum(point[side] for point in points) / count for side in (0, 1))
    xx = sum((x - mean_x) ** 2 for x, _ in points)
    yy = sum((y - mean_y) ** 2 for _, y in points)
    if xx <= 0 or yy <= 0:
        return None
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / math.sqrt(xx * yy)
