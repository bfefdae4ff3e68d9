"""What a linear layer holds, PEFT's LoRA around it or not, read at call time: adapters get switched and merged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from slothrl_kernels import Int8Weight, Nf4Weight, Projection
from torch import Tensor, nn


class Reading(NamedTuple):
    """A linear layer as it is now.

    Attributes:
        projection: weight, bias and active adapter.
        dropout: what the LoRA's input goes through, or None.
        dtype: of the base's computation.
        out_dtype: of its result.
        lora_dtype: of the adapter's computation.
    """

    projection: Projection
    dropout: nn.Module | None
    dtype: torch.dtype
    out_dtype: torch.dtype
    lora_dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """Whether base and adapter work in one dtype, without dropout: what fuses in full."""
        adapted = self.projection.a is not None
        return self.dropout is None and (not adapted or self.lora_dtype == self.dtype)


class LinearReader:
    """Reads one linear layer. `why_not` is what keeps it from ever being fused, `read` tells what it is at a call."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self._packed: tuple[Any, ...] | None = None  # what the view in its last place was made of

    @property
    def base(self) -> Any:
        return held(self.layer, "_modules", "base_layer") if isinstance(self.layer, LoraLayer) else self.layer

    def why_not(self) -> str | None:
        layer, base = self.layer, self.base
        if not isinstance(base, nn.Linear):
            return f"its base is a {type(base).__name__}"
        if isinstance(layer, LoraLayer):
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            if any(name in layer.lora_variant for name in names):
                return "a LoRA variant (DoRA and the like)"
            if any(layer.lora_bias[name] for name in names):
                return "lora_bias"
            if getattr(layer, "fan_in_fan_out", False):
                return "its weight is transposed (fan_in_fan_out)"
        if (state := _quant_state(base)) is not None:
            if state.quant_type != "nf4" or getattr(state, "packing_format_for_cpu", False):
                return f"its base is {state.quant_type}, or was laid out anew for the CPU"
            if len(state.shape) != 2 or tuple(state.shape) != (base.out_features, base.in_features):
                return "its base was quantised in another orientation"
        elif not base.weight.is_floating_point():
            if _int8_scales(base) is None:
                return f"its base holds {base.weight.dtype}"
            if base.weight.is_cuda:  # on a CPU bitsandbytes unpacks the weight, as we do
                return "LLM.int8 rounds its inputs too, unpacking the weight would be another computation"
        return None

    def read(self, x: Tensor) -> Reading | None:
        """What to compute for `x`; None where the layer's own forward has to."""
        layer, base = self.layer, self.base
        reading = self._read_base(base, x)
        if reading is None or not isinstance(layer, LoraLayer) or layer.disable_adapters:
            # Merged weights are unmerged by PEFT's own forward when adapters are disabled.
            return None if isinstance(layer, LoraLayer) and layer.merged else reading
        adapters = held(layer, "_modules", "lora_A")
        names = [name for name in layer.active_adapters if name in adapters]
        if layer.merged or len(names) > 1 or (names and (names[0] in layer.lora_variant or layer.lora_bias[names[0]])):
            return None
        return self._with_adapter(reading, names[0], x) if names else reading

    def _with_adapter(self, reading: Reading, name: str, x: Tensor) -> Reading | None:
        layer = self.layer
        a, b = (held(held(layer, "_modules", which)[name], "_parameters", "weight") for which in ("lora_A", "lora_B"))
        dropout = held(layer, "_modules", "lora_dropout")[name]
        dtype = _autocast_dtype(x) or a.dtype
        if not layer.cast_input_dtype_enabled and dtype != x.dtype:
            return None
        active = not isinstance(dropout, nn.Identity) and dropout.training and getattr(dropout, "p", 1.0) > 0
        projection = Projection(reading.projection.weight, reading.projection.bias, a, b, layer.scaling[name])
        return Reading(projection, dropout if active else None, reading.dtype, reading.out_dtype, dtype)

    def _read_base(self, base: Any, x: Tensor) -> Reading | None:
        weight, bias = held(base, "_parameters", "weight"), held(base, "_parameters", "bias")
        if weight.requires_grad or not x.is_floating_point():
            return None
        state = _quant_state(base, weight)
        if state is None and weight.is_floating_point():
            dtype = _autocast_dtype(x) or x.dtype
            if dtype != weight.dtype and _autocast_dtype(x) is None:
                return None  # torch's own error message
            return Reading(Projection(weight, bias), None, dtype, dtype, dtype)
        if state is None:
            view = self._view(weight, _int8_scales(base), lambda scales: Int8Weight(weight.data, scales))
            return view and Reading(Projection(view, bias), None, x.dtype, x.dtype, x.dtype)
        if not base.compute_type_is_set:  # as bitsandbytes does at its first forward
            base.set_compute_type(x)
            base.compute_type_is_set = True
        dtype = base.compute_dtype or x.dtype
        view = self._view(weight, state, lambda state: Nf4Weight.from_quant_state(weight.data, state))
        return view and Reading(Projection(view, bias), None, dtype, x.dtype, dtype)

    def _view(self, weight: Tensor, made_with: Any, make: Any) -> Any:
        """The kernels' view of packed bytes, made anew where bytes or scales are others; None if it cannot be."""
        absmax = getattr(made_with, "absmax", made_with)
        key = (weight.data_ptr(), None if absmax is None else absmax.data_ptr())
        if self._packed is None or self._packed[0] != key:
            try:
                self._packed = (key, None if made_with is None else make(made_with))
            except ValueError:  # repacked for bitsandbytes' CPU kernels
                self._packed = (key, None)
        return self._packed[1]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, with or without PEFT's LoRA around it."""
    return isinstance(module, nn.Linear) or (isinstance(module, LoraLayer) and isinstance(module, nn.Module))


def held(module: Any, kind: str, name: str) -> Any:
    """An attribute of a module that is a parameter ("_parameters") or a module ("_modules") of it.

    Where torch keeps it, it is found in a fifth of the time that its `__getattr__` takes: 70 of them are read in every
    layer and forward.
    """
    kept = module.__dict__[kind]
    return kept[name] if name in kept else getattr(module, name)


def _quant_state(base: Any, weight: Any = None) -> Any:
    state = getattr(base.weight if weight is None else weight, "quant_state", None)
    return state if state is not None else getattr(base, "quant_state", None)


def _int8_scales(base: Any) -> Tensor | None:
    """bitsandbytes keeps them with the weight at first, and with the layer after its first forward."""
    scales = getattr(base.weight, "SCB", None)
    return scales if scales is not None else getattr(getattr(base, "state", None), "SCB", None)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
