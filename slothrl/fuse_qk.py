"""QK-norm and RoPE as one: where an attention normalises q and k and then rotates them, one kernel does both.

The attention's forward runs as it is, on the norms and the rotation that `fuse` has found. While it runs, its two norms
hand on what they are given and remember it; the rotation, which comes next, sees that q and k are what waits there, and
normalises and rotates at once. Outside of the attention's forward the norms are norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps
from threading import local
from types import FunctionType, MethodType
from typing import Any

import torch
from slothrl_kernels import QKNorm, qk_norm_rope
from torch import Tensor, nn
from torch.func import functional_call

from slothrl.fuse_norm import FusedNorm
from slothrl.fuse_replace import Replacement, agree
from slothrl.fuse_report import FuseReport
from slothrl.fuse_rope import FusedRope, Rotate
from slothrl.fuse_trace import random_embeddings

_now = local()  # .running: the FusedQK whose attention's forward runs in this thread; checkpoints run in autograd's


class QKRotate:
    """The rotation of one attention class under its own signature; normalises first what waits for it."""

    def __init__(self, rotate: Rotate) -> None:
        self.rotate = rotate

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        waiting = _now.running.waiting
        norms = [next((norm.alone for norm, given in waiting if _same(given, x)), None) for x in (q, k)]
        if sum(norm is not None for norm in norms) < len(waiting) or (norms[0] is norms[1] and waiting):
            raise RuntimeError("q and k were changed between their norms and their rotation: unfuse(model) first")
        waiting.clear()
        a, b = norms
        if a and b and a.numbers() == b.numbers() and self.rotate.fits(q, k, cos, *args, **kwargs):
            first: Any = a.module.weight
            second: Any = b.module.weight
            return qk_norm_rope(q, k, first, second, cos, sin, QKNorm(*a.numbers()), self.rotate.impl)
        q, k = (norm.forward(x) if norm else x for norm, x in ((a, q), (b, k)))  # it may be one alone that waits
        return self.rotate(q, k, cos, sin, *args, **kwargs)


class WaitingNorm(Replacement):
    """A norm of heads that leaves its work to the rotation, where that comes next."""

    def __init__(self, alone: FusedNorm) -> None:
        super().__init__(alone.module)
        self.alone = alone

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        running: FusedQK | None = getattr(_now, "running", None)
        hooked = self.module._forward_hooks or self.module._forward_pre_hooks  # whoever watches sees a norm
        plain = x.dim() == 4 and not (hooked or args or kwargs) and self.alone.serves(x)
        if running is None or not plain or all(norm is not self for norm in running.norms):
            return self.alone.forward(x, *args, **kwargs)
        running.waiting.append((self, x))
        return x


class FusedQK(Replacement):
    """An attention whose two norms wait for its rotation."""

    def __init__(self, rope: FusedRope, name: str, norms: Sequence[FusedNorm]) -> None:
        super().__init__(rope.module)
        self.rope, self.norms = rope, [WaitingNorm(norm) for norm in norms]
        self.waiting: list[tuple[WaitingNorm, Tensor]] = []
        plain: Any = type(rope.module).forward
        names = {**plain.__globals__, name: QKRotate(rope.rotate)}
        self.copy = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        self.copy.__kwdefaults__ = plain.__kwdefaults__

        @wraps(plain)  # a signature like the original's
        def forward(fused: FusedQK, *args: Any, **kwargs: Any) -> Any:
            return fused.run(*args, **kwargs)

        self.entry = forward

    def run(self, *args: Any, **kwargs: Any) -> Any:
        before, _now.running = getattr(_now, "running", None), self
        try:
            result = self.copy(self.module, *args, **kwargs)
            if self.waiting:
                raise RuntimeError("q and k were normalised and not rotated: unfuse(model) first")
            return result
        finally:
            _now.running = before
            self.waiting.clear()

    def install(self) -> None:
        self.module.forward = MethodType(self.entry, self)  # of this object, so that a deep copy has its own
        for norm in self.norms:
            norm.install()

    def remove(self) -> None:
        """The attention's and its norms' own forwards again."""
        super().remove()
        for norm in self.norms:
            norm.remove()


def join_norms(
    base: nn.Module, found: list[Replacement], report: FuseReport, inputs: Mapping[str, Any] | None = None
) -> list[Replacement]:
    """`found` with every rotation that follows two norms made a `FusedQK`, where it computes what the module does.

    Args:
        base: the model that was searched, nothing of `found` installed.
        found: its `FusedNorm`s and `FusedRope`s; the norms stay, for whoever calls them elsewhere.
        report: counts them as "QK-norm + RoPE" instead.
        inputs: of a small forward, as `fuse` takes them.
    """
    norms = {f.module: f for f in found if isinstance(f, FusedNorm)}
    pairs = {
        f: pair
        for f in found
        if isinstance(f, FusedRope) and len(pair := [norms[c] for c in f.module.children() if c in norms]) == 2
    }
    calls = _calls(base, [f.module for f in pairs], inputs) if pairs else {}
    joined: list[Replacement] = []
    for replacement in found:
        fused = replacement
        if isinstance(replacement, FusedRope) and replacement.module in calls:
            candidate = FusedQK(replacement, replacement.name, pairs[replacement])
            if _proven(candidate, *calls[replacement.module]):
                fused = candidate
                report.fused.subtract({"RoPE": 1, "RMSNorm": 2})
                report.fused["QK-norm + RoPE"] += 1
        joined.append(fused)
    report.fused = +report.fused
    return joined


def _calls(base: nn.Module, modules: list[nn.Module], inputs: Mapping[str, Any] | None) -> dict[nn.Module, tuple]:
    """What each module is called with in a small forward: (args, kwargs); nothing where that does not run."""
    seen: dict[nn.Module, tuple] = {}

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.setdefault(module, (args, kwargs))

    handles = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
    try:
        with torch.enable_grad():
            base(**(inputs if inputs is not None else random_embeddings(base)))
    except Exception:  # the report has it already, from `trace`
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _proven(fused: FusedQK, args: tuple, kwargs: dict) -> bool:
    """Whether the attention's first result is the module's own, with random weights for its norms."""
    module, drawn = fused.module, {}
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1 and parameter.is_floating_point() and "lora_" not in name:
            drawn[name] = 1 + torch.rand_like(parameter)
    with torch.enable_grad():
        theirs = functional_call(module, drawn, args, kwargs)
        fused.install()
        try:
            ours = functional_call(module, drawn, args, kwargs)
        except Exception:  # something between the norms and the rotation, which raises as it would when it trains
            return False
        finally:
            fused.remove()
    first = [x[0] if isinstance(x, tuple) else x for x in (ours, theirs)]
    return agree(*first)


def _same(given: Tensor, x: Tensor) -> bool:
    """Whether x is a view of all of `given`, such as its transpose."""
    alike = (given.data_ptr(), given.numel(), given.dtype) == (x.data_ptr(), x.numel(), x.dtype)
    return alike and given.size(-1) == x.size(-1)
