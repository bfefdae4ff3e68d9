"""Says what is wrong with a training step as soon as it is over, counts it, and ends a run that only goes wrong."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from slothrl.config import DiagnosisConfig
from slothrl.errors import FaultError
from slothrl.step_findings import NAMES, step_findings
from slothrl.trainers.typed import TypedGRPOTrainer

RESAMPLED = "dynamic_sampling/share_without_signal"  # of the groups, after the last draw
READ = ("completions/clipped_ratio", "frac_reward_zero_std", "reward", "sampling/importance_sampling_ratio/mean")
READ += ("kl", "entropy", "diagnosis/unscored_share", RESAMPLED)


class StepFault(FaultError):  # noqa: N818 - the house word for what ends a run
    """So many steps in a row went wrong that going on is a waste."""


class Watched(TypedGRPOTrainer):
    """A mixin before TRL's trainer.

    Attributes:
        diagnosis: how often the same is said, and when to stop.
        watch_state: {"first_entropy", "bad_in_a_row", "said": {finding: step}, "latest": {metric: value}}; in the
            checkpoints.
    """

    diagnosis: DiagnosisConfig
    watch_state: dict[str, Any]
    _grad_norm: float | None = None

    def __init__(self, *positional, **named):
        self.watch_state = {"first_entropy": None, "bad_in_a_row": 0, "said": {}, "latest": {}}
        self._metrics_read: dict[str, int] = {}
        super().__init__(*positional, **named)
        self.add_callback(_StepEnd(self))

    def _calculate_rewards(self, *positional, **named):
        rewards = super()._calculate_rewards(*positional, **named)
        if self.model.training:
            self._metrics["train"]["diagnosis/unscored_share"].append(rewards.isnan().all(dim=1).float().mean().item())
        return rewards

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = None if norm is None else float(norm)
        return norm

    def _figures(self) -> dict[str, float]:
        """What the step that is over added to the metrics; values of a generation stand for all steps fed by it."""
        found = self.watch_state.setdefault("latest", {})
        for name in READ:
            values = self._metrics["train"].get(name, [])
            start = self._metrics_read.get(name, 0)
            fresh = values[start if start <= len(values) else 0 :]  # a log clears them
            self._metrics_read[name] = len(values)
            if fresh:
                found[name] = sum(fresh) / len(fresh)
        found = dict(found)
        found["unscored"] = found.pop("diagnosis/unscored_share", 0.0)
        if RESAMPLED in found:  # the logged share is that of the first draw
            found["frac_reward_zero_std"] = found.pop(RESAMPLED)
        if self._grad_norm is not None:
            found["grad_norm"] = self._grad_norm
        if "entropy" in found and self.watch_state["first_entropy"] is None:
            self.watch_state["first_entropy"] = found["entropy"]
        if self.watch_state["first_entropy"] is not None:
            found["first_entropy"] = self.watch_state["first_entropy"]
        return found

    def watch_step(self) -> None:
        """Look at the step that has just ended.

        Raises:
            StepFault: it is the `diagnosis.stop_after`-th in a row that something is wrong with.
        """
        findings, state, step = step_findings(self._figures()), self.watch_state, self.state.global_step
        for name in NAMES:
            self._metrics["train"][f"diagnosis/{name}"].append(float(any(f.name == name for f in findings)))
        for finding in findings:
            last = state["said"].get(finding.name)
            if last is None or step - last >= self.diagnosis.every:
                state["said"][finding.name] = step
                print(f"warning: step {step}: {finding.text}. Try {finding.knob}.", flush=True)
        state["bad_in_a_row"] = state["bad_in_a_row"] + 1 if findings else 0
        if findings and state["bad_in_a_row"] == self.diagnosis.stop_after:
            finding = findings[0]
            said = f"{state['bad_in_a_row']} steps in a row went wrong (diagnosis.stop_after); in step {step}"
            raise StepFault(f"{said} {finding.text}. Try {finding.knob}.")


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: Watched):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.watch_step()

    def on_log(self, args, state, control, **kwargs):
        self.trainer._metrics_read.clear()  # TRL empties its metrics with each log
