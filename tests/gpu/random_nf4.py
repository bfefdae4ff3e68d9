"""vLLM with random nf4 weights of a real shape, made where they lie in seconds: no checkpoint, no quantising."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from tests.helpers import tiny_tokenizer

COMMON = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "3b": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {  # for a rehearsal on a CPU
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_config(shape: str, folder: Path) -> Path:
    """A folder with the config and a tokenizer, but no weights."""
    options = {**COMMON, **SHAPES[shape]}
    kind = options.pop("model_type")
    AutoConfig.for_model(kind, **options, dtype="bfloat16", architectures=[ARCHITECTURES[kind]]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def register_random_loader(name: str = "random_weights") -> str:
    """Register a load format with vLLM, through its public registry; returns its name."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # once a process; one of them may have a loader of the same name, and must not come later

    class RandomLoader(BaseModelLoader):
        def download_model(self, model_config):
            pass

        def load_weights(self, model, model_config):
            torch.manual_seed(0)
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if is_packed(parameter):
                        fill_packed(parameter, module)
                    elif parameter.data.is_floating_point():
                        one = 1.0 if parameter.ndim == 1 and name == "weight" else 0.0
                        parameter.data.normal_(one, 0.02)

    register_model_loader(name)(RandomLoader)
    return name


def is_packed(parameter: Any) -> bool:
    """Whether a parameter is nf4: marked by vLLM up to 0.27, of a class of its own in the plugin for later versions."""
    return getattr(parameter, "use_bitsandbytes_4bit", type(parameter).__name__ == "BitsAndBytes4bitParameter")


def fill_packed(parameter: Any, module: Any) -> None:
    """Random codes and one scale, a state for each shard, as vLLM's loader for bitsandbytes leaves them."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    parameter.data.random_(0, 256)
    inputs = parameter.numel() * 2 // sum(module.output_partition_sizes)
    code = get_4bit_type("nf4", device=parameter.data.device).float()
    states, offsets = {}, [0]
    for i, rows in enumerate(module.output_partition_sizes):
        shape = torch.Size((rows, inputs))
        absmax = torch.full((prod(shape) // 64,), 0.05, device=parameter.data.device, dtype=torch.float32)
        states[i] = QuantState(absmax, shape, code, blocksize=64, quant_type="nf4", dtype=torch.bfloat16)
        offsets.append(offsets[-1] + prod(shape) // 2)
    parameter.bnb_quant_state, parameter.bnb_shard_offsets = states, torch.tensor(offsets)
