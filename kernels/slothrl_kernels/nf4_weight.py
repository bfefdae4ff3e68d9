"""A 4-bit weight as bitsandbytes stores it, by reference: nothing is copied or laid out anew."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NestedAbsmax:
    """The second quantisation of absmax (QLoRA, arXiv:2305.14314, section 3): absmax_i = code[q_i] * absmax_b + offset.

    code: (256,) float32. absmax: (ceil(blocks / blocksize),) float32. offset: () float32, on the weight's device.
    """

    code: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int = 256


@dataclass(frozen=True)
class Nf4Weight:
    """W of `shape`, two weights a byte, the first in the high nibble; w_i = code[nibble_i] * absmax[i // blocksize].

    packed: uint8, ceil(prod(shape) / 2) contiguous bytes in any shape.
    absmax: (ceil(prod(shape) / blocksize),) float32; uint8 where `nested` says how to expand it.
    code: (16,) float32, the NF4 code book (arXiv:2305.14314, appendix E).

    Several projections that lie one below the other in `packed` (a fused qkv or gate/up whose shards are quantised one
    by one) are ONE weight here: give the whole `packed`, the summed number of rows, and the shards' absmax in one
    contiguous float32 tensor (torch.cat once at load, the bytes stay where they are). That is exact when each shard has
    a whole number of blocks. Shards with nested absmax have an offset each, so expand theirs first.

    Raises:
        ValueError: shapes, dtypes, devices or block sizes that do not fit.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, ...]
    blocksize: int = 64
    nested: NestedAbsmax | None = None

    def __post_init__(self) -> None:
        count, nested = prod(self.shape), self.nested
        if self.blocksize not in BLOCKSIZES or (nested and nested.blocksize not in BLOCKSIZES):
            raise ValueError(f"block sizes are {BLOCKSIZES}, not {self.blocksize}, {nested and nested.blocksize}")
        blocks = -(-count // self.blocksize)
        _check("packed", self.packed, torch.uint8, -(-count // 2), self.packed.device)
        _check("absmax", self.absmax, torch.uint8 if nested else torch.float32, blocks, self.packed.device)
        _check("code", self.code, torch.float32, 16, self.packed.device)
        if nested:
            _check("nested.code", nested.code, torch.float32, 256, self.packed.device)
            _check("nested.absmax", nested.absmax, torch.float32, -(-blocks // nested.blocksize), self.packed.device)
            _check("nested.offset", nested.offset, torch.float32, 1, self.packed.device)

    @classmethod
    def from_quant_state(cls, packed: Tensor, state: Any) -> Nf4Weight:
        """From bitsandbytes' bytes (any storage dtype) and its QuantState, which is read and never imported.

        Raises:
            ValueError: another quantisation than nf4, or bytes that bitsandbytes laid out anew for its CPU kernels.
        """
        if state.quant_type != "nf4" or getattr(state, "packing_format_for_cpu", False):
            raise ValueError(f"not canonical nf4 bytes: {state.quant_type}, laid out for the CPU or not nf4")
        nested = None
        if state.nested:
            offset = torch.as_tensor(state.offset, dtype=torch.float32, device=packed.device)
            nested = NestedAbsmax(state.state2.code, state.state2.absmax, offset, state.state2.blocksize)
        return cls(packed.view(torch.uint8), state.absmax, state.code, tuple(state.shape), state.blocksize, nested)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, count: int, device: torch.device) -> None:
    fits = tensor.dtype == dtype and tensor.numel() == count and tensor.device == device and tensor.is_contiguous()
    if not fits:
        found = f"{tensor.numel()} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} must be {count} contiguous {dtype} on {device}, not {found}")
