"""Decoder layers that `FusedLayer` can stand for: found by what they hold, proven with all gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from slothrl_kernels import Impl
from slothrl_kernels.decoder_layer import decoder_layer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface

from slothrl.fuse_layer import Attention, FusedLayer
from slothrl.fuse_layers import is_linear
from slothrl.fuse_mlp import FusedMLP
from slothrl.fuse_norm import FusedNorm
from slothrl.fuse_replace import Replacement, replaced_by_others
from slothrl.fuse_rope import rotation_of
from slothrl.fuse_trace import Trace, random_embeddings

NAME = "slothrl_watched"
UNABLE = "LoRA dropout, a LoRA variant, several dtypes, or more than adapters trained"
# Relative to the norm of each gradient. In 16 bits two right orders of rounding were up to 0.1 apart behind a softmax
# of random scores, wrong layers at least 0.7; norms, RoPE, MLP and projections have been held to closer bounds alone.
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.1}


class Asked(NamedTuple):
    """How an attention module asked for attention: shapes of q, k and v, and the keywords."""

    shapes: tuple[torch.Size, ...]
    options: dict[str, Any]


def find_layers(
    base: nn.Module, seen: Trace, found: Sequence[Replacement], inputs: Mapping[str, Any] | None, impl: Impl
) -> tuple[list[FusedLayer], dict[str, int]]:
    """(layers that are proven, how many were not by reason). `found`: the norms and MLPs that were proven alone."""
    norms = {r.module: r for r in found if isinstance(r, FusedNorm)}
    mlps = {r.module: r for r in found if isinstance(r, FusedMLP)}
    candidates = [m for m in base.modules() if any(child in mlps for child in m.children()) and m in seen.calls]
    asked = _asked(base, inputs) if candidates else {}
    layers, reasons = [], {}
    for layer in candidates:
        why, made = _candidates(layer, seen, norms, mlps, asked, impl)
        args, kwargs = seen.calls[layer]
        able = [fused for fused in made if fused.plan(args, _uncached(kwargs), "input") is not None]
        proven = next((fused for fused in able if _proven(fused, args, _uncached(kwargs))), None)
        layers += [proven] if proven else []
        if proven is None:
            why = why or ("one step computes something else" if able else UNABLE)
            reasons[why] = reasons.get(why, 0) + 1
    return layers, reasons


def _candidates(
    layer: nn.Module, seen: Trace, norms: dict, mlps: dict, asked: dict[nn.Module, Asked], impl: Impl
) -> tuple[str | None, list[FusedLayer]]:
    """(why there are none, what the layer may be), by what it holds and the order in which that was called."""
    held = [child for child in layer.children() if any(True for _ in child.parameters())]
    own = [norms[child] for child in seen.inputs if child in norms and child in held]
    rest = [child for child in held if child not in norms and child not in mlps]
    if replaced_by_others(layer) or any(replaced_by_others(m) for m in layer.modules()):
        return "somebody else replaced a forward in it", []
    if (
        len(own) not in (2, 4)
        or len(rest) != 1
        or len(held) != len(own) + 2
        or any(True for _ in layer.parameters(recurse=False))
    ):
        return "not two or four norms, an attention and a gated MLP", []
    mlp: FusedMLP = next(mlps[child] for child in held if child in mlps)
    attention = _attention(rest[0], seen, norms, asked)
    if isinstance(attention, str):
        return attention, []
    ways = [True, False] if rotation_of(rest[0]) is not None else [False]
    ways = [True] if attention.norms else ways
    made = [replace(attention, rotates=rotates) for rotates in ways]
    return None, [FusedLayer(layer, own, attends, mlp, impl) for attends in made]


def _attention(module: nn.Module, seen: Trace, norms: dict, asked: dict[nn.Module, Asked]) -> Attention | str:
    """What it is, or why it is none."""
    if module not in asked:
        return "its attention does not ask transformers' registry"
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    linears = [linear for linear, _ in seen.given if linear in children]
    inside = [norms[child] for child in seen.inputs if child in norms and child in children]
    if len(linears) not in (2, 4) or len(inside) not in (0, 2) or len(children) != len(linears) + len(inside):
        return "its attention is more than q, k, v and o"
    (q, k, v), options = asked[module]
    if options.get("dropout"):
        return "attention dropout"
    if k != v or q[3] != k[3] or any(isinstance(value, Tensor) for value in options.values()):
        return "its attention takes more than q, k and v of one width"
    if any(norm.module.weight.shape != q[3:] for norm in inside) or len({norm.numbers() for norm in inside}) > 1:
        return "norms over more than a head, or of two kinds"
    return Attention(module, linears, inside, q[1], k[1], q[3], {**options, "dropout": 0.0}, rotates=True)


def _asked(base: Any, inputs: Mapping[str, Any] | None) -> dict[nn.Module, Asked]:
    """What each attention asks for in one forward in training mode, from a function that computes none."""
    found: dict[nn.Module, Asked] = {}
    given: list[dict[str, Any]] = []

    def watch(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        found[module] = Asked((q.shape, k.shape, v.shape), options)
        return q.transpose(1, 2).contiguous(), None

    def outside(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given.append(kwargs)

    attentions = [m for m in base.modules() if hasattr(m, "config") and any(is_linear(c) for c in m.children())]
    handles = [m.register_forward_pre_hook(outside, with_kwargs=True) for m in attentions]
    AttentionInterface.register(NAME, watch)
    try:
        with _named(base, NAME), _training(base), torch.enable_grad():
            base(**(inputs if inputs is not None else random_embeddings(base)))
    except Exception:  # the trace has said why this model does not run
        return {}
    finally:
        for handle in handles:
            handle.remove()
    handed = {key for kwargs in given for key in kwargs}
    for module, asked in found.items():
        found[module] = Asked(asked.shapes, {k: v for k, v in asked.options.items() if k not in handed})
    return found


@contextmanager
def _named(base: nn.Module, name: str) -> Iterator[None]:
    """All configs inside of `base` ask for attention by this name."""
    from slothrl.packed_model import attention_by

    with attention_by(base, name):
        yield


@contextmanager
def _training(base: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in base.modules()]
    for module, _ in modes:
        module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Call(nn.Module):
    """A function over a layer's parameters, which `functional_call` can give other values."""

    def __init__(self, layer: nn.Module, function: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _proven(fused: FusedLayer, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the step gives what the modules give, on random input and adapters: results and every gradient."""
    layer, x = fused.module, torch.randn_like(args[0]).requires_grad_()
    drawn: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters():
        if parameter.is_floating_point() and ("lora_" in name or parameter.dim() == 1):
            values = torch.randn_like(parameter) / max(parameter.shape[-1], 1) ** 0.5 + (parameter.dim() == 1)
            drawn[f"layer.{name}"] = values.detach().requires_grad_("lora_" in name)
    upstream = torch.randn_like(x)

    def step(*args: Any, **kwargs: Any) -> Tensor | None:
        parts = fused.plan(args, kwargs, "input")
        return None if parts is None else decoder_layer(args[0], parts)

    leaves = [x, *(value for value in drawn.values() if value.requires_grad)]
    results = []
    for function in (step, fused.original):
        with torch.enable_grad():
            y = functional_call(_Call(layer, function), drawn, (x,), kwargs)
        if not isinstance(y, Tensor) or not y.requires_grad:
            return False
        gradients = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
        results.append([y.detach(), *gradients])
    return all(_near(ours, theirs) for ours, theirs in zip(*results, strict=True))


def _uncached(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "past_key_values"}


def _near(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) or not theirs.isfinite().all():
        return False
    bound = AGREEMENT.get(ours.dtype, 0.0)
    bound = max(bound, AGREEMENT[torch.bfloat16]) if torch.is_autocast_enabled(ours.device.type) else bound
    return bool((ours.double() - theirs.double()).norm() <= bound * theirs.double().norm())
