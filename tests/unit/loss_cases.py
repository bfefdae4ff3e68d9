"""Inputs of policy losses that several tests share."""

import torch

from slothrl.losses import LossInputs

OLD = [[-1.0, -1.0, -1.0, -1.0], [-0.5, -2.0, -1.5, -1.0]]
NEW = [[-1.69314718, -1.0, -0.59453489, -1.2], [-0.4, -2.3, -1.5, -0.2]]
REF = [[-1.1, -0.9, -1.0, -1.0], [-0.6, -2.0, -1.0, -1.0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]


def oracle_inputs() -> LossInputs:
    return LossInputs(
        logprobs=torch.tensor(NEW, requires_grad=True),
        old_logprobs=torch.tensor(OLD),
        advantages=torch.tensor([1.0, -0.5]),
        mask=torch.tensor(MASK),
        ref_logprobs=torch.tensor(REF),
    )


def random_inputs(seed: int, advantages_per_token: bool = False, ratio_width: int | None = None) -> LossInputs:
    """(5, 7) with ratios well outside of the clip range and one sequence without a token that counts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    new = -2.0 + normal(5, 7)
    mask = (torch.arange(7) < torch.tensor([7, 4, 1, 6, 0])[:, None]).int()
    return LossInputs(
        logprobs=new.clone().requires_grad_(),
        old_logprobs=new + 0.4 * normal(5, 7),
        advantages=normal(5, 7) if advantages_per_token else normal(5),
        mask=mask,
        ref_logprobs=new + 0.4 * normal(5, 7),
        importance_ratio=None if ratio_width is None else normal(5, ratio_width).exp().clamp(max=3),
    )


def loss_and_gradient(loss: torch.Tensor, inputs: LossInputs) -> tuple[float, torch.Tensor]:
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    return loss.item(), gradient
