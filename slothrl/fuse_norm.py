"""RMSNorm, found by what it computes: Llama's order of casts or Gemma's, with w or 1 + w."""

from __future__ import annotations

from typing import Any

import torch
from slothrl_kernels import Impl, rms_norm
from torch import Tensor, nn
from torch.func import functional_call

from slothrl.fuse_replace import Replacement, device_and_dtype, proven


class FusedNorm(Replacement):
    """x / rms(x) * (weight + shift) in one kernel, forward and backward."""

    def __init__(self, module: nn.Module, eps: str, shift: float, cast_first: bool, impl: Impl) -> None:
        super().__init__(module)
        self.eps, self.shift, self.cast_first = eps, shift, cast_first
        self.impl: Impl = impl

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self.serves(x):
            return self.original(x, *args, **kwargs)
        weight: Any = self.module.weight
        return rms_norm(x, weight, *self.numbers(), self.impl)

    def serves(self, x: Tensor) -> bool:
        """A weight of another dtype would promote the result, in the order that casts first."""
        weight: Any = self.module.weight
        return not self.cast_first or weight.dtype == x.dtype

    def numbers(self) -> tuple[float, float, bool]:
        """eps, shift, cast_first."""
        return getattr(self.module, self.eps), self.shift, self.cast_first


def looks_like_norm(module: nn.Module) -> bool:
    """A module without children whose only parameter is one row, and that holds a small number beside it."""
    parameters = dict(module.named_parameters())
    one = set(parameters) == {"weight"} and parameters["weight"].dim() == 1 and not list(module.buffers())
    return one and not list(module.children()) and bool(_epsilons(module))


def find_norm(module: nn.Module, impl: Impl) -> FusedNorm | None:
    """The replacement that computes what `module` does; None where none does. Call it inside of a `trial`."""
    (device, dtype), width = device_and_dtype(module), module.weight.numel()  # pyright: ignore
    # So small that eps decides, and so large that it does not matter.
    small, large = (scale * torch.randn(3, width, device=device) for scale in (1e-3, 1.0))
    for eps in _epsilons(module):
        for shift in (0.0, 1.0):
            found = [FusedNorm(module, eps, shift, cast_first, impl) for cast_first in (True, False)]
            found = [f for f in found if proven(f, large.to(dtype)) and proven(f, small.to(dtype))]
            if found:
                return min(found, key=lambda f: _distance(f, large.to(torch.promote_types(dtype, torch.bfloat16))))
    return None


def _epsilons(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 1e-2]


def _distance(found: FusedNorm, x: Tensor) -> float:
    """How far the result is from the module's, with a weight of many bits: the order of casts shows in 16 bits."""
    module = found.module
    weight: Any = module.weight
    drawn = {"weight": 1 + torch.rand_like(weight)}
    with torch.no_grad():
        theirs = functional_call(module, drawn, (x,))
        found.install()
        try:
            return (functional_call(module, drawn, (x,)).double() - theirs.double()).abs().mean().item()
        finally:
            found.remove()
