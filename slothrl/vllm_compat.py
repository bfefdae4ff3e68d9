"""Everything that depends on vLLM's version or internals, each with its bound and the test that covers it.

Features are probed, versions not compared. Nothing here changes vLLM: it reads its objects and writes into the LoRA
buffers that vLLM made for an adapter of ours.

| piece | seen working with | upstream | test in tests/integration/test_vllm_engine.py |
|---|---|---|---|
| in-process engine, `ENVIRONMENT` | 0.26, 0.31 | documented variables | all of them |
| adapter registered from tensors | 0.26, 0.31 | no public tensor path | `test_lora_reaches_vllm` |
| stacked LoRA buffers written in place | 0.26, 0.31 | no public tensor path | `test_push_in_place` |
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from slothrl.errors import UserError

# vLLM's own variables; the first keeps the engine in this process, where its LoRA buffers can be reached. A value that
# the user has set is left alone.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at first use, which needs a CUDA toolkit
}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's LoRA kernels take as max_lora_rank
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ADAPTER_ID = 1


def import_vllm() -> ModuleType:
    """vLLM, with the variables of `ENVIRONMENT` set before its first import."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import vllm
    import vllm.platforms

    return vllm


def max_lora_rank(rank: int) -> int:
    """The smallest rank of `RANKS` that holds `rank`. Raises `UserError` above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(
        f"model.lora.r={rank}: vLLM takes LoRA ranks up to {RANKS[-1]}; lower it or use rollout=transformers"
    )


def lora_layers(model) -> dict[str, Any]:
    """PEFT's LoRA layers by the base model's own module names ("model.layers.0.self_attn.q_proj")."""
    base = model.get_base_model()
    return {name: m for name, m in base.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}


def check_adapter(model) -> None:
    """Raise `UserError` with the reason where an adapter cannot be pushed into vLLM's buffers."""
    config = model.peft_config["default"]
    for unsupported, value in {
        "use_dora": getattr(config, "use_dora", False),
        "bias": getattr(config, "bias", "none") != "none",
        "modules_to_save": getattr(config, "modules_to_save", None),
    }.items():
        if value:
            raise UserError(f"LoRA with {unsupported} cannot reach vLLM: turn it off or use rollout=transformers")


@dataclass(frozen=True)
class Buffer:
    """One projection: the views inside vLLM's stacked buffers and the trainer's parameters that fill them."""

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
        check_adapter(model)
        self.layers = lora_layers(model)
        self.llm = llm
        self.manager = llm.apply_model(lambda module: module)[0].lora_manager
        self._register(model)
        self.index = self.manager.lora_index_to_id.index(ADAPTER_ID)
        self.buffers = list(self._buffers())
        if len(self.buffers) != len(self.layers):
            raise UserError(
                f"vLLM takes LoRA on {len(self.buffers)} of this model's {len(self.layers)} adapted projections"
            )

    def _register(self, model) -> None:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        config = model.peft_config["default"]
        any_layer = next(iter(self.layers.values()))
        targets = sorted({name.rsplit(".", 1)[-1] for name in self.layers})
        helper = PEFTHelper.from_dict(
            {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": targets, "use_rslora": config.use_rslora}
        )
        tensors = {
            # Clones: vLLM multiplies B by the scaling in place.
            f"base_model.model.{name}.lora_{which}.weight": getattr(layer, f"lora_{which}")["default"]
            .weight.detach()
            .clone()
            for name, layer in self.layers.items()
            for which in "AB"
        }
        device = any_layer.lora_A["default"].weight.device
        dtype = self.llm.llm_engine.vllm_config.model_config.dtype
        adapter = LoRAModel.from_lora_tensors(ADAPTER_ID, tensors, helper, device=str(device), dtype=dtype)
        self.manager.add_adapter(adapter)
        self.manager.activate_adapter(ADAPTER_ID)
        self.manager.pin_adapter(ADAPTER_ID)

    def _buffers(self) -> Iterable[Buffer]:
        for name, module in self.manager.modules.items():
            parent, _, leaf = name.rpartition(".")
            for i, part in enumerate(PACKED.get(leaf, (leaf,))):
                layer = self.layers.get(f"{parent}.{part}")
                if layer is None:
                    continue
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                yield Buffer(
                    module.lora_a_stacked[i][self.index, 0, : a.shape[0], : a.shape[1]],
                    a,
                    module.lora_b_stacked[i][self.index, 0, : b.shape[0], : b.shape[1]],
                    b,
                    float(layer.scaling["default"]),
                )

    @torch.inference_mode()
    def push(self) -> None:
        """Copy A and scaling * B of every projection into vLLM's buffers; raises if vLLM moved the adapter."""
        if self.manager.lora_index_to_id[self.index] != ADAPTER_ID:
            raise RuntimeError("vLLM moved the adapter out of its slot")
        torch._foreach_copy_([b.a_into for b in self.buffers], [b.a_from.detach() for b in self.buffers])
        scaled = torch._foreach_mul([b.b_from.detach() for b in self.buffers], [b.scaling for b in self.buffers])
        torch._foreach_copy_([b.b_into for b in self.buffers], scaled)
