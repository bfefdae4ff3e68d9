"""A LoRA adapter on disk: where it lies in a run, and what it adds to which weight of its base."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from slothrl.checkpoint import newest
from slothrl.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer")
_PREFIX = "base_model.model."
# What PEFT can do to a LoRA beyond W + scaling * B @ A; each would be lost, in part or whole, by merging that alone.
_NOT_PLAIN = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "biases on LoRA (lora_bias)",
    "modules_to_save": "whole modules trained beside it (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# These initialisations move part of the base into the adapter, so that the base on disk is not the one it belongs to.
_OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA of one layer.

    Attributes:
        a, b: (r, in) and (out, r).
        scaling: what B @ A is multiplied by.
        embedding: it is on an embedding, whose weight is (in, out).
        base: the weight below it, where PEFT saved that too, as it does for embeddings and output layers.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    embedding: bool
    base: torch.Tensor | None = None

    def delta(self, transposed: bool) -> torch.Tensor:
        """scaling * B @ A in float32: (out, in), or (in, out) where `transposed`."""
        product = self.b.float() @ self.a.float()
        return self.scaling * (product.T if transposed else product)


@dataclass(frozen=True)
class Adapter:
    """An adapter read from `folder`; `layers` by the base's module names ("model.layers.0.self_attn.q_proj")."""

    folder: Path
    config: Any
    layers: dict[str, LoraWeights]

    def transposed(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the base weight of layer `name`, of `shape`, is stored (in, out).

        Raises:
            UserError: the adapter's shape fits neither way.
        """
        layer = self.layers[name]
        out, inner = layer.b.shape[0], layer.a.shape[1]
        if out == inner and shape == (out, out):  # only the config can tell
            return layer.embedding or bool(self.config.fan_in_fan_out)
        if shape in ((out, inner), (inner, out)):
            return shape == (inner, out)
        raise UserError(f"the adapter's {name} is {(out, inner)} and the base's {shape}: it belongs to another model")


def find_adapter(place: Path) -> Path:
    """The adapter folder of a run folder, of a checkpoint, or `place` itself.

    Raises:
        UserError: there is none; the message says what there is instead.
    """
    if not place.is_dir():
        raise UserError(f"{place}: no such folder (name a run, a checkpoint in it, or an adapter)")
    if (place / CONFIG).is_file():
        return place
    if (place / "adapter" / CONFIG).is_file():
        return place / "adapter"
    if any((folder / "config.json").is_file() for folder in (place, place / "adapter")):
        raise UserError(f"{place} holds a whole model and no adapter: there is nothing to export from it")
    found = newest(place).found
    if found is not None and (found / CONFIG).is_file():
        return found
    raise UserError(f"{place} holds no adapter: neither {CONFIG}, nor adapter/, nor a checkpoint that verifies")


def read_config(folder: Path) -> Any:
    """The `peft.LoraConfig` of an adapter. Raises `UserError` where it is not LoRA or cannot be read."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from error
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise UserError(f"{folder} holds a {config.peft_type} adapter, and only LoRA can be merged")
    return config


def check_plain(config: Any) -> None:
    """Raise `UserError` naming what makes an adapter more than W + scaling * B @ A."""
    found = [words for field, words in _NOT_PLAIN.items() if getattr(config, field, None)]
    if getattr(config, "bias", "none") != "none":
        found.append(f"trained biases (bias={config.bias})")
    init = str(config.init_lora_weights).lower()
    if init.startswith(_OTHER_BASE):
        found.append(f"a base changed by its initialisation (init_lora_weights={config.init_lora_weights})")
    if found:
        raise UserError(f"this adapter has {', '.join(found)}: it cannot be merged here; --format peft keeps it whole")


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter that can be merged.

    Raises:
        UserError: it is of another kind, or has no safetensors.
    """
    config = read_config(folder)
    check_plain(config)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: other formats are pickles, which are not read")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if part not in _PARTS:
            raise UserError(f"{folder / WEIGHTS} holds {key}, which is no LoRA matrix: it cannot be merged here")
        pairs.setdefault(name, {})[part] = tensor
    layers = {}
    for name, pair in pairs.items():
        embedding = "lora_embedding_A" in pair
        a, b = (pair.get(f"lora_{'embedding_' if embedding else ''}{side}") for side in "AB")
        if a is None or b is None:
            raise UserError(f"{folder / WEIGHTS} lacks half of the LoRA of {name}: it is not whole")
        if a.ndim != 2 or b.ndim != 2:
            raise UserError(f"{name} is a convolution: only linear layers and embeddings can be merged")
        layers[name] = LoraWeights(a, b, scaling(config, name, a.shape[0]), embedding, pair.get("base_layer"))
    return Adapter(folder, config, layers)


def scaling(config: Any, name: str, rank: int) -> float:
    """alpha / r (Hu et al., 2021), or alpha / sqrt(r) with rsLoRA (Kalajdzievski, 2023); alpha by PEFT's patterns."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
