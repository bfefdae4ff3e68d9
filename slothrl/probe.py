"""Is the policy that samples the policy that is trained? Checked on fixed tokens at the start and after each push."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from slothrl.engine import Engine, TokenIds, model_logprobs
from slothrl.errors import PolicyMismatchError
from slothrl.vllm_compat import lora_layers

# Standard deviations of a test change to B.
PERTURBATIONS = (0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass
class PolicyProbe:
    """Compares the engine's log-probs with the trained model's on a few fixed tokens.

    Attributes:
        engine: what samples.
        model: the PEFT model being trained.
        token_ids: the probe's rows, of at least two tokens each.
        bound: largest mean absolute difference allowed, in nats.
    """

    engine: Engine
    model: torch.nn.Module
    token_ids: Sequence[TokenIds]
    bound: float = 0.15
    last_difference: float = field(default=math.nan, init=False)

    def check(self) -> float:
        """The mean absolute difference (nats). Raises `PolicyMismatchError` above the bound."""
        difference = mean_difference(self.engine.logprobs(self.token_ids), model_logprobs(self.model, self.token_ids))
        self.last_difference = difference
        if not difference <= self.bound:  # NaN fails too
            raise PolicyMismatchError(
                f"the {self.engine.name} engine samples from another policy than the one being trained: log-probs of "
                f"fixed tokens differ by {difference:.3f} nat on average, bound {self.bound} (rollout.probe_bound); "
                "rollout=transformers avoids it"
            )
        return difference

    def allow_for(self, noise: float) -> None:
        """Raise the bound to 4 times the rounding noise of the two implementations, measured before training.

        The noise differs by model: 0.02 to 0.03 nat in bf16 on a large one, 0.09 on SmolLM2-135M, where it went up to
        0.18 in the course of a run. An adapter that did not arrive is off by 0.7 nat and more once the policy moved.
        """
        self.bound = max(self.bound, 4 * noise)

    def perturbation_test(self) -> tuple[float, float]:
        """Change the adapter until its effect stands clear of rounding, require the engine to follow, and put it back.

        Returns:
            (how far the engine's log-probs moved, how far they then were from the model's), mean absolute nats.
        Raises:
            PolicyMismatchError: the engine ignored the adapter, or followed it to another place.
        """
        before = self.engine.logprobs(self.token_ids)
        enough = max(0.1, 6 * mean_difference(before, model_logprobs(self.model, self.token_ids)))
        moved = apart = 0.0
        # From small to large: one size would not move a small model and throw a large one into noise.
        for scale in PERTURBATIONS:
            with perturbed_lora(self.model, scale):
                self.engine.push_lora()
                after = self.engine.logprobs(self.token_ids)
                moved = mean_difference(after, before)
                apart = mean_difference(after, model_logprobs(self.model, self.token_ids))
            if moved >= enough:
                break
        self.engine.push_lora()
        # Both conditions: an engine that ignores the adapter agrees with itself, one that misplaces it moves.
        if moved < enough or apart > moved / 3:
            raise PolicyMismatchError(
                f"the {self.engine.name} engine does not follow the LoRA: a test change moved its log-probs by "
                f"{moved:.3f} nat and left them {apart:.3f} nat from the trained model's"
            )
        return moved, apart


def mean_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Mean absolute difference (nats) over all tokens of two lists of log-prob rows."""
    return (torch.cat(list(left)) - torch.cat(list(right))).abs().mean().item()


@contextmanager
def perturbed_lora(model, scale: float):
    """Put a fixed random change into every B of the adapter, and take it out again exactly."""
    weights = [layer.lora_B["default"].weight for layer in lora_layers(model).values()]
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
