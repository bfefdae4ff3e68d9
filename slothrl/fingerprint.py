"""What a run was made of, so that going on with something else is noticed: data, model, LoRA, rewards, batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import OmegaConf

from slothrl.checkpoint import digest
from slothrl.checks import set_fields
from slothrl.prepare import Prepared
from slothrl.reward_sources import parse

# Trainer fields by which a step's number becomes rows of the dataset.
ORDER = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "steps_per_generation",
    "num_iterations",
    "shuffle_dataset",
    "train_sampling_strategy",
    "packing",
    "max_length",
    "seed",
    "data_seed",
)
SAMPLES, SAMPLE_BYTES = 16, 65_536  # of each weight file


def fingerprint(prepared: Prepared, arguments: Any) -> dict[str, Any]:
    """Flat names and JSON values of all that a resumed run must share with the first part.

    Args:
        arguments: TRL's config of the run.
    """
    found: dict[str, Any] = {}
    for section, values in {
        "dataset": _dataset(prepared),
        "model": _model(prepared),
        "lora": OmegaConf.to_container(OmegaConf.structured(prepared.config.model.lora), resolve=True),
        "rewards": _rewards(prepared),
        "batches": {name: getattr(arguments, name) for name in ORDER if hasattr(arguments, name)},
    }.items():
        found.update({f"{section}.{name}": value for name, value in dict(values).items()})  # pyright: ignore
    return json.loads(json.dumps(found, default=str))


def settings(prepared: Prepared) -> dict[str, Any]:
    """The trainer fields of a run and what else makes its updates: a change of these is said and allowed."""
    config = prepared.config
    found = {f"trainer.{name}": value for name, value in set_fields(config.trainer).items()}
    for name in ("algo", "packing", "dynamic_sampling"):
        section = OmegaConf.to_container(OmegaConf.structured(getattr(config, name)), resolve=True)
        found.update({f"{name}.{key}": value for key, value in dict(section).items()})  # pyright: ignore
    return json.loads(json.dumps(found, default=str))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line "name: before -> now" for everything that is not the same in both."""
    names = list(dict.fromkeys([*before, *now]))
    return [
        f"{name}: {_short(before.get(name))} -> {_short(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text  # a sha256


def _dataset(prepared: Prepared) -> dict[str, Any]:
    columns = sorted(prepared.train.column_names)
    first = prepared.train[0] if len(prepared.train) else {}
    return {
        "rows": len(prepared.train),
        "columns": ", ".join(columns),
        "first_row": json.dumps(first, ensure_ascii=False, default=_type_name)[:100],
        "sha256": rows_digest(prepared.train),
        "held_out_rows": len(prepared.eval_rows),
        "held_out_sha256": _json_digest(prepared.eval_rows),
    }


def rows_digest(rows: Dataset) -> str:
    """The sha256 of a dataset's rows in their order, whatever files and chunks they came from."""
    total = hashlib.sha256()
    for batch in rows.iter(batch_size=1000):
        total.update(json.dumps(batch, sort_keys=True, ensure_ascii=False, default=_type_name).encode())
    return total.hexdigest()


def _json_digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=_type_name).encode()).hexdigest()


def _type_name(value: Any) -> str:
    return type(value).__name__  # an address in memory would differ in every process


def _model(prepared: Prepared) -> dict[str, Any]:
    plan, tokenizer = prepared.model, prepared.tokenizer
    words = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    words.update(str(tokenizer.chat_template).encode())
    local = Path(plan.path).is_dir()
    return {
        # A folder may be moved; what is in it may not change.
        "name": None if local else plan.path,
        "revision": plan.revision,
        "quantization": plan.quantization,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "weights": _weights_digest(Path(plan.path)) if local else None,
        "tokenizer": words.hexdigest(),
    }


def _weights_digest(folder: Path) -> str:
    """The sha256 of config.json and of samples of each weight file: gigabytes would take too long to read."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        length = path.stat().st_size
        total.update(f"{path.name} {length}".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(max(0, length - SAMPLE_BYTES) * i // (SAMPLES - 1))
                total.update(file.read(SAMPLE_BYTES))
    return total.hexdigest()


def _rewards(prepared: Prepared) -> dict[str, Any]:
    """A reward function by name, weight, parameters, and the text of its file where it was named by one."""
    found = {}
    for text, reward in zip(prepared.config.reward.functions, prepared.rewards, strict=True):
        path = parse(text).path
        known = [f"x {reward.weight:g}", json.dumps(reward.params, sort_keys=True, default=str)]
        known += [f"file {digest(path)[:12]}"] if path is not None and path.is_file() else []
        found[reward.name] = ", ".join(known)
    return found
