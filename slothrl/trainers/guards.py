"""What both trainers watch while they train: the phase, numbers that are not finite, and rollouts that never end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from slothrl import phases
from slothrl.errors import FaultError
from slothrl.tensor_tree import save_tree
from slothrl.watchdog import deadline

MAX_DUMPS = 10  # a run that skips for ever must not fill the disk


class NonFiniteFault(FaultError):  # noqa: N818 - the house word for what ends a run
    """Loss or gradients were NaN or infinite in too many steps in a row."""


class Guards(Trainer):
    """A mixin before `ExactCheckpoints`.

    A step whose loss or gradient is NaN or infinite changes nothing: its gradients are dropped, its micro-batches are
    written to `nonfinite/step-N/`, and the schedule goes on. (With fp16 a gradient that overflows is the scaler's
    business; only the loss is watched.)

    Attributes:
        max_nonfinite_steps: so many skipped steps in a row end the training with `NonFiniteFault`.
        rollout_timeout: seconds that one generation may take before the process is ended; None: no limit.
        advice: how to go on after that, for the message.
    """

    phases: phases.Phases

    def __init__(self, *positional, **named):
        self.max_nonfinite_steps = 3
        self.nonfinite_in_a_row = 0
        self.rollout_timeout: float | None = None
        self.advice = "resume from the last checkpoint"
        self._dumps = 0
        self._micro_batches: list[Any] = []
        self._losses: list[torch.Tensor] = []
        super().__init__(*positional, **named)
        self.add_callback(_StepEnd(self))

    # --- phases -------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        with self.phases.during(phases.LOGPROBS):  # of the old policy and the reference; the others are named inside
            return super()._generate_and_score_completions(inputs)  # pyright: ignore - TRL's

    def _generate(self, *positional, **named):
        folder = Path(self.args.output_dir or ".")
        with self.phases.during(phases.ROLLOUT), deadline(self.rollout_timeout, "a rollout", folder, self.advice):
            return super()._generate(*positional, **named)  # pyright: ignore - TRL's

    def _calculate_rewards(self, *positional, **named):
        with self.phases.during(phases.REWARDS):
            return super()._calculate_rewards(*positional, **named)  # pyright: ignore - TRL's

    def compute_loss(self, *positional, **named):
        with self.phases.during(phases.FORWARD):
            result = super().compute_loss(*positional, **named)
        if self.model.training:  # pyright: ignore
            self.phases.current = phases.BACKWARD  # what transformers does next
        return result

    # --- numbers ------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        if self.model.training:  # pyright: ignore
            self._micro_batches.append(prepared)
        return prepared

    def training_step(self, *positional, **named):
        loss = super().training_step(*positional, **named)
        self._losses.append(loss)
        self.phases.current = phases.OPTIMIZER
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses = torch.stack([loss.float() for loss in self._losses]).tolist() if self._losses else []
        scaled = getattr(self.accelerator, "scaler", None) is not None
        finite = all(map(math.isfinite, losses)) and (scaled or norm is None or math.isfinite(float(norm)))
        if finite:
            self.nonfinite_in_a_row = 0
        else:
            self._skip(model, losses, norm)
        return norm

    def _skip(self, model, losses: list[float], norm: Any) -> None:
        step = self.state.global_step + 1
        # Optimizers pass over parameters without gradients: no moments, no weight decay.
        model.zero_grad(set_to_none=True)
        self.nonfinite_in_a_row += 1
        place = self._dump(step, losses, norm)
        what = "loss" if not all(map(math.isfinite, losses)) else "gradient"
        said = f"step {step} skipped: its {what} is not finite{place}"
        if self.nonfinite_in_a_row >= self.max_nonfinite_steps:
            raise NonFiniteFault(f"{said}; that was {self.nonfinite_in_a_row} in a row (max_nonfinite_steps)")
        print(f"warning: {said}", flush=True)

    def _dump(self, step: int, losses: list[float], norm: Any) -> str:
        """Write the step's micro-batches to its folder; where they are, for the message."""
        self._dumps += 1
        if self._dumps > MAX_DUMPS:
            return ""
        folder = Path(self.args.output_dir or ".") / "nonfinite" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        batches = [dict(batch) for batch in self._micro_batches]
        about = {"step": step, "losses": losses, "grad_norm": None if norm is None else float(norm)}
        try:
            save_tree(folder, "batch", {**about, "micro_batches": batches})
        except (TypeError, OSError) as error:
            return f" (its batch could not be written: {error})"
        return f"; its batch is in {folder}"


class _StepEnd(TrainerCallback):
    def __init__(self, trainer: Guards):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._micro_batches.clear()
        self.trainer._losses.clear()
        self.trainer.phases.current = phases.START
