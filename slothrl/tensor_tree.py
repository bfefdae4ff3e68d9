"""Nested Python values with tensors in them, as one .json and one .safetensors file: what pickle is mostly used for."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def save_tree(folder: Path, name: str, tree: Any) -> None:
    """Write `tree` as `name.json` and, where it holds tensors, `name.safetensors`.

    Args:
        tree: dicts (keys str or int), lists, tuples, deques, numbers, strings, None, bools, tensors, numpy arrays.

    Raises:
        TypeError: it holds something else; the message says where.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(tree, tensors, "")
    text = json.dumps(structure, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")


def load_tree(folder: Path, name: str) -> Any:
    """What `save_tree` wrote, tensors on the CPU; deques come back as lists and numpy arrays as tensors."""
    structure = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    path = folder / f"{name}.safetensors"
    return _unpack(structure, load_file(path) if path.exists() else {})


def tree_bytes(tree: Any) -> int:
    """Bytes of the tensors in `tree`."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(tree_bytes(value) for value in tree.values())
    return sum(tree_bytes(value) for value in tree) if isinstance(tree, (list, tuple, deque)) else 0


def _pack(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """JSON for `value`: plain values as they are, the rest as a dict with one key that says what it is."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        # A copy of its own: safetensors refuses tensors that share memory, as slices of one batch do.
        name = f"{len(tensors)}{where}"  # the path alone could be there twice: keys 1 and "1"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, deque)):
        return [_pack(item, tensors, f"{where}/{i}") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors, f"{where}/{i}") for i, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        # Pairs: JSON would make strings of the optimizer's integer keys.
        return {"dict": [[key, _pack(item, tensors, f"{where}/{key}")] for key, item in value.items()]}
    raise TypeError(f"{where or 'the value'} is of type {type(value).__name__}, which a checkpoint cannot hold")


def _unpack(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(structure, list):
        return [_unpack(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in content)
    return {key: _unpack(item, tensors) for key, item in content}
