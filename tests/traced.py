"""The peak memory of transformers' own forward and backward, traced on tensors that have sizes and no contents.

No GPU and no arithmetic: every operation's output is counted when it is made and taken off when it is freed. The linear
layers stand for bitsandbytes' and PEFT's, whose classes cannot hold such tensors; they allocate what those do.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from slothrl.activations import keep_activations


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside the block that are still alive; `peak` is their most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def ignore(self, tensor: Tensor) -> None:
        self.sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


class _Unpacked(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: the matrix is unpacked for the forward and again for the backward, and not kept."""

    @staticmethod
    def forward(ctx, x, outputs):
        ctx.shape = outputs, x.size(-1)
        return nn.functional.linear(x, torch.empty(ctx.shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore
        return torch.matmul(grad, torch.empty(ctx.shape, dtype=grad.dtype)), None


class _Quantized(nn.Module):
    """PEFT's Linear4bit: the base's output is cloned, the LoRA's is scaled and added."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.outputs = linear.out_features
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Any = _Unpacked.apply(x.to(torch.bfloat16), self.outputs)
        return result.to(x.dtype).clone() + self.lora_B(self.lora_A(x)) * 2.0


def traced_peak(
    config: Any, rows: int, length: int, checkpointing: bool, rank: int = 16, activations: str = "layer"
) -> tuple[int, int]:
    """Forward and backward of the decoder under a mask, nf4 and LoRA on every linear, autocast to bfloat16.

    Args:
        activations: what checkpointed layers keep (`slothrl.activations`).

    Returns:
        (bytes alive after the forward, the most during the backward), weights aside, the LoRA's gradients included.
    """
    with FakeTensorMode():
        decoder = _decoder(config, rank)
        if checkpointing:
            decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            decoder.enable_input_require_grads()
            keep_activations(decoder, activations)
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        counter = LiveBytes()
        for tensor in (*decoder.parameters(), *decoder.buffers(), ids):
            counter.ignore(tensor)
        counter._count(mask.untyped_storage())
        with counter:
            with torch.autocast("cpu", torch.bfloat16):
                total = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.sum()
            kept, counter.peak = counter.live, 0
            total.backward()
        return kept, counter.peak


def _decoder(config: Any, rank: int) -> Any:
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model
    decoder.requires_grad_(False)
    for path, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            decoder.set_submodule(path, _Quantized(module, rank))
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(filled, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return decoder.train()
