"""Tiny random checkpoints of real architectures, for tests that share one base between vLLM and transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slothrl.vllm_compat import making_models
from tests.helpers import tiny_tokenizer

# Small enough for seconds, with what makes each family different: head sizes that vLLM's CPU build has kernels for,
# grouped queries, a vocabulary that is no multiple of 64, input widths that are multiples of nf4's 64.
COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "vocab_size": 1003,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},  # biases on q, k, v
    "qwen3": {"model_type": "qwen3"},  # norms on queries and keys
    "gemma2": {"model_type": "gemma2", "query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3": {"model_type": "gemma3_text", "query_pre_attn_scalar": 32, "sliding_window": 64},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},  # q, k, v (and gate, up) are one on disk already
    "smollm3": {"model_type": "smollm3"},
}


def make_checkpoint(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """Save a random model of `family` with a tokenizer; the same weights at every call. `changes`: config fields."""
    options = {**COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with making_models():  # an earlier test may have had vLLM rewrite the class
            model = AutoModelForCausalLM.from_config(config).to(dtype)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that would show if they were left out
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif "embed" in name or "lm_head" in name:
                # Peaked distributions: one wrong weight shows in the log-probs.
                parameter.data *= 10 if config.tie_word_embeddings else 25
            else:
                parameter.data *= 2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


ROWS = [[(7 * i * i + 13 * i + 5) % 1000 + 3 for i in range(n)] for n in (9, 40, 71)]
