"""What a run's metrics say, in words, each with the knob that helps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slothrl.outcome import outcome
from slothrl.run_record import RunRecord, Series

GOOD, NOTE, WARNING = "good", "note", "warning"
ENOUGH = 8  # steps from which on a trend is read
TRUNCATED, MANY_TRUNCATED = 0.95, 0.5  # shares of completions
ZERO_SIGNAL = 0.5  # share of groups
RATIO_OFF, GAP_OFF = 0.1, 0.1  # of the mean importance ratio from 1; nats between engine and trainer
KL_HIGH, KL_GROWTH = 1.0, 10.0  # nats a token; times the first half's median
ENTROPY_LEFT, ENTROPY_LOW = 0.2, 0.1  # share of the beginning's; nats


@dataclass(frozen=True)
class Finding:
    """One sentence about a run.

    Attributes:
        level: "good", "note" or "warning".
        knob: the setting that helps; empty where there is nothing to turn.
    """

    level: str
    text: str
    knob: str = ""


def diagnose(record: RunRecord) -> list[Finding]:
    """Every rule that has something to say about the run, warnings first."""
    found = [finding for rule in RULES for finding in rule(record)]
    if record.steps and len(record.steps) < ENOUGH:
        found.append(Finding(NOTE, f"Only {len(record.steps)} steps: no trend is read.", "trainer.max_steps higher"))
    if not any(finding.level == WARNING for finding in found) and len(record.steps) >= ENOUGH:
        found.append(Finding(GOOD, "No known failure pattern in the metrics."))
    return sorted(found, key=lambda finding: (WARNING, GOOD, NOTE).index(finding.level))


# --- how the run ended ------------------------------------------------------------------------------------------------


def ending(record: RunRecord) -> list[Finding]:
    if record.state == "failed":
        message = str(record.fault.get("message") or "").strip() or "no message"
        return [Finding(WARNING, f"The run ended with {record.fault.get('type')}: {message}")]
    if record.state == "unfinished":
        return [Finding(NOTE, "Nothing says that the run ended: it goes on, or was killed.", f"resume={record.folder}")]
    if record.state == "interrupted":
        return [Finding(NOTE, "The run was interrupted.", str(record.summary.get("resume") or ""))]
    return []


def nonfinite(record: RunRecord) -> list[Finding]:
    if not record.skipped_steps:
        return []
    text = f"{record.skipped_steps} steps were skipped: loss or gradient not finite (see nonfinite/)."
    return [Finding(WARNING, text, "trainer.learning_rate lower, trainer.max_grad_norm lower, model.dtype=bfloat16")]


# --- held out ---------------------------------------------------------------------------------------------------------


def held_out_change(record: RunRecord) -> list[Finding]:
    """Whether the first held-out score moved by more than chance explains."""
    first = next(iter(outcome(record)), None)
    if first is None or first.before is None or first.after is None:
        return []
    title = f"Held-out {first.name}: {first.before.value:.3f} → {first.after.value:.3f}"
    if first.change is None:
        return [Finding(NOTE, f"{title}; without scores of single prompts there is no interval.")]
    change = first.change
    title += f", a change of {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
    if change.low > 0:
        return [Finding(GOOD, f"{title}: improved.")]
    if change.high < 0:
        return [Finding(WARNING, f"{title}: it got worse.", "trainer.learning_rate lower, trainer.beta higher")]
    return [
        Finding(
            WARNING,
            f"{title}: within its interval, not shown to be an improvement.",
            "data.eval_size higher (a narrower interval), trainer.max_steps higher",
        )
    ]


# --- the reward and its signal ----------------------------------------------------------------------------------------


def reward_flat(record: RunRecord) -> list[Finding]:
    rewards = values(record.series("reward"))
    if len(rewards) < ENOUGH:
        return []
    first, last = quarters(rewards)
    noise = 2 * (_error(first) ** 2 + _error(last) ** 2) ** 0.5
    start, end = statistics.fmean(first), statistics.fmean(last)
    if end - start > noise:
        return []
    text = f"{start:.3f} in the first quarter, {end:.3f} in the last (noise ±{noise:.3f})"
    if start - end > noise:
        return [Finding(WARNING, f"The reward fell: {text}.", "trainer.learning_rate lower, trainer.beta higher")]
    knob = "trainer.learning_rate, easier prompts, a reward with partial credit, trainer.num_generations higher"
    return [Finding(WARNING, f"The reward is flat: {text}.", knob)]


def zero_signal(record: RunRecord) -> list[Finding]:
    drawn_again = record.series("dynamic_sampling/share_without_signal")  # after the last draw; the other: the first
    shares = values(drawn_again or record.series("frac_reward_zero_std"))
    if not shares or (share := statistics.fmean(shares)) <= ZERO_SIGNAL:
        return []
    last = quarters(values(record.series("reward")))[1]
    best = max(values(record.series("reward")), default=0.0)
    text = f"In {share:.0%} of the groups all completions got the same reward: they teach nothing."
    if last and statistics.fmean(last) > 0.95 * best > 0:
        return [
            Finding(NOTE, f"{text} The reward is at its highest: the prompts are solved.", "harder prompts (data.*)")
        ]
    knob = "easier or more varied prompts, trainer.num_generations higher, trainer.temperature higher, partial credit"
    return [Finding(WARNING, text, knob)]


def no_gradient(record: RunRecord) -> list[Finding]:
    norms = values(record.series("grad_norm"))
    zeros = sum(norm == 0 for norm in norms)
    if len(norms) < 2 or zeros <= len(norms) / 2:
        return []
    text = f"No gradient in {zeros} of {len(norms)} steps: the policy stood still in them."
    return [
        Finding(WARNING, text, "a reward that tells completions of one prompt apart; trainer.num_generations higher")
    ]


def reward_failures(record: RunRecord) -> list[Finding]:
    """Completions that could not be scored, by function and status."""
    found = []
    for name, counts in statuses(record).items():
        total = sum(counts.values())
        failed = {status: count for status, count in counts.items() if status not in ("ok", "nan") and count}
        if failed:
            listed = ", ".join(f"{status} {count:g}" for status, count in failed.items())
            share = sum(failed.values()) / total
            text = f"Reward {name} could not score {share:.1%} of the completions ({listed} of {total:g})."
            knob = "reward_failure.json repeats one; reward.timeout, reward.memory_gb, or mend the function"
            found.append(Finding(WARNING, text, knob))
    return found


def statuses(record: RunRecord) -> dict[str, dict[str, float]]:
    """{reward function: {status: completions}}, summed over the logged steps."""
    found: dict[str, dict[str, float]] = {}
    for key in record.keys("rewards/"):
        name, marker, status = key.removeprefix("rewards/").rpartition("/status/")
        if marker:
            found.setdefault(name, {})[status] = sum(values(record.series(key)))
    return found


# --- completions and policy -------------------------------------------------------------------------------------------


def truncation(record: RunRecord) -> list[Finding]:
    shares = quarters(values(record.series("completions/clipped_ratio")))[1]
    if not shares or (share := statistics.fmean(shares)) < MANY_TRUNCATED:
        return []
    who = "All completions are" if share >= TRUNCATED else f"{share:.0%} of the completions are"
    text = f"{who} truncated in the last quarter: they never reach their end token."
    return [Finding(WARNING, text, "trainer.max_completion_length higher, or a length_penalty reward")]


def ratio_off(record: RunRecord) -> list[Finding]:
    ratios = values(record.series("sampling/importance_sampling_ratio/mean"))
    gaps = values(record.series("sampling/sampling_logp_difference/mean"))
    off = statistics.fmean(ratios) - 1 if ratios else 0.0
    gap = statistics.fmean(gaps) if gaps else 0.0
    if abs(off) <= RATIO_OFF and gap <= GAP_OFF:
        return []
    text = (
        f"The policy that samples is not the one that is trained: ratio {1 + off:.3f}, log-probs {gap:.3f} nat apart."
    )
    knob = "rollout.dtype=float32, trainer.num_iterations and trainer.steps_per_generation lower, rollout.probe=true"
    return [Finding(WARNING, text, knob)]


def kl_exploding(record: RunRecord) -> list[Finding]:
    kl = values(record.series("kl"))
    if len(kl) < 2:
        return []
    early, top = statistics.median(kl[: (len(kl) + 1) // 2]), max(kl)
    if top < KL_HIGH or top < KL_GROWTH * early:
        return []
    text = f"KL to the reference explodes: up to {top:.2f} nat a token, {early:.3g} in the first half."
    return [Finding(WARNING, text, "trainer.learning_rate lower, trainer.beta higher, trainer.max_grad_norm lower")]


def entropy_collapsing(record: RunRecord) -> list[Finding]:
    entropies = values(record.series("entropy"))
    if len(entropies) < ENOUGH:
        return []
    first, last = (statistics.fmean(part) for part in quarters(entropies))
    if last > ENTROPY_LEFT * first or last > ENTROPY_LOW:
        return []
    text = f"Entropy collapsed from {first:.3f} to {last:.3f} nat: completions of one prompt are nearly the same."
    rewards = values(record.series("reward"))
    if rewards and statistics.fmean(quarters(rewards)[1]) > 0.95 * max(rewards) > 0:
        return [Finding(NOTE, f"{text} With the reward at its highest that is how a solved task looks.")]
    knob = "trainer.temperature higher, trainer.epsilon_high higher (algo=dapo), trainer.learning_rate lower"
    return [Finding(WARNING, text, knob)]


RULES: list[Callable[[RunRecord], list[Finding]]] = [
    ending,
    nonfinite,
    held_out_change,
    reward_flat,
    zero_signal,
    no_gradient,
    reward_failures,
    truncation,
    ratio_off,
    kl_exploding,
    entropy_collapsing,
]


def values(series: Series) -> list[float]:
    return [value for _, value in series]


def quarters(numbers: list[Any]) -> tuple[list[Any], list[Any]]:
    """The first and the last quarter, at least one element each where there are any."""
    size = max(1, len(numbers) // 4)
    return numbers[:size], numbers[-size:]


def _error(numbers: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
