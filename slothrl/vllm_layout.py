"""How vLLM keeps a base model's weights: the one place that knows the attributes, by structure and not by class name.

vLLM names its modules as transformers does and fuses some of them ("qkv_proj" holds q, k and v, one below the other).
What its model declares as `packed_modules_mapping` says which; sizes, offsets and quantisation states are read off the
parameters. Whether both sides compute the same with the same bytes is for the policy probe to say.

| what | where, seen in 0.26 (GPU) and 0.31 (CPU) |
|---|---|
| 4-bit bytes | `weight.data`, uint8 (N*K/2, 1), bitsandbytes' layout; shard i from `weight.bnb_shard_offsets[i]` |
| quantisation states | `weight.bnb_quant_state`, {shard: QuantState}; double quantisation is expanded at load |
| fused rows, biases | `output_partition_sizes` |
| padded vocabulary | `org_vocab_size` marks the layer; rows beyond the real vocabulary are cut off |
| under LoRA | the layer itself is at `base_layer` |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slothrl.errors import NotShareableError


@dataclass(frozen=True)
class Held:
    """One parameter of the transformers model, as vLLM holds it.

    Attributes:
        data: a contiguous view of vLLM's memory; of 4-bit weights the packed bytes, uint8 (N*K/2, 1).
        quant_state: bitsandbytes' QuantState of a 4-bit weight, vLLM's own object; None for a plain one.
    """

    data: Tensor
    quant_state: Any = None


class WeightLayout:
    """Finds the bytes of a transformers model's parameters inside vLLM's model.

    Args:
        model: what vLLM runs, in this process.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        modules = model.named_modules(remove_duplicate=False)
        self.modules = {name: getattr(module, "base_layer", module) for name, module in modules}
        packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
        self.shards = {
            part: (fused, index)
            for fused, parts in packed.items()
            if len(parts) > 1
            for index, part in enumerate(parts)
        }

    def find(self, name: str, shape: torch.Size) -> Held:
        """Where a parameter of a transformers model lies.

        Args:
            name: "model.norm.weight".
            shape: the parameter's logical shape; (out, in) also where the weight is packed.
        Raises:
            NotShareableError: it is not there, or not in a form that transformers and bitsandbytes can read.
        """
        module, _, parameter = name.rpartition(".")
        layer, shard = self._layer(module)
        if layer is None:
            raise NotShareableError(f"{module} has no counterpart in vLLM's {type(self.model).__name__}")
        weight = getattr(layer, parameter, None)
        if not isinstance(weight, Tensor) or weight.numel() == 0:
            raise NotShareableError(f"vLLM keeps {name} in another form ({type(layer).__name__} repacked it)")
        if getattr(weight, "bnb_quant_state", None) is not None:
            held = _packed(name, weight, shard)
        else:
            # Not `weight` itself: vLLM's parameter classes answer for their dtype and carry loaders along.
            held = Held(_rows(layer, weight.data, shard, shape))
        found = held.data.shape if held.quant_state is None else torch.Size(held.quant_state.shape)
        if found != shape:
            raise NotShareableError(f"{name} is {tuple(found)} in vLLM and {tuple(shape)} in transformers")
        if held.quant_state is None and not held.data.is_floating_point():
            raise NotShareableError(f"{name} is {held.data.dtype} in vLLM: only nf4, fp4 and plain weights are shared")
        return held

    def _layer(self, module: str) -> tuple[nn.Module | None, int | None]:
        """vLLM's module for a transformers module, and which shard of it where it is fused."""
        parent, _, leaf = module.rpartition(".")
        if module in self.modules or leaf not in self.shards:
            return self.modules.get(module), None
        fused, shard = self.shards[leaf]
        return self.modules.get(f"{parent}.{fused}"), shard


def base_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor that makes up vLLM's base: parameters, each memory once, and the scales of packed ones."""
    found: dict[int, Tensor] = {}
    for parameter in model.parameters():
        found.setdefault(parameter.data_ptr(), parameter.data)
        for state in (getattr(parameter, "bnb_quant_state", None) or {}).values():
            if isinstance(state, Tensor):  # the row scales of an int8 checkpoint
                found.setdefault(state.data_ptr(), state)
                continue
            for tensor in (state.absmax, state.code):
                found.setdefault(tensor.data_ptr(), tensor)
    return [tensor for tensor in found.values() if tensor.numel()]


def _packed(name: str, weight: Tensor, shard: int | None) -> Held:
    """The bytes and the state of one projection; a projection that is fused on disk has one shard in all."""
    states, offsets = weight.bnb_quant_state, weight.bnb_shard_offsets  # pyright: ignore
    if shard is None and len(states) != 1:
        raise NotShareableError(f"{name} is in {len(states)} pieces in vLLM")
    index = shard or 0
    state = states.get(index)
    if getattr(state, "quant_type", None) not in ("nf4", "fp4"):
        raise NotShareableError(f"{name} is int8 in vLLM: only nf4, fp4 and plain weights are shared")
    return Held(weight.data[int(offsets[index]) : int(offsets[index + 1])], state)


def _rows(layer: nn.Module, data: Tensor, shard: int | None, shape: torch.Size) -> Tensor:
    """The rows of a plain parameter that are this projection's, or this vocabulary's."""
    if shard is not None:
        sizes = list(layer.output_partition_sizes)  # pyright: ignore
        start = sum(sizes[:shard])
        return data[start : start + sizes[shard]]
    if hasattr(layer, "org_vocab_size") and data.shape[0] > shape[0]:
        return data[: shape[0]]
    return data
