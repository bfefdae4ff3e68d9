"""How llama.cpp lays out the llama family in a GGUF file: architectures, metadata, tensor names and the order of rows.

The convention is llama.cpp's converter's (convert_hf_to_gguf.py); the names come from the gguf library.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, TensorNameMap, get_tensor_name_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slothrl.errors import UserError

# Mistral is a Llama to llama.cpp.
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
ROPE_FACTORS = "rope_freqs.weight"


def check_architecture(config: Any) -> MODEL_ARCH:
    """The GGUF architecture of a transformers config.

    Raises:
        UserError: it is not covered, or it has something that llama.cpp's version of it lacks.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"GGUF export does not cover {kind} (it does {', '.join(ARCHITECTURES)}): use --format merged and"
            " llama.cpp's own convert_hf_to_gguf.py"
        )
    if config.hidden_act != "silu":
        raise UserError(f"llama.cpp's {kind} has silu activations, this base {config.hidden_act}: no GGUF of it")
    rope = rope_kind(config)
    if rope not in ("default", "linear", "llama3"):
        raise UserError(f"GGUF export does not cover rope_type {rope} (it does default, linear, llama3)")
    return ARCHITECTURES[kind]


def rope_kind(config: Any) -> str:
    return (config.rope_parameters or {}).get("rope_type", "default")


def window_note(config: Any) -> str | None:
    """What to tell about sliding-window attention, which llama.cpp does not do for these architectures."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return None
    return f"the base attends to the last {window} tokens and llama.cpp to all: they agree up to {window} tokens"


def add_metadata(writer: GGUFWriter, config: Any, title: str) -> None:
    """Shapes, RoPE and norms of the model, under llama.cpp's keys."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_name(title)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope_kind(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any) -> torch.Tensor | None:
    """What Llama 3.1's RoPE divides each frequency by, (head_dim / 2,) float32; None for another RoPE."""
    if rope_kind(config) != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    theta, pairs = config.rope_parameters["rope_theta"], scaled.shape[0]
    plain = torch.exp(-math.log(theta) * torch.arange(pairs, dtype=torch.float64) / pairs)
    return (plain / scaled.double()).float()


def name_map(architecture: MODEL_ARCH, config: Any) -> TensorNameMap:
    return get_tensor_name_map(architecture, config.num_hidden_layers)


def gguf_name(names: TensorNameMap, name: str) -> str:
    """The GGUF name of a checkpoint's tensor. Raises `UserError` where the architecture has no such tensor."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"the base has {name}, which has no place in a GGUF of this architecture")
    return found


def reorder(tensor: torch.Tensor, name: str, architecture: MODEL_ARCH, config: Any) -> torch.Tensor:
    """The rows of q and k as llama.cpp wants them for the llama architecture.

    transformers rotates dimension i of a head together with i + head_dim / 2, llama.cpp's "norm" RoPE 2i with 2i + 1.
    Its other architectures here rotate as transformers does ("neox").

    Args:
        tensor: a weight (out, in) or a bias (out,).
        name: of the tensor in the checkpoint.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    module = name.split(".")[-2]
    if architecture is not MODEL_ARCH.LLAMA or module not in heads:
        return tensor
    halves = tensor.unflatten(0, (heads[module] or config.num_attention_heads, 2, -1))  # (heads, 2, head_dim / 2, …)
    return halves.transpose(1, 2).flatten(0, 2).contiguous()
