"""Which curves a report has: the metrics of a panel, what they are called, and why a panel is missing."""

from __future__ import annotations

from dataclasses import dataclass

from slothrl.diagnosis import statuses
from slothrl.run_record import RunRecord, Series


@dataclass(frozen=True)
class Line:
    """One curve: (step, value) under a name."""

    name: str
    points: Series


@dataclass(frozen=True)
class Panel:
    """Curves that share a y axis.

    Attributes:
        key: the same in every run, so that panels of two runs can be laid over each other.
        unit: of the y axis.
        smooth: one noisy curve, to be drawn with its running mean.
    """

    key: str
    title: str
    unit: str
    lines: list[Line]
    smooth: bool = False


# title, unit, {metric: name}; the metrics are TRL's and slothrl's names in metrics.jsonl
FIXED: list[tuple[str, str, dict[str, str]]] = [
    ("Reward", "reward", {"reward": "reward"}),
    ("Loss", "loss", {"loss": "loss"}),
    ("KL to the reference", "nat a token", {"kl": "KL"}),
    ("Entropy", "nat a token", {"entropy": "entropy"}),
    (
        "Completion length",
        "tokens",
        {
            "completions/mean_length": "mean",
            "completions/min_length": "shortest",
            "completions/max_length": "longest",
        },
    ),
    ("Truncated completions", "share", {"completions/clipped_ratio": "truncated"}),
    (
        "Zero-signal groups",
        "share",
        {
            "frac_reward_zero_std": "groups with equal rewards",
            "dynamic_sampling/share_without_signal": "after drawing again",
        },
    ),
    (
        "Importance ratio, trainer to sampler",
        "ratio",
        {
            "sampling/importance_sampling_ratio/mean": "mean",
            "sampling/importance_sampling_ratio/min": "smallest",
            "sampling/importance_sampling_ratio/max": "largest",
        },
    ),
    (
        "Log-prob gap, trainer to sampler",
        "nat",
        {"sampling/sampling_logp_difference/mean": "mean", "sampling/probe_difference": "probe"},
    ),
    ("Clipped tokens", "share", {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"}),
    ("Gradient norm", "norm", {"grad_norm": "gradient norm"}),
    ("Learning rate", "rate", {"learning_rate": "learning rate"}),
    ("Token accuracy", "share", {"mean_token_accuracy": "accuracy"}),
]
GB = 1e9
MISSING = {
    "kl": "KL, which is not computed with trainer.beta=0",
    "sampling/importance_sampling_ratio/mean": "importance ratio and log-prob gap: the trainer's own model samples",
}


def panels(record: RunRecord) -> list[Panel]:
    """The panels that have something to show, in reading order."""
    found = [
        Panel(title, title, unit, _lines(record, names), smooth=len(names) == 1 and title != "Learning rate")
        for title, unit, names in FIXED
    ]
    found[1:1] = [_reward_parts(record)]
    found += [_failures(record), _times(record), _memory(record)]
    return [panel for panel in found if panel.lines]


def missing(record: RunRecord) -> list[str]:
    """What is not drawn and why, of what a GRPO run can have."""
    return [reason for key, reason in MISSING.items() if record.series("reward") and not record.series(key)]


def _lines(record: RunRecord, names: dict[str, str]) -> list[Line]:
    lines = [Line(name, record.series(key)) for key, name in names.items()]
    return [line for line in lines if line.points]


def _reward_parts(record: RunRecord) -> Panel:
    keys = [key for key in record.keys("rewards/", "/mean") if "/status/" not in key]
    names = {key: key.removeprefix("rewards/").removesuffix("/mean") for key in keys}
    lines = _lines(record, names) if len(names) > 1 else []  # one part is the reward itself
    return Panel("Reward by function", "Reward by function", "reward before weights", lines)


def _failures(record: RunRecord) -> Panel:
    found = [(name, status) for name, counts in statuses(record).items() for status in counts if status != "ok"]
    names = {f"rewards/{name}/status/{status}": f"{name}: {status}" for name, status in found}
    return Panel("Reward failures", "Reward failures", "completions", _lines(record, names))


def _times(record: RunRecord) -> Panel:
    """Seconds a step by phase, those that never take a hundredth of the time left out."""
    keys = record.keys("time/")
    totals = {key: sum(value for _, value in record.series(key)) for key in keys}
    worth = [key for key in keys if totals[key] > 0.01 * sum(totals.values())]
    names = {key: key.removeprefix("time/") for key in worth} or {"step_time": "step"}
    return Panel("Time by phase", "Time by phase", "seconds a step", _lines(record, names))


def _memory(record: RunRecord) -> Panel:
    known = {
        "memory/device": "device in use",
        "memory/torch_reserved": "reserved by torch",
        "memory/resident": "process",
    }
    lines = [Line(line.name, [(s, v / GB) for s, v in line.points]) for line in _lines(record, known)]
    return Panel("Memory over time", "Memory over time", "GB", lines)
