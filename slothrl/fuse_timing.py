"""Whether a model's fused layers are faster than the modules they stand for: its first decoder layer, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slothrl.fuse_replace import Replacement
from slothrl.fuse_trace import random_embeddings

TOKENS = 512  # few: where the host is waited for, and a small model could lose
WARMUPS, REPEATS = 2, 5
MARGIN = 1.05  # times the modules' time from which on fusing has lost: clocks differ by less from run to run


class Timing(NamedTuple):
    """Milliseconds of one decoder layer's forward and backward, the fastest of a few."""

    fused: float
    plain: float

    @property
    def loses(self) -> bool:
        return self.fused > MARGIN * self.plain

    def __str__(self) -> str:
        return f"one layer, {TOKENS} tokens, there and back: {self.fused:.2f} ms fused, {self.plain:.2f} ms as it was"


class _Reached(Exception):
    """The layer's call is known: the forward need not go on."""


def time_layer(base: Any, replacements: Sequence[Replacement]) -> Timing | None:
    """The first decoder layer of `base` with the replacements in it, and without.

    Call it inside of a `trial`. Nothing of it stays: no gradient, no hook, the replacements as installed as they were.

    Args:
        base: a causal language model of transformers, without PEFT's wrapper.
        replacements: what `fuse` installed, in that order.

    Returns:
        None where there is no such layer, or nothing in it is replaced.
    """
    replaced = {replacement.module for replacement in replacements}
    stacks = (list(module) for module in base.modules() if isinstance(module, nn.ModuleList))  # the outermost first
    layer = next((stack[0] for stack in stacks if stack and replaced & set(stack[0].modules())), None)
    if layer is None:
        return None
    mine = [replacement for replacement in replacements if replacement.module in set(layer.modules())]
    args, kwargs = _call_of(base, layer)
    x = args[0].detach().requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    taken: dict[bool, list[float]] = {True: [], False: []}
    try:
        for _ in range(WARMUPS + REPEATS):
            for fused in (False, True):
                for replacement in mine:
                    replacement.install() if fused else replacement.remove()
                taken[fused].append(_milliseconds(layer, (x, *args[1:]), kwargs, leaves))
    finally:
        for replacement in mine:
            replacement.install()
    return Timing(*(min(taken[fused][WARMUPS:]) for fused in (True, False)))


def _call_of(base: Any, layer: nn.Module) -> tuple[tuple, dict[str, Any]]:
    """What the layer is called with for TOKENS random embeddings."""
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def reached(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        base(**random_embeddings(base, TOKENS))
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _milliseconds(layer: nn.Module, args: tuple, kwargs: dict[str, Any], leaves: list[Tensor]) -> float:
    device = leaves[0].device
    _wait(device)
    begin = perf_counter()
    with torch.enable_grad():
        y = layer(*args, **kwargs)
        y = y if isinstance(y, Tensor) else y[0]
        torch.autograd.grad(y, leaves, y.detach(), allow_unused=True)
    _wait(device)
    return 1e3 * (perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
