"""Models of real shapes with random nf4 weights, made on the device in seconds; the same weights at every call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
LLAMA_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
QWEN_06B = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN_06B |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
QWEN_06B |= {"tie_word_embeddings": True, "rope_theta": 1000000.0}
TINY = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
SHAPES = {"8b": LLAMA_8B, "0.6b": QWEN_06B, "tiny": TINY}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKSIZE, INNER_BLOCKSIZE = 64, 256


def random_model(shape: str, device: str, max_length: int = 32768) -> Any:
    """A causal LM of `shape`: nf4 with double quantisation in its layers, bf16 for the rest; frozen, without LoRA."""
    options: dict[str, Any] = dict(SHAPES[shape])
    config = AutoConfig.for_model(options.pop("model_type"), **options, max_position_embeddings=max_length)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(0)
    # What a layer adds is small beside the stream, as in trained models: with a stream of ones, 2^-9 of the embeddings
    # moved the gradient's norm of 32 random layers of 8B from 0.5 to 4.7. A tied head has logits as large as that.
    stream = 1.0 if config.tie_word_embeddings else 4.0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            onto_residual = name.endswith(("o_proj", "down_proj"))
            scale = (2 * config.num_hidden_layers) ** -0.5 if onto_residual else 1.0
            model.set_submodule(name, random_linear(module.in_features, module.out_features, generator, scale))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            std = stream if isinstance(module, nn.Embedding) else 0.02
            values = values.normal_(std=std, generator=generator) if parameter.dim() > 1 else values.fill_(1.0)
            setattr(module, key, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    if config.tie_word_embeddings:
        model.model.norm.weight.fill_(0.02)  # or logits of embeddings of unit size would be as large as the width
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, buffer.to(device))  # made on the CPU: rotary frequencies
    model.is_loaded_in_4bit = True
    model.config.quantization_config = quantization()
    return model


def quantization() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def random_linear(inputs: int, outputs: int, generator: torch.Generator, scale: float = 1.0) -> nn.Module:
    """bitsandbytes' layer over random bytes: entries of a standard deviation of about 0.02 * scale, no bias."""
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
    from bitsandbytes.nn import Linear4bit, Params4bit

    device, blocks = generator.device, outputs * inputs // BLOCKSIZE
    inner = QuantState(
        absmax=torch.full((-(-blocks // INNER_BLOCKSIZE),), 0.005 * scale, device=device),
        code=create_dynamic_map().to(device),
        blocksize=INNER_BLOCKSIZE,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.randint(256, (blocks,), dtype=torch.uint8, device=device, generator=generator),
        shape=torch.Size([outputs, inputs]),
        code=get_4bit_type("nf4", device=device),
        blocksize=BLOCKSIZE,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.tensor(0.03 * scale, device=device),
        state2=inner,
    )
    packed = torch.randint(256, (outputs * inputs // 2, 1), dtype=torch.uint8, device=device, generator=generator)
    layer: Any = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    make: Any = Params4bit
    layer.weight = make(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCKSIZE,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    layer.support_avx512bf16_for_cpu = False  # or a forward on a CPU would repack the bytes in place
    return layer


def randomize_adapter(model: nn.Module) -> None:
    """A and B by name, B not zero: every gradient counts, and every arm of a comparison starts from the same.

    x A^T has x's size, and the adapters add a few per cent to what their layers give.
    """
    for index, (name, parameter) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
        generator = torch.Generator().manual_seed(index)
        scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.005
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def save_checkpoint(model: Any, folder: Path) -> None:
    """The model as a bnb-4bit checkpoint, for a peer whose public interface loads from a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.data.contiguous().cpu()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors |= {f"{name}.{key}": value.contiguous().cpu() for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    written = model.config.to_dict()
    written["quantization_config"] = quantization().to_dict()
    (folder / "config.json").write_text(json.dumps(written, default=str), encoding="utf-8")
