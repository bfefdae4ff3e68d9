"""What a run came to on held-out prompts: scores before and after with intervals, and pass@k where it was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slothrl.intervals import Interval, binary, change_interval, mean_interval, pass_at_k
from slothrl.run_record import RunRecord, before_and_after


@dataclass(frozen=True)
class Measurement:
    """One held-out number before and after training.

    Attributes:
        name: as a reader knows it: "pass@1 (exact_match, greedy)".
        before, after: None where it was not measured; their intervals are points where no scores a prompt were kept.
        change: of the same prompts; None where either is missing or only the means are known.
    """

    name: str
    before: Interval | None
    after: Interval | None
    change: Interval | None
    lower_is_better: bool = False


def outcome(record: RunRecord) -> list[Measurement]:
    """Every held-out number of a run, the greedy score first."""
    return measurements(record.held_out)


def measurements(records: Sequence[dict[str, Any]]) -> list[Measurement]:
    """The same from the lines of held_out.jsonl; with one line a kind there is no `after`."""
    found = [_greedy(records), *_sampled(records), _loss(records)]
    return [measurement for measurement in found if measurement is not None]


def _greedy(records: Sequence[dict[str, Any]]) -> Measurement | None:
    before, after = before_and_after(records, "metric")
    if not before:
        return None
    scores = [_scores(before), _scores(after)]
    known = [score for listed in scores for score in listed]
    kind = "pass@1" if known and binary(known) else "mean score"
    return Measurement(
        f"{kind} ({before['metric']}, greedy)",
        mean_interval(scores[0]) or _point(before.get("score")),
        mean_interval(scores[1]) or _point(after.get("score")),
        change_interval(*_paired(before.get("scores"), after.get("scores"))),
    )


def _scores(record: dict[str, Any]) -> list[float]:
    return [score for score in record.get("scores") or [] if score is not None]


def _paired(before: list | None, after: list | None) -> tuple[list[float], list[float]]:
    """The scores of prompts that have one both times; nothing where the lists are of other prompts."""
    if not before or not after or len(before) != len(after):
        return [], []
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _point(value: Any) -> Interval | None:
    return None if value is None else Interval(value, value, value, "no interval: scores of single prompts not kept")


def _sampled(records: Sequence[dict[str, Any]]) -> list[Measurement]:
    """pass@k from the sampled completions, for k of 1, 2, 4 … and all of them; the mean where scores are not 0 or 1."""
    before, after = before_and_after(records, "sampled_scores")
    if not before:
        return []
    samples, how = before["samples"], f"sampled at temperature {before['temperature']:g}"
    rows = [before["sampled_scores"], after.get("sampled_scores") or []]
    if not binary([score for row in (*rows[0], *rows[1]) for score in row if score is not None]):
        return [
            _pair(f"mean score ({before['sampled_metric']}, {how})", *([_mean(row) for row in part] for part in rows))
        ]
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    return [
        _pair(f"pass@{k} ({before['sampled_metric']}, {samples} {how})", *([_pass(row, k) for row in p] for p in rows))
        for k in ks
    ]


def _pair(name: str, before: list[float | None], after: list[float | None]) -> Measurement:
    parts = [mean_interval([value for value in part if value is not None]) for part in (before, after)]
    return Measurement(name, parts[0], parts[1], change_interval(*_paired(before, after)))


def _mean(row: list[float | None]) -> float | None:
    known = [score for score in row if score is not None]
    return sum(known) / len(known) if known else None


def _pass(row: list[float | None], k: int) -> float | None:
    known = [score for score in row if score is not None]
    return pass_at_k(int(sum(known)), len(known), k) if len(known) >= k else None


def _loss(records: Sequence[dict[str, Any]]) -> Measurement | None:
    before, after = before_and_after(records, "eval_loss")
    if not before:
        return None
    points = [
        Interval(loss, loss, loss, "no interval: one number for all rows") if loss is not None else None
        for loss in (before["eval_loss"], after.get("eval_loss"))
    ]
    return Measurement("held-out loss, nats a token", points[0], points[1], None, lower_is_better=True)
