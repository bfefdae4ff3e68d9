"""The gated MLP of a layer in one step: found by its three (or two) linear layers, its activation by its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from slothrl_kernels import Impl, lora_mlp
from slothrl_kernels.glu import ACTIVATIONS, Activation, glu_reference
from torch import Tensor, nn

from slothrl.fuse_layers import LinearReader, is_linear
from slothrl.fuse_replace import Replacement, agree


class FusedMLP(Replacement):
    """down(act(gate(x)) * up(x)).

    Inside of a checkpointed layer it keeps its input alone, and never runs `down` again; else it keeps gate and up.

    Args:
        inner: the gate and the up layer, or one that is both.
        layer: the ancestor whose `gradient_checkpointing` says that it is checkpointed, or None; None too where the
            layer needs the MLP's output again, so that a checkpoint runs all of it.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: Sequence[nn.Module],
        down: nn.Module,
        activation: Activation,
        layer: nn.Module | None,
        impl: Impl,
    ) -> None:
        super().__init__(module)
        self.readers = [LinearReader(linear) for linear in (*inner, down)]
        self.activation: Activation = activation
        self.layer = layer
        self.impl: Impl = impl

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        children = self.module._modules.values()  # PEFT's unload puts others there
        mine = all(any(child is reader.layer for child in children) for reader in self.readers)
        readings = [reader.read(x) for reader in self.readers] if mine and not (args or kwargs) else []
        found = [r for r in readings if r is not None and r.plain]
        if len(found) < len(self.readers) or len({r.dtype for r in found}) > 1:
            return self.original(x, *args, **kwargs)
        *inner, down = (r.projection for r in found)
        y = lora_mlp(x.to(found[0].dtype), inner, down, self.activation, self._recomputes(), self.impl)
        return y.to(found[-1].out_dtype)

    def _recomputes(self) -> bool:
        return self.layer is not None and checkpoints(self.layer)


def checkpoints(layer: Any) -> bool:
    """Whether a forward of `layer` is about to be checkpointed, in the way that stops at what the backward needs."""
    if not (layer.gradient_checkpointing and layer.training):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return not (isinstance(function, partial) and function.keywords.get("use_reentrant"))


def candidates(module: nn.Module) -> list[tuple[list[nn.Module], nn.Module]]:
    """([gate, up] or [gate and up in one], down) in every order that the shapes allow; empty: no gated MLP."""
    linears: list[Any] = [child for child in module.children() if is_linear(child)]
    rest = [child for child in module.children() if not is_linear(child) and any(True for _ in child.parameters())]
    if rest or len(linears) not in (2, 3):
        return []
    found = []
    for down in linears:
        inner = [linear for linear in linears if linear is not down]
        features = sum(linear.out_features for linear in inner)
        if {linear.in_features for linear in inner} == {down.out_features} and features == 2 * down.in_features:
            found += [(inner, down), (inner[::-1], down)] if len(inner) == 2 else [(inner, down)]
    return found


def activation_of(module: nn.Module) -> Activation | None:
    """Which activation an MLP holds, by its values in float32; None where it holds none that is known here."""
    device = next(module.parameters()).device
    values = torch.linspace(-8, 8, 257, device=device)
    held = [*module.children(), *(value for value in vars(module).values() if callable(value))]
    for function in held:
        if isinstance(function, nn.Module) and (is_linear(function) or any(True for _ in function.parameters())):
            continue
        result = _values(function, values)
        for name in ACTIVATIONS:
            if result is not None and agree(result, glu_reference(values, torch.ones_like(values), name)):
                return name
    return None


def _values(function: Callable[[Tensor], Any], values: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            result = function(values)
    except Exception:  # whatever else the module keeps that can be called
        return None
    return result if isinstance(result, Tensor) else None
