"""The block scales of a checkpoint that is quantised by bitsandbytes itself, read as bitsandbytes reads them.

vLLM's loader (seen in 0.26, and in vllm-bnb-plugin 0.0.3) expands double quantisation while torch's default dtype is
bf16, and so rounds the offset of all scales to 8 bits: every weight is off by up to 0.2 %. Both sides would agree, but
on another model than the one in the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from slothrl.errors import NotShareableError


@torch.no_grad()
def restore_scales(model: nn.Module, path: str, revision: str | None = None) -> int:
    """Write the exact scales into the quantisation states of a shared model, in place, for both sides.

    Args:
        model: its 4-bit layers share their `absmax` with vLLM.
        path: folder or hub name of the checkpoint; only scales are read.
    Returns:
        How many layers there were to correct; 0 for a checkpoint that is not doubly quantised.
    Raises:
        NotShareableError: the checkpoint is doubly quantised and names a layer otherwise than the model does.
    """
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    files = _tensor_files(path, revision)
    if not any(name.endswith(".nested_absmax") for name in files):
        return 0
    packed: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"]
    layers = {f"{name}.weight": module.weight.quant_state for name, module in packed}
    for name, state in layers.items():
        found = {key: file for key, file in files.items() if key.startswith(f"{name}.")}
        if f"{name}.nested_absmax" not in found:
            raise NotShareableError(f"the checkpoint has no scales for {name}")
        tensors = {}
        for key, file in found.items():
            with safe_open(file, "pt") as opened:
                tensors[key] = opened.get_tensor(key)
        exact: Any = QuantState.from_dict(tensors, device=state.absmax.device)
        scales = dequantize_blockwise(exact.absmax, exact.state2) + exact.offset
        state.absmax.copy_(scales.view_as(state.absmax))
    return len(layers)


def _tensor_files(path: str, revision: str | None) -> dict[str, str]:
    """Which safetensors file holds which tensor."""

    def find(name: str) -> str | None:
        return cached_file(
            path, name, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )

    index = find("model.safetensors.index.json")
    if index is not None:
        places = json.loads(Path(index).read_text())["weight_map"]
        folder = Path(index).parent
        return {name: str(folder / file) for name, file in places.items()}
    single = find("model.safetensors")
    if single is None:
        return {}
    with safe_open(single, "pt") as opened:
        return dict.fromkeys(opened.keys(), single)
