"""Models of any shape with random weights, quantised to nf4 where they lie: no file, no second copy."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def random_nf4(config: PretrainedConfig, device: str = "cuda", seed: int = 0) -> Any:
    """A causal LM in bf16 whose decoder's linear layers are nf4 with double quantisation, a layer at a time.

    8B takes 6 GB and a few seconds; at no moment more than one layer is there in bf16.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    quantise(model, lambda linear: _random(linear.weight.shape, device, generator))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                norm = parameter.dim() == 1
                values = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
                values = values if norm else _random(parameter.shape, device, generator)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            made: Any = type(module)  # rotary frequencies, which no checkpoint holds
            for name, buffer in made(config=config, device=device).named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)
    model.tie_weights()
    return marked(model)


def quantise(model: nn.Module, weight_of: Any) -> None:
    """Replace every linear layer but the head by an nf4 one with the weight that `weight_of(layer)` gives."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        linear: Any = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        values = weight_of(module)
        linear.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4").to(values.device)
        linear.support_avx512bf16_for_cpu = False  # or a CPU repacks it for a kernel without a backward
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear)


def marked(model: PreTrainedModel) -> Any:
    """The model as transformers marks one that it quantised itself, for PEFT and the trainers."""
    model.is_loaded_in_4bit = True  # pyright: ignore
    return model


def _random(shape: Any, device: str, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) * 0.02
