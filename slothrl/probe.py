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


@dataclass
class PolicyProbe:
    """Compares the engine's log-probs with the trained model's on a few fixed tokens.

    Attributes:
        engine: what samples.
        model: the PEFT model being trained.
        token_ids: the probe's rows, of at least two tokens each.
        bound: largest mean absolute difference allowed, in nats. bf16 noise of two implementations was measured at
            0.02 to 0.03; an adapter that did not arrive is off by 0.3 and more within a few steps.
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

    def perturbation_test(self, scale: float = 0.1) -> tuple[float, float]:
        """Change the adapter, require the engine to follow, and put it back.

        Args:
            scale: standard deviation of the change to B; 0.1 moved SmolLM2's log-probs by 0.7 to 1 nat.
        Returns:
            (how far the engine's log-probs moved, how far they then were from the model's), mean absolute nats.
        Raises:
            PolicyMismatchError: the engine ignored the adapter, or followed it to another place.
        """
        before = self.engine.logprobs(self.token_ids)
        with perturbed_lora(self.model, scale):
            self.engine.push_lora()
            after = self.engine.logprobs(self.token_ids)
            moved = mean_difference(after, before)
            apart = mean_difference(after, model_logprobs(self.model, self.token_ids))
        self.engine.push_lora()
        # Both conditions: an engine that ignores the adapter agrees with itself, one that misplaces it moves.
        if not (moved > 4 * apart and apart <= self.bound):
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
