"""Each thing that takes memory, as a pure function of sizes: bytes, by the formula in its docstring.

Letters: n values of a matrix, h the width, m the MLP's, q = heads x head_dim, v = kv_heads x head_dim, V the
vocabulary, L layers, r the LoRA's rank, e bytes of a value in the computation (2 in bfloat16), T tokens of a
micro-batch, padding included, N tokens whose log-probs are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from slothrl.errors import UserError
from slothrl.fit_shape import Shape

LOGPROB_CHUNK = 1024  # tokens whose logits exist at once: `slothrl.logprobs.selective_logprobs`
CAPPED_TILE = 28  # bytes a logit: seven float32 or their like, traced (tests/unit/test_fit.py)
TRL_TILE = (4096, 32768)  # tokens x vocabulary entries: TRL 1.16, kernels/chunked_logprob.py and trainer/utils.py


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


# --- one micro-batch --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward goes over.

    Attributes:
        tokens: T, padding included: rows x length where rows are padded, the budget where they are packed.
        kept: N, tokens whose log-probs are taken.
        mask_cells: entries of the attention mask, rows x length x length; 0 where attention takes none.
    """

    tokens: int
    kept: int
    mask_cells: int

    @classmethod
    def padded(cls, rows: int, length: int, kept: int, masked: bool = True) -> MicroBatch:
        """`rows` sequences of `length` tokens, log-probs of the last `kept` of each."""
        return cls(rows * length, rows * kept, rows * length * length if masked else 0)


def layer_bytes(shape: Shape, batch: MicroBatch, width: int, quantized: bool) -> int:
    """What one layer keeps for its backward, its MLP's product (`product_bytes`) aside.

        norms (4h + 4)               the norms' inputs and scales, in float32
        4 (q + v)                    the same of queries and keys where those are normed
        e (2h + 2q + 2v + 3m + 7r)   what goes into q, k, v and into gate, up; queries, attention output; keys, values;
                                     gate, its activation, up; what the A matrices give
        2 e (q - v)                  with a mask attention repeats keys and values for every head
        4 heads                      attention's log-sum-exp, in float32
        e (3h + q)                   over an unquantised base, whose LoRA casts each of its inputs

    a token, and e bytes for each entry of the attention mask, which becomes an additive one.
    """
    h, q, v = shape.hidden, shape.query, shape.key_value
    per_token = shape.norms * (4 * h + 4) + width * (2 * h + 2 * q + 2 * v + 3 * shape.mlp + 7 * shape.rank)
    per_token += 4 * shape.heads
    if shape.head_norms:
        per_token += 4 * (q + v)
    if batch.mask_cells:
        per_token += 2 * width * (q - v)
    if not quantized and width < 4:
        per_token += width * (3 * h + q)
    return batch.tokens * per_token + width * batch.mask_cells


def product_bytes(shape: Shape, batch: MicroBatch, width: int) -> int:
    """The MLP's product, which goes into its last matrix: e m a token; gone when the backward is past that matrix."""
    return batch.tokens * width * shape.mlp


def backward_bytes(shape: Shape, batch: MicroBatch, width: int, quantized: bool) -> int:
    """What the backward of a layer needs beside what was kept, at its fullest: in the MLP's last matrix.

        e (2m + 2h)        the product's gradient through the matrix and through its LoRA, the gradient that comes in
                           and its scaled copy
        max(e m T, e n)    the sum of the first two, or the unpacked matrix (n = 0 where the base is not quantised)
        4 m                over an unquantised base the LoRA's input is cast to float32, and its gradient back
        2 e m              where gate and up are one matrix (Phi 3): their gradient is put together

    a token.
    """
    per_token = width * (2 * shape.mlp + 2 * shape.hidden)
    if not quantized and width < 4:
        per_token += 4 * shape.mlp
    if any(outputs >= 2 * shape.mlp for outputs, _ in shape.matrices):
        per_token += 2 * width * shape.mlp
    unpacked = width * shape.largest if quantized else 0
    return batch.tokens * per_token + max(unpacked, batch.tokens * width * shape.mlp)


def last_norm_bytes(shape: Shape, batch: MicroBatch, width: int) -> int:
    """The backward of the final norm, in float32: 5 x 4h a token, and the gradient that leaves it, e h."""
    return batch.tokens * shape.hidden * (20 + width)


def head_bytes(shape: Shape, batch: MicroBatch, width: int, trainer: str) -> int:
    """What the head takes at the end of the forward.

    GRPO: the hidden states of N tokens and their gradients, 2 e h N, and tiles of logits, e V x 1,024 tokens each: one,
    or two where there is more than one (the next is made before the last one is dropped). With capped logits plain
    torch runs over a tile, and `CAPPED_TILE` bytes a logit are alive in its backward. SFT (TRL's fused head): one tile
    of `TRL_TILE`, the hidden states, e h N, and their gradient in float32, 4 h N.
    """
    if trainer == "sft":
        rows, columns = min(batch.kept, TRL_TILE[0]), min(shape.vocabulary, TRL_TILE[1])
        return rows * columns * width + (4 + width) * shape.hidden * batch.kept
    tile = min(batch.kept, LOGPROB_CHUNK) * shape.vocabulary
    tiles = 1 if batch.kept <= LOGPROB_CHUNK else 2
    logits = tile * CAPPED_TILE if shape.softcap else tiles * tile * width
    return 2 * width * shape.hidden * batch.kept + logits


def activation_peak(
    shape: Shape, batch: MicroBatch, width: int, quantized: bool, checkpointing: bool, trainer: str
) -> int:
    """The most that forward and backward of one micro-batch hold beside weights, gradients and optimizer state.

    With checkpointing every layer keeps its input, L e h a token, and one layer at a time is computed again. The peak
    is in that layer's backward, or at the head:

        forward    L e h T + 4 h T + e h T + head + e x LoRA (autocast's copies)
        backward   L e h T + layer + backward of the last matrix

    Without it all layers keep everything, and the peak is at the head or in the final norm's backward:

        forward    L (layer + product) + e h T + head + e x LoRA
        backward   L (layer + product) + final norm's backward, or backward of the last matrix - product

    To each one byte for every entry of the attention mask.
    """
    layer, product = layer_bytes(shape, batch, width, quantized), product_bytes(shape, batch, width)
    backward, head = backward_bytes(shape, batch, width, quantized), head_bytes(shape, batch, width, trainer)
    states = batch.tokens * width * shape.hidden
    copies = width * shape.adapter if width < 4 else 0
    if checkpointing:
        kept = shape.layers * states
        peaks = [kept + 4 * batch.tokens * shape.hidden + states + head + copies, kept + layer + backward]
    else:
        kept = shape.layers * (layer + product)
        # A mask is made additive once a layer, and every layer keeps its own.
        peaks = [kept + states + head + copies, kept + copies + last_norm_bytes(shape, batch, width)]
        peaks.append(kept + copies + backward - product)
    return max(peaks) + batch.mask_cells


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
