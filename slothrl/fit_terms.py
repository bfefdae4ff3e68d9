"""Each thing that takes memory, as a pure function of sizes: bytes, by the formula in its docstring.

Letters: n values of a matrix, h the width, m the MLP's, v = kv_heads x head_dim, V the vocabulary, L layers, r the
LoRA's rank, e bytes of a value in the computation (2 in bfloat16). What an update holds: `slothrl.fit_activations`.
"""

from __future__ import annotations

from math import ceil

from slothrl.errors import UserError
from slothrl.fit_shape import Shape

# --- what is there all the time ---------------------------------------------------------------------------------------


def nf4_bytes(values: int, double: bool) -> int:
    """A 4-bit matrix: half a byte a value, its scales, and the code book of 16 float32.

    Scales are one absmax a block of 64 (QLoRA, Dettmers et al., 2023, section 3): 4 bytes each, or, doubly quantised,
    one byte each with a float32 a block of 256 of them, a code book of 256 float32 and an offset. vLLM keeps the
    expanded form, transformers the double one.
    """
    blocks = ceil(values / 64)
    scales = blocks + 4 * ceil(blocks / 256) + 4 * 256 + 4 if double else 4 * blocks
    return ceil(values / 2) + scales + 16 * 4


def base_bytes(shape: Shape, quantization: str, width: int, double: bool = True) -> int:
    """The base: every matrix packed by `quantization`, everything else at `width` bytes a value.

    int8: one byte a value and a float32 a row (LLM.int8, Dettmers et al., 2022). Tied embeddings count once.
    """
    plain = width * (shape.embedding + shape.head + shape.rest)
    if quantization == "none":
        return plain + width * shape.packed
    if quantization == "int8":
        return plain + sum(outputs * inputs + 4 * outputs for outputs, inputs in shape.matrices)
    return plain + sum(nf4_bytes(outputs * inputs, double) for outputs, inputs in shape.matrices)


def adapter_bytes(shape: Shape) -> int:
    """The LoRA in the trainer, float32: 4 bytes a value. Its gradients take the same."""
    return 4 * shape.adapter


# Bytes of optimizer state a trained value: AdamW keeps two moments; 8-bit ones have a float32 scale a block of 256.
OPTIMIZERS = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "adamw_bnb_8bit": 2 + 8 / 256,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 2 + 8 / 256,
    "paged_adamw_32bit": 8.0,
    "lion_32bit": 4.0,
    "lion_8bit": 1 + 4 / 256,
    "rmsprop": 4.0,
    "adagrad": 4.0,
    "sgd": 0.0,
}


def optimizer_bytes(shape: Shape, name: str) -> int:
    """State of the optimizer: `OPTIMIZERS` bytes a LoRA value, and 4 a tensor for AdamW's step counter.

    bitsandbytes keeps tensors of fewer than 4,096 values in 32 bits; that is left out. An optimizer that is not in
    the table counts as AdamW.
    """
    return int(OPTIMIZERS.get(name, 8.0) * shape.adapter) + 4 * shape.adapter_tensors


def vllm_adapter_bytes(shape: Shape, rank: int, width: int) -> int:
    """vLLM's LoRA buffers, one slot at its maximal rank: width x rank x (inputs + outputs) of every matrix."""
    return width * rank * sum(outputs + inputs for outputs, inputs in shape.matrices)


def cache_bytes_per_token(shape: Shape, width: int) -> int:
    """Keys and values of one token: 2 L v e."""
    return 2 * shape.layers * shape.key_value * width


# --- generation ------------------------------------------------------------------------------------------------------


def generate_bytes(shape: Shape, rows: int, context: int, width: int) -> int:
    """transformers' generate: the cache of `rows` sequences of `context` tokens, and the last position's logits.

    rows x (context x 2 L v e + V (e + 3 x 4)): logits, their float32 copy, and the sampler's two of the same size.
    """
    return rows * (context * cache_bytes_per_token(shape, width) + shape.vocabulary * (width + 12))


def vllm_prefill_bytes(shape: Shape, rows: int, tokens: int, width: int) -> int:
    """What vLLM sets aside for its largest step: e (4h + 3m) a token, the largest matrix unpacked, 8 V a sequence."""
    per_token = width * (4 * shape.hidden + 3 * shape.mlp)
    return tokens * per_token + width * shape.largest + 8 * shape.vocabulary * rows


def allowed_rank(rank: int) -> int:
    """vLLM's maximal rank for an adapter of `rank`; what is above its largest counts as it is."""
    from slothrl.vllm_compat import max_lora_rank

    try:
        return max_lora_rank(rank)
    except UserError:
        return rank
