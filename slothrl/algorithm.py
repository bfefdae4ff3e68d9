"""What the policy update computes beyond TRL's arguments: which loss and advantage, a user's own among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slothrl.advantages import ADVANTAGES
from slothrl.config import AlgoConfig
from slothrl.errors import UserError
from slothrl.losses import CustomLoss, LossConfig, LossInputs
from slothrl.plugins import plugin_spec
from slothrl.reward_sources import described, place, resolve, told

AdvantageFunction = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Algorithm:
    """Chosen functions; the defaults are TRL's own choices.

    Attributes:
        loss_type: a key of `slothrl.losses.VARIANTS` in place of `trainer.loss_type`.
        custom_loss: a policy term in place of the variant's, as in `LossConfig`.
        advantage: (rewards per function (B, K) with NaN where not applicable, weights (K,), num_generations) -> (B,),
            groups contiguous; None: TRL's.
        kl: the estimator, as in `LossConfig`.
    """

    loss_type: str | None = None
    custom_loss: CustomLoss | None = None
    advantage: AdvantageFunction | None = None
    kl: str = "k3"

    @property
    def zero_without_advantage(self) -> bool:
        """Whether loss and gradient are 0 where the advantage is; a custom loss says so of itself, by an attribute."""
        return self.custom_loss is None or bool(getattr(self.custom_loss, "zero_without_advantage", False))


def open_algorithm(config: AlgoConfig) -> Algorithm:
    """Load what the config names and try a user's functions out on a few numbers.

    Raises:
        UserError: a function cannot be found or loaded, or does not do what it should.
    """
    loss, advantage = config.loss, config.advantage
    custom = _load("loss", loss, _try_loss) if loss else None
    chosen = _load("advantage", advantage, _try_advantage) if advantage else None
    return Algorithm(
        loss_type=loss if loss and custom is None else None,
        custom_loss=custom,
        advantage=ADVANTAGES[advantage] if advantage and chosen is None else chosen,
        kl=config.kl,
    )


def _load(kind: str, text: str, try_out: Callable[[Any], str | None]) -> Any:
    spec = plugin_spec(kind, text)
    if spec is None:
        return None
    function, _ = resolve(spec)
    if not callable(function):
        raise UserError(f"{kind} {text!r} is {described(function)}, not a function")
    try:
        problem = try_out(function)
    except Exception as error:
        where = place(error, getattr(getattr(function, "__code__", None), "co_filename", None))
        raise UserError(f"{kind} {text!r} raised {told(error)}" + (f" ({where})" if where else "")) from error
    if problem:
        raise UserError(f"{kind} {text!r} {problem}")
    return function


def _try_loss(function: CustomLoss) -> str | None:
    """What is wrong with a loss function, by two sequences of three tokens; None: nothing."""
    logprobs = torch.tensor([[-1.0, -0.5, -2.0], [-0.7, -1.2, 0.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    old, advantages = logprobs.detach() - 0.1, torch.tensor([[1.0], [-1.0]])
    loss = function(LossInputs(logprobs, old, advantages, mask, old), LossConfig(max_completion_length=3))
    if not isinstance(loss, Tensor):
        return f"returned {described(loss)}, not a tensor"
    if loss.shape not in ((2, 3), (2, 1)):
        return f"returned shape {tuple(loss.shape)} for log-probs (2, 3), not (2, 3) or (2, 1)"
    if not loss.requires_grad:
        return "returned a loss without gradient: compute it from inputs.logprobs"
    (gradient,) = torch.autograd.grad((loss * mask).sum(), logprobs)
    if not (loss.isfinite().all() and gradient.isfinite().all()):
        return "returned a loss or gradient that is not finite"
    return None


def _try_advantage(function: AdvantageFunction) -> str | None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, float("nan")], [0.5, 1.0], [0.5, 1.0]])
    return advantage_problem(function(rewards, torch.ones(2), 2), 4)


def advantage_problem(advantages: Any, count: int) -> str | None:
    """What is wrong with what an advantage function returned for `count` completions; None: nothing."""
    if not isinstance(advantages, Tensor):
        return f"returned {described(advantages)}, not a tensor"
    if advantages.shape != (count,):
        return f"returned shape {tuple(advantages.shape)} for {count} completions, not ({count},)"
    return None if advantages.isfinite().all() else "returned an advantage that is not finite"
