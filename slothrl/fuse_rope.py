"""RoPE: an attention's forward runs again as it is, with one of the functions it calls given another body.

A function finds its helpers in the globals of its module. The copy of an attention's forward made here has globals of
its own, in which the helper that rotates q and k is our kernel; nothing in the module itself changes.
"""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from slothrl_kernels import Impl, rope
from torch import Tensor, nn

from slothrl.fuse_replace import Replacement, agree


class Rotate:
    """(q, k, cos, sin) -> both rotated, by our kernel where the shapes are its own, else by the model's function."""

    def __init__(self, theirs: Any, impl: Impl) -> None:
        self.theirs, self.partial = theirs, False
        self.impl: Impl = impl

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.fits(q, k, cos, *args, **kwargs):
            return self.theirs(q, k, cos, sin, *args, **kwargs)
        return rope(q, k, cos, sin, impl=self.impl)

    def fits(self, q: Tensor, k: Tensor, cos: Tensor, *args: Any, **kwargs: Any) -> bool:
        # Other arguments than the default ones, and tables that would promote q, are the model's own affair.
        fits = not args and not kwargs and q.dim() == 4 and cos.dim() == 3 and q.dtype == k.dtype == cos.dtype
        fits = fits and (self.partial or cos.size(2) == q.size(3))
        return fits and cos.size(0) in (1, q.size(0)) and cos.size(1) == q.size(2)


class FusedRope(Replacement):
    """An attention module whose forward rotates by `Rotate`."""

    def __init__(self, module: nn.Module, name: str, impl: Impl) -> None:
        super().__init__(module)
        self.name = name
        plain: Any = type(module).forward
        self.rotate = Rotate(plain.__globals__[name], impl)
        names = {**plain.__globals__, name: self.rotate}
        self.copy = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        self.copy.__kwdefaults__ = plain.__kwdefaults__

    def install(self) -> None:
        self.module.forward = MethodType(self.copy, self.module)  # a signature like the original's


def rotation_of(module: nn.Module) -> str | None:
    """The global function of (q, k, cos, sin) that a module's forward calls; None where there is none."""
    plain: Any = type(module).forward
    if not isinstance(plain, FunctionType) or hasattr(plain, "__wrapped__"):
        return None
    for name in plain.__code__.co_names:
        helper = plain.__globals__.get(name)
        if inspect.isfunction(helper) and list(inspect.signature(helper).parameters)[:4] == ["q", "k", "cos", "sin"]:
            return name
    return None


def rotates_alike(fused: FusedRope, device: torch.device) -> bool:
    """Whether the model's function is our rotation, on random heads of 8, of the whole width or of half of it too."""
    fused.rotate.partial = _alike(fused.rotate.theirs, device, 4)
    return _alike(fused.rotate.theirs, device, 8)


def _alike(function: Any, device: torch.device, turned: int) -> bool:
    q, k = (torch.randn(1, heads, 3, 8, device=device) for heads in (2, 1))
    angle = torch.randn(1, 3, turned // 2, device=device).repeat(1, 1, 2)
    cos, sin = 1.5 * angle.cos(), 1.5 * angle.sin()
    try:
        theirs = function(q, k, cos, sin)
    except Exception:  # another meaning of the same four names, or no partial rotary
        return False
    ours = rope(q, k, cos, sin, impl="torch")
    return isinstance(theirs, tuple) and len(theirs) == 2 and all(map(agree, ours, theirs))
