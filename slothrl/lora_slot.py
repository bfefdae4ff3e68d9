"""The trainer's LoRA inside a running vLLM: one adapter, rewritten in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slothrl.errors import UserError
from slothrl.vllm_compat import adapter_in_place, lora_buffers, model_of, register_adapter
from slothrl.vllm_linear import layer_loras


@dataclass(frozen=True)
class LoraShape:
    """What vLLM must know of an adapter before it starts.

    Attributes:
        rank: the largest of any projection.
        targets: names of the adapted projections, without their paths ("q_proj").
    """

    rank: int
    targets: Sequence[str]


def lora_layers(model) -> dict[str, Any]:
    """PEFT's LoRA layers by the base model's own module names ("model.layers.0.self_attn.q_proj")."""
    base = model.get_base_model()
    return {name: m for name, m in base.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


def lora_shape(model) -> LoraShape:
    """The shape of a PEFT model's "default" adapter; its weights may be on the meta device."""
    layers = lora_layers(model)
    if not layers:
        raise UserError("the model has no LoRA on any linear layer: model.lora.target_modules names none that it has")
    return LoraShape(
        rank=max(layer.r["default"] for layer in layers.values()),
        targets=sorted({name.rsplit(".", 1)[-1] for name in layers}),
    )


def check_adapter(config) -> None:
    """Raise `UserError` with the reason where an adapter of this `peft.LoraConfig` cannot be pushed into vLLM."""
    for unsupported, value in {
        "use_dora": getattr(config, "use_dora", False),
        "bias": getattr(config, "bias", "none") != "none",
        "modules_to_save": getattr(config, "modules_to_save", None),
        "lora_bias": getattr(config, "lora_bias", False),
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
    }.items():
        if value:
            raise UserError(f"LoRA with {unsupported} cannot reach vLLM: turn it off or use rollout=transformers")


@dataclass(frozen=True)
class Buffer:
    """One projection: the views inside vLLM's buffers and the trainer's parameters that fill them."""

    name: str
    a_into: torch.Tensor  # (r, in)
    a_from: torch.Tensor  # (r, in)
    b_into: torch.Tensor  # (out, r)
    b_from: torch.Tensor  # (out, r)
    scaling: float


class LoraSlot:
    """Our adapter inside a running vLLM: registered once, then rewritten in place (CUDA graphs keep its pointers).

    Args:
        llm: a `vllm.LLM` in this process, started with LoRA for the adapter's rank and target modules.
        model: the PEFT model whose "default" adapter is mirrored.
    Raises:
        UserError: a projection of the adapter has no counterpart in vLLM, or the adapter is of an unsupported kind.
    """

    def __init__(self, llm, model):
        config = model.peft_config["default"]
        check_adapter(config)
        self.llm, self.layers = llm, lora_layers(model)
        own = layer_loras(model_of(llm))
        self.index = None if own else self._register(lora_shape(model), config.lora_alpha)
        self.buffers = list(self._own_buffers(own) if own else self._stacked_buffers(self.index))
        reached = {buffer.name for buffer in self.buffers}
        if len(reached) != len(self.layers):
            missing = sorted(set(self.layers) - reached)[0]
            raise UserError(
                f"vLLM takes LoRA on {len(reached)} of this model's {len(self.layers)} adapted projections, not on"
                f" {missing}"
            )

    def _register(self, shape: LoraShape, alpha: float) -> int:
        """Make the adapter one of vLLM's own; which row of its stacked buffers is ours."""
        tensors = {
            f"base_model.model.{name}.lora_{which}.weight": getattr(layer, f"lora_{which}")["default"].weight
            for name, layer in self.layers.items()
            for which in "AB"
        }
        register_adapter(self.llm, tensors, shape.rank, alpha, shape.targets)
        return adapter_in_place(self.llm)

    def _stacked_buffers(self, index) -> Iterable[Buffer]:
        for name, (a_into, b_into) in lora_buffers(self.llm, index).items():
            if name in self.layers:
                yield self._buffer(name, a_into, b_into)

    def _own_buffers(self, own) -> Iterable[Buffer]:
        for name, pieces in own.items():
            for a_into, b_into, rows in pieces if name in self.layers else ():
                yield self._buffer(name, a_into, b_into, rows)

    def _buffer(self, name: str, a_into: torch.Tensor, b_into: torch.Tensor, rows: slice | None = None) -> Buffer:
        layer = self.layers[name]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if rows is not None and rows != slice(0, len(b)):
            b = b.detach()[rows]
        scaling = float(layer.scaling["default"])
        return Buffer(name, a_into[: a.shape[0], : a.shape[1]], a, b_into[: b.shape[0], : b.shape[1]], b, scaling)

    @torch.inference_mode()
    def push(self) -> None:
        """Copy A and scaling * B of every projection into vLLM's buffers; raises if vLLM moved the adapter."""
        if self.index is not None:
            adapter_in_place(self.llm, self.index)
        buffers = self.buffers
        torch._foreach_copy_([b.a_into for b in buffers], [b.a_from for b in buffers])
        scaled = torch._foreach_mul([b.b_from for b in buffers], [b.scaling for b in buffers])
        torch._foreach_copy_([b.b_into for b in buffers], scaled)
