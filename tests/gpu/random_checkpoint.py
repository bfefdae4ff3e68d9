"""Checkpoints of real shapes with random weights: what speed and memory need."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import tiny_tokenizer

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def write_random(folder: Path) -> None:
    """A checkpoint of Llama-3-8B's shape, 16 GB in bf16, made on the GPU a layer at a time."""
    config = AutoConfig.for_model("llama", **LLAMA_3_8B, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(parts[2] if "layers" in parts else name, []).append(name)
    index = {}
    for number, names in enumerate(groups.values()):
        file = f"model-{number:05}.safetensors"
        tensors = {}
        for name in names:
            values = torch.randn(shapes[name], device="cuda", dtype=torch.bfloat16)
            tensors[name] = (values * 0.02 if values.ndim > 1 else values * 0.1 + 1).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
