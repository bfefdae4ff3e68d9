"""What config keys may be whose values are one of a few; None: it depends on the trainer (`LOSS_TYPES`)."""

from __future__ import annotations

CHOICES = {
    "model.quantization": ("auto", "nf4", "int8", "none"),
    "model.dtype": ("auto", "bfloat16", "float16", "float32"),
    "model.embeddings": ("auto", "device", "host"),
    "model.fuse": ("auto", "on", "off"),
    "model.graphs": ("auto", "on", "off"),
    "model.activations": ("auto", "layer", "attention", "all", "offload", "both"),
    "rollout.engine": ("auto", "vllm", "transformers"),
    "rollout.share_base": ("auto", "always", "never"),
    "rollout.linear": ("auto", "slothrl", "vllm"),
    "rollout.kv_cache_dtype": ("auto", "fp8"),
    "rollout.view": ("auto", "nf4", "bf16"),
    "rollout.dtype": ("auto", "bfloat16", "float16", "float32"),
    "gpu.device": ("cpu", "cuda"),
    "reward.on_failure": ("mask", "zero", "abort"),
    "algo.trainer": ("grpo", "sft"),
    "algo.kl": ("k1", "k2", "k3"),
    "packing.mode": ("auto", "on", "off"),
    "packing.shared_prefix": ("auto", "always", "never"),
    "trainer.loss_type": None,
    "trainer.scale_rewards": ("group", "batch", "none", True, False),
    "trainer.importance_sampling_level": ("token", "sequence"),
    "trainer.vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
LOSS_TYPES = {
    "grpo": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "sft": ("nll", "chunked_nll", "dft"),
}
