"""Is the policy that samples the policy that is trained? Checked on fixed tokens at the start and after each push."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from slothrl.engine import Engine, TokenIds, model_logprobs
from slothrl.errors import PolicyMismatchError
from slothrl.lora_slot import lora_layers, lora_shape

# Standard deviations of a test change to B.
PERTURBATIONS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SHARE = 0.01  # of the run's time that the checks after pushes may take
SHORT = 24  # tokens of the row for checks after pushes, and for each kind of projection alone


@dataclass
class PolicyProbe:
    """Compares the engine's log-probs with the trained model's on a few fixed tokens.

    Attributes:
        engine: what samples.
        model: the PEFT model being trained.
        token_ids: the probe's rows, of at least two tokens each.
        bound: largest mean absolute difference allowed, in nats.
        undecided: kinds of projection whose test change moved the model by less than 4 times the rounding noise, at
            any size: whether the engine follows them cannot be told. k_proj of some models of random weights.
    """

    engine: Engine
    model: torch.nn.Module
    token_ids: Sequence[TokenIds]
    bound: float = 0.15
    last_difference: float = field(default=math.nan, init=False)
    undecided: list[str] = field(default_factory=list, init=False)
    _next: float = field(default=-math.inf, init=False)  # when a push is checked again

    def check(self) -> float:
        """The mean absolute difference (nats) on all rows. Raises `PolicyMismatchError` above the bound."""
        return self._check(self.token_ids)

    def check_push(self) -> float | None:
        """`check` on one short row after a push; None where it is left out.

        The first push is always checked, a later one when that keeps the time spent here under `SHARE` of the run's.
        """
        start = time.monotonic()
        if start < self._next:
            return None
        difference = self._check([self._short_row()])
        end = time.monotonic()
        self._next = end + (end - start) / SHARE
        return difference

    def _short_row(self) -> TokenIds:
        return max(self.token_ids, key=len)[:SHORT]

    def _check(self, rows: Sequence[TokenIds]) -> float:
        difference = mean_difference(self.engine.logprobs(rows), model_logprobs(self.model, rows))
        self.last_difference = difference
        self.require(difference, "fixed tokens")
        return difference

    def require(self, difference: float, tokens: str) -> None:
        """Raise `PolicyMismatchError` if log-probs of `tokens` differ by more than the bound (nats, mean absolute)."""
        if not difference <= self.bound:  # NaN fails too
            raise PolicyMismatchError(
                f"the {self.engine.name} engine samples from another policy than the one being trained: log-probs of "
                f"{tokens} differ by {difference:.3f} nat on average, bound {self.bound:.3f} (rollout.probe_bound); "
                "rollout=transformers avoids it"
            )

    def allow_for(self, noise: float) -> None:
        """Raise the bound to 4 times the rounding noise of the two implementations, measured before training.

        The noise differs by model: 0.02 to 0.03 nat in bf16 on a large one, 0.09 on SmolLM2-135M, where it went up to
        0.18 in the course of a run. An adapter that did not arrive is off by 0.7 nat and more once the policy moved.
        """
        self.bound = max(self.bound, 4 * noise)

    def perturbation_test(self) -> tuple[float, float]:
        """Change the adapter until its effect stands clear of rounding, require the engine to follow, and put it back.

        First all projections together, then each kind of projection alone, so that one that never arrives is found
        among those that do.

        Returns:
            (how far the engine's log-probs moved with all, how far they then were from the model's), in mean nats.
        Raises:
            PolicyMismatchError: the engine ignored the adapter or a part of it, or followed it to another place.
        """
        change = self._perturb(self.token_ids, PERTURBATIONS)
        self._require_followed(change, "a test change", share=1 / 3)
        row, self.undecided = [self._short_row()], []
        # One kind alone moves less than all do together.
        larger = [size for size in PERTURBATIONS if size >= change.scale]
        for name in lora_shape(self.model).targets:
            alone = self._perturb(row, larger, name)
            if alone.wanted < 4 * alone.noise:
                self.undecided.append(name)
            else:
                self._require_followed(alone, f"a test change of {name} alone", share=1 / 2)
        self.engine.push_lora()
        return change.moved, change.apart

    def _perturb(self, rows: Sequence[TokenIds], scales: Sequence[float], only: str | None = None) -> Change:
        """What the first of `scales` does that moves the model clear of rounding, or the last."""
        before = model_logprobs(self.model, rows)
        engine_before = self.engine.logprobs(rows)
        # A short row may agree by luck.
        found = [mean_difference(before, engine_before), self.last_difference]
        noise = max(0.0, *(value for value in found if not math.isnan(value)))
        change = Change(0.0, 0.0, 0.0, 0.0, noise)
        # From small to large: one size would not move a small model and throw a large one into noise.
        for scale in scales:
            with perturbed_lora(self.model, scale, only):
                after = model_logprobs(self.model, rows)
                wanted = mean_difference(after, before)
                if wanted < max(0.1, 8 * noise) and scale != scales[-1]:
                    continue
                self.engine.push_lora()
                engine_after = self.engine.logprobs(rows)
            moved, apart = mean_difference(engine_after, engine_before), mean_difference(engine_after, after)
            change = Change(wanted, moved, apart, scale, noise)
            break
        self.engine.push_lora()
        return change

    def _require_followed(self, change: Change, what: str, share: float) -> None:
        # An engine that ignores the change is as far from the model as that moved; one that misplaces it, too.
        if not (change.moved >= change.wanted / 2 and change.apart <= share * change.wanted and change.moved > 0):
            raise PolicyMismatchError(
                f"the {self.engine.name} engine does not follow the LoRA: {what} moved its log-probs by "
                f"{change.moved:.3f} nat and left them {change.apart:.3f} nat from the trained model's, which moved by "
                f"{change.wanted:.3f}"
            )


class Change(NamedTuple):
    """What a test change did, in mean nats.

    wanted, moved: how far the model's log-probs went, and the engine's. apart: how far they are from each other then.
    scale: the change's standard deviation. noise: how far they were from each other before.
    """

    wanted: float
    moved: float
    apart: float
    scale: float
    noise: float


def mean_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Mean absolute difference (nats) over all tokens of two lists of log-prob rows."""
    return (torch.cat(list(left)) - torch.cat(list(right))).abs().mean().item()


@contextmanager
def perturbed_lora(model, scale: float, only: str | None = None):
    """Put a fixed random change into every B of the adapter, and take it out again exactly.

    Args:
        scale: its standard deviation.
        only: the projection to change ("k_proj"), in every layer; default all.
    """
    layers = lora_layers(model).items()
    weights = [x.lora_B["default"].weight for name, x in layers if only in (None, name.rsplit(".", 1)[-1])]
    kept = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * scale)
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, kept, strict=True):
                weight.copy_(original)
