"""Whose linear layers generate, and from what, in words for the plan table: nothing falls back in silence."""

from __future__ import annotations

from typing import Any

import torch
from slothrl_kernels.nf4_config import ROW_BUCKETS
from slothrl_kernels.nf4_launches import untuned
from torch import nn

from slothrl.vllm_linear import NF4


def described(model: nn.Module, linear: str | None, view: bool, cache: str = "auto") -> str:
    """One line on vLLM's model: its layers' method (`vllm_engine.linear_method`), what is not ours, tuned or exact."""
    if linear is None:
        said = "vLLM's own linear layers, and its LoRA for many adapters"
    elif view:
        said = "from a 16-bit view of the base with the LoRA folded in (approximate), freed while asleep"
    else:
        base = "one GEMM on the nf4 bytes" if linear == NF4 else "vLLM's products"
        said = f"{base} with the LoRA inside the layer ({linear})"
    fp8 = "FP8 KV cache (approximate)" if cache.startswith("fp8") else ""
    notes = [fp8, experts_note(model), launches_note(model) if linear == NF4 and not view else ""]
    return "; ".join([said, *filter(None, notes)])


def experts_note(model: nn.Module) -> str:
    """How many layers of experts run by bitsandbytes' own method, which dequantises all of them; empty for none."""
    methods = (getattr(module, "quant_method", None) for module in model.modules())
    theirs = {id(method) for method in methods if type(method).__name__ == "BitsAndBytesMoEMethod"}
    if not theirs:
        return ""
    return f"{len(theirs)} layers of experts by bitsandbytes' own way: all of them dequantised at every step, no LoRA"


def launches_note(model: nn.Module) -> str:
    """Whether launches of the nf4 GEMM were timed for these layers on this GPU; empty where all were, and on a CPU."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "nf4_shape")]
    shapes = {tuple(layer.nf4_shape) for layer in layers if layer.nf4_shape[1] % 64 == 0}
    if not shapes or layers[0].nf4_packed.device.type != "cuda":
        return ""
    return _missing(shapes, layers[0].nf4_packed.device)


def _missing(shapes: set[tuple[int, int]], device: torch.device) -> str:
    missing = len(untuned(shapes, device))
    if not missing:
        return ""
    tried = len(shapes) * len(ROW_BUCKETS)
    return f"default launches for {missing} of {tried} sizes: `python -m slothrl tune`, with this run's arguments"
