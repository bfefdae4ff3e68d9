"""Models of real shapes for memory measurements: random nf4 weights made on the device, no checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

# As published on the hub.
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen2.5-3B": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Gemma-2-2B": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
    "Llama-3-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}


# What turns any of them into a model of kilobytes, to try code with.
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16}
# A model that each gpu preset is for.
PRESETS = {
    "8gb": "Qwen2.5-1.5B",
    "12gb": "Qwen2.5-3B",
    "16gb": "Llama-3-8B",
    "24gb": "Llama-3-8B",
    "80gb": "Llama-3-8B",
}


def config_of(name: str, **changes: Any) -> Any:
    """The transformers config of a shape in `CONFIGS`; its positions reach 131,072. `changes`: other fields."""
    options = {**CONFIGS[name], **changes}
    kind = options.pop("model_type")
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(kind, **options, **ends, max_position_embeddings=131072, dtype="bfloat16")


def random_nf4(config: Any, device: str = "cuda") -> Any:
    """A model on the device: every linear but the head doubly quantised nf4, the rest bf16, as `load_model` would make
    it of a checkpoint."""
    from slothrl.models import quantization_config

    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for path, linear in linears.items():
        model.set_submodule(path, _nf4(linear, device))
    _fill(model, device)
    if config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    model.requires_grad_(False)
    # What `from_pretrained` says of a quantised model, which PEFT and the trainers look at.
    model.is_loaded_in_4bit = True
    if device == "cuda":
        model.hf_device_map = {"": 0}
    model.config.quantization_config = quantization_config("nf4", torch.bfloat16)
    return model


def _nf4(linear: nn.Linear, device: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    bias = linear.bias is not None
    made: Any = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        device="meta",
    )
    values = torch.randn(linear.out_features, linear.in_features, dtype=torch.bfloat16, device=device) * 0.02
    weight: Any = Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made)
    made.weight = weight.to(device)  # quantises
    made.quant_state = made.weight.quant_state
    if bias:
        made.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.bfloat16, device=device), False)
    made.support_avx512bf16_for_cpu = False  # on a CPU a forward without gradients would repack the bytes
    return made


def _fill(model: nn.Module, device: str) -> None:
    """Random values for what is still on the meta device; buffers move to the device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                shape = parameter.shape
                values = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
                filled = values if len(shape) > 1 else torch.ones_like(values)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
