"""Writing safetensors shards tensor by tensor: safetensors' own writer wants a whole file's tensors in memory.

The format (https://github.com/huggingface/safetensors#format): the length of the header in 8 little-endian bytes, the
header in JSON with each tensor's dtype, shape and place, then the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SHARD_BYTES = 5_000_000_000
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(entries: Sequence[Entry], limit: int = SHARD_BYTES) -> list[list[Entry]]:
    """Cut `entries` into runs of at most `limit` bytes; a larger tensor has a shard of its own."""
    parts: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not parts or filled + entry.nbytes > limit:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += entry.nbytes
    return parts


def write_shards(
    folder: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, torch.Tensor]], limit: int = SHARD_BYTES
) -> list[Path]:
    """Write a checkpoint's weights and `model.safetensors.index.json`; at no time more than one tensor in memory.

    Args:
        entries: what will come, in the order in which it comes.
        tensors: names and tensors, on the CPU and contiguous.
        limit: of bytes a shard.
    Raises:
        ValueError: a tensor is not the one that was announced.
    """
    parts, source, paths = shards(entries, limit), iter(tensors), []
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        paths.append(folder / name)
        weight_map |= dict.fromkeys((entry.name for entry in part), name)
        _write_shard(folder / name, part, source)
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return paths


def _write_shard(path: Path, part: Sequence[Entry], source: Iterable[tuple[str, torch.Tensor]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for entry in part:
        place = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": place}
        offset += entry.nbytes
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little"))
        file.write(packed)
        for entry, (name, tensor) in zip(part, source, strict=False):
            if (name, tuple(tensor.shape), tensor.dtype) != (entry.name, entry.shape, entry.dtype):
                raise ValueError(f"announced {entry}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
