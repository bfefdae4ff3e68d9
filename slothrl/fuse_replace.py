"""Another forward on one module: on the instance alone, taken off again exactly, and proven on random input first."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Relative to the largest value of a result: what two right orders of summation may differ by.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Replacement:
    """What runs in place of a module's forward. Subclasses say how.

    It is bound methods and not closures, so that a deep copy of the model runs on the copy's modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        vars(self.module).pop("forward", None)


def replaced_by_others(module: nn.Module) -> bool:
    """Whether somebody else has already put a forward on this instance (accelerate's hooks do)."""
    return "forward" in vars(module)


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and in what: of its first floating-point parameter that is no adapter's."""
    first = next(module.parameters())
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            return parameter.device, parameter.dtype
    for child in module.modules():  # all packed: what bitsandbytes computes in
        if getattr(child, "compute_dtype", None) is not None:
            return first.device, child.compute_dtype  # pyright: ignore
    return first.device, torch.float32


def agree(ours: Any, theirs: Any) -> bool:
    """Whether two results are the same up to the order of summation."""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return False
    ours, theirs = ours.detach(), theirs.detach()
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not theirs.isfinite().all():
        return False
    bound = AGREEMENT.get(theirs.dtype, 0.0) * theirs.abs().max().clamp(min=1e-6)
    return bool((ours.double() - theirs.double()).abs().max() <= bound)


def proven(replacement: Replacement, *inputs: Tensor) -> bool:
    """Whether a replacement computes what its module does, on `inputs`, with random numbers for what is often 0 or 1.

    LoRA's B starts at 0 and a norm's weight at 1: both are drawn anew for the trial alone, and nothing is written to.
    """
    module, drawn = replacement.module, {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and ("lora_" in name or parameter.dim() == 1):
            drawn[name] = 1 / max(parameter.shape[-1], 1) ** 0.5 * torch.randn_like(parameter) + (parameter.dim() == 1)
    # With gradients on: bitsandbytes lays its weights out anew in a forward that needs none, on some CPUs.
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        torch.manual_seed(1)  # of dropout, the same for both
        theirs = functional_call(module, drawn, inputs)
        replacement.install()
        try:
            torch.manual_seed(1)
            return agree(functional_call(module, drawn, inputs), theirs)
        finally:
            replacement.remove()


@contextmanager
def trial(device: torch.device, dtype: torch.dtype):
    """Random numbers of its own, and autocast as a trainer has it over 16-bit weights (with float32 adapters)."""
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    half = dtype in (torch.bfloat16, torch.float16)
    with (
        torch.random.fork_rng(devices=devices),
        torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half),
    ):
        torch.manual_seed(0)
        yield
