"""The weights of a base checkpoint, read from its safetensors one tensor at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from slothrl.embedded import EMBEDDED, embedded_folder
from slothrl.errors import UserError
from slothrl.safetensors_shards import DTYPES

# What a merge reads of a hub repository; never a pickle.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
NOT_NEEDED = ["original/*", "onnx/*", "consolidated*"]
# What bitsandbytes stores beside a packed 4-bit weight.
_STATE = re.compile(r"(.+\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")


def embedded_name(path: str) -> str | None:
    """The embedded model that `path` names, or whose conversion it is, on this machine or another; else None."""
    if path in EMBEDDED:
        return path
    last = Path(path).name
    return next((name for name, model in EMBEDDED.items() if last.startswith(f"{name}-{model.sha256[:12]}")), None)


def base_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a base checkpoint: a folder as it is, an embedded model converted, a hub model downloaded.

    Raises:
        UserError: there is none of that name.
    """
    if Path(name).is_dir():
        return Path(name)
    embedded = embedded_name(name)
    if embedded is not None:
        return embedded_folder(embedded)
    if Path(name).is_absolute() or name.startswith("."):
        raise UserError(f"the adapter's base {name} is not on this machine: name another place for it with --base")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=NOT_NEEDED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the base {name} could not be had ({reason}): name another place with --base") from error


class BaseWeights:
    """A checkpoint folder as named tensors, of which only the one asked for is in memory.

    4-bit weights of bitsandbytes are unpacked to float32 when they are read.

    Raises:
        UserError: the folder has no safetensors, or is quantised otherwise.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(f"the base {folder} has no config.json: name its checkpoint with --base")
        self.config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self._files = self._places()
        self._states: dict[str, list[str]] = {}
        for key in self._files:
            if match := _STATE.fullmatch(key):
                self._states.setdefault(match[1], []).append(key)
        self._check_quantization()
        packed = {key for keys in self._states.values() for key in keys}
        self.names = [name for name in self._files if name not in packed]

    @property
    def quantized(self) -> bool:
        """Whether the checkpoint itself holds 4-bit weights, so that there are no better ones to merge into."""
        return bool(self._states)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the unpacked tensor; reads no weights."""
        if name in self._states:
            return tuple(self._quant_state(name)["shape"])
        with safe_open(self._files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """As `tensor` returns it."""
        if name in self._states:
            return torch.float32
        with safe_open(self._files[name], "pt") as file:
            stored = file.get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise UserError(
                f"the base's {name} is stored as {stored}, which cannot be merged: name another with --base"
            )
        return DTYPES[stored]

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored; float32 where it was packed."""
        if name in self._states:
            return self._unpacked(name)
        # Opened anew each time: the pages of a closed file leave the process's memory.
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name).clone()

    def _places(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise UserError(f"the base {self.folder} has no model.safetensors: pickled weights are not read")
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)

    def _check_quantization(self) -> None:
        found = self.config.get("quantization_config")
        if found and not (found.get("quant_method", "bitsandbytes") == "bitsandbytes" and found.get("load_in_4bit")):
            method = found.get("quant_method") or "an unknown method"
            raise UserError(
                f"the base {self.folder} is quantised by {method}, of which only bitsandbytes 4-bit can be unpacked:"
                " name the original checkpoint with --base"
            )

    def _quant_state(self, name: str) -> dict[str, Any]:
        key = next(key for key in self._states[name] if ".quant_state." in key)
        with safe_open(self._files[key], "pt") as file:
            return json.loads(bytes(file.get_tensor(key).tolist()))

    def _unpacked(self, name: str) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        tensors = {}
        for key in [name, *self._states[name]]:
            with safe_open(self._files[key], "pt") as file:
                tensors[key] = file.get_tensor(key)
        packed = tensors.pop(name)
        state: Any = QuantState.from_dict(tensors, device=torch.device("cpu"))
        state.dtype = torch.float32  # it would round to the dtype that the model was quantised in
        return dequantize_4bit(packed, state)
