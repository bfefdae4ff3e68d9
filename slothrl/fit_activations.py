"""What forward and backward of one micro-batch hold, as pure functions of sizes: bytes, by formulas in docstrings.

Letters as in `slothrl.fit_terms`: h the width, m the MLP's, q = heads x head_dim, v = kv_heads x head_dim, V the
vocabulary, L layers, r the LoRA's rank, e bytes of a value, T tokens of the micro-batch, padding included, N tokens
whose log-probs are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slothrl_kernels.layer_mlp import TILE, columns_of

from slothrl.fit_shape import Shape
from slothrl.token_bytes import logit_rows


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


@dataclass(frozen=True)
class Route:
    """By which code forward and backward run.

    Attributes:
        width: e, bytes of a value in the computation.
        quantized: the base's matrices are packed, and unpacked one at a time.
        checkpointing: layers are computed again in the backward.
        fused: through the layers of `slothrl.fuse`.
        offload: checkpointed layers' inputs wait in the host's memory.
        whole: checkpointed layers that keep all of it (`slothrl.kept_attention`), the last ones.
        attending: those before them that keep their attention too.
        tile: bytes of gate and up that a fused MLP works on at a time (`slothrl_kernels.layer_mlp`).
    """

    width: int = 2
    quantized: bool = True
    checkpointing: bool = True
    fused: bool = False
    offload: bool = False
    whole: int = 0
    attending: int = 0
    tile: int = TILE


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


def head_bytes(shape: Shape, batch: MicroBatch, width: int) -> int:
    """What the head takes at the end of the forward, GRPO's and SFT's: the hidden states of N tokens and their
    gradients, 2 e h N, and one tile of logits, e V x 512 to 1,024 tokens (`slothrl.token_bytes.logit_rows`)."""
    tile = min(batch.kept, logit_rows(shape.vocabulary, width)) * shape.vocabulary
    return width * (2 * shape.hidden * batch.kept + tile)


def fused_layer_bytes(shape: Shape, batch: MicroBatch, width: int) -> int:
    """What a fused layer keeps for its backward, its MLP aside (`slothrl.fuse`, `lora_linear`, `rms_norm`).

        e (3h + 2q + 2v)   the sum after attention; what goes into q, k, v and into the MLP; queries, attention output;
                           keys, values: norms keep no float32, and the LoRA's inputs are the layers' own
        8 + 4 heads        a scale for each norm and attention's log-sum-exp, in float32
        e 4r               what the A matrices of q, k, v and o give
        e 2h               with four norms: what o and the MLP gave, before it was normed and added

    a token, and e bytes for each entry of an attention mask.
    """
    h, q, v = shape.hidden, shape.query, shape.key_value
    per_token = width * ((5 if shape.norms == 4 else 3) * h + 2 * q + 2 * v + 4 * shape.rank) + 8 + 4 * shape.heads
    if shape.head_norms:
        per_token += width * (q + v)
    return batch.tokens * per_token + width * batch.mask_cells


def fused_mlp_bytes(
    shape: Shape, batch: MicroBatch, width: int, quantized: bool, kept: bool = False, tile: int = TILE
) -> int:
    """The backward of a fused MLP at its fullest (`lora_mlp`): gate and up, which their gradients overwrite, and the
    product's gradient, 3 e m; the gradients that come in and leave, one of them beside its rank products, 2 e h; a
    token. And the largest matrix unpacked, e n.

    Where layers with two norms are fused, over nf4 weights, and many tokens: t of the m columns at a time
    (`slothrl_kernels.layer_mlp`), 3 e t, and the gradients that come in, leave and are summed up, 3 e h, a token; and t
    columns of all three matrices, 3 e t h. Not where gate and up were `kept`, nor where a norm follows: it needs them.
    """
    whole = kept or not quantized or shape.norms != 2
    columns = shape.mlp if whole else columns_of(batch.tokens, shape.mlp, width, tile)
    if columns < shape.mlp:
        return width * (batch.tokens * 3 * (columns + shape.hidden) + 3 * columns * shape.hidden)
    unpacked = width * shape.largest if quantized else 0
    return batch.tokens * width * (3 * shape.mlp + 2 * shape.hidden) + unpacked


def layer_peak(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """What the one layer that is computed again holds at the fullest moment of its backward: the place to recalibrate.

    A layer of transformers and PEFT: `layer_bytes` + `backward_bytes`, within 4 % on an H100. A fused one:
    `fused_layer_bytes` + `fused_mlp_bytes`; SFT of 8B with 2 x 2,048 tokens came within 1 % of it on an H100, a packed
    GRPO update of 17,376 tokens took 2.9 GB more, which nothing here explains yet (2026-11-22).
    """
    if route.fused:
        mlp = fused_mlp_bytes(shape, batch, route.width, route.quantized, tile=route.tile)
        return fused_layer_bytes(shape, batch, route.width) + mlp
    layer = layer_bytes(shape, batch, route.width, route.quantized)
    return layer + backward_bytes(shape, batch, route.width, route.quantized)


def kept_layer_peak(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """What the backward of a checkpointed layer that keeps all holds beside that, at its fullest, where kernels run:

        3 e h              the output's gradient, the same beside its rank products, the MLP's norm made again; a token,
                           and

        e m T + e m h      the product's gradient, over which the product is written, and down's matrix unpacked; or
        e h T + 2 e m h    the gradient of the MLP's norm, and those of gate and up

    whose gradients are written over what was kept. No matrix is unpacked where the base is not quantised.
    """
    weight = shape.mlp * shape.hidden if route.quantized else 0
    more = max(batch.tokens * shape.mlp + weight, batch.tokens * shape.hidden + 2 * weight)
    return route.width * (3 * batch.tokens * shape.hidden + more)


def whole_layers(shape: Shape, fused: bool) -> bool:
    """Whether fusing makes each layer one step of autograd: one of two or four norms (`slothrl.fuse_layer_find`)."""
    return fused and shape.norms in (2, 4)


def attention_numbers(shape: Shape, fused: bool) -> int:
    """Values that a checkpointed layer keeps of its attention a token: its output, q; where it is one step of autograd
    q, k and v too, q + 2v, and as much again where queries and keys are normed."""
    if not whole_layers(shape, fused):
        return shape.query
    given = shape.query + 2 * shape.key_value
    return shape.query + (2 * given if shape.head_norms else given)


def rest_numbers(shape: Shape) -> int:
    """Values a token that a layer which computes nothing again keeps beside its input and attention's: the sum after
    attention, h, gate and up, 2 m, and where each sum has a norm before it 2 h."""
    return (3 if shape.norms == 4 else 1) * shape.hidden + 2 * shape.mlp


def kept_attention_bytes(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """`attention_numbers` in e bytes and the log-sum-exp in float32, 4 heads, a token of each layer that keeps them;
    e x `rest_numbers` of those that keep all.
    """
    per_token = route.width * attention_numbers(shape, route.fused) + 4 * shape.heads
    rest = route.width * rest_numbers(shape)
    return batch.tokens * ((route.whole + route.attending) * per_token + route.whole * rest)


def activation_peak(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """The most that forward and backward of one micro-batch hold beside weights, gradients and optimizer state.

    With checkpointing every layer keeps its input, L e h a token (with `offload` two layers at a time do, and none
    while several that keep all are worked on), some their attention (`kept_attention_bytes`), and one layer at a time
    is computed again. The peak is in that layer's backward, or at the head:

        forward    L e h T + 4 h T + e h T + head + e x LoRA (autocast's copies)
        backward   L e h T + the layer's peak, when those that keep all have given theirs back, or the backward of one
                   of these (`kept_layer_peak`)

    Without it all layers keep everything, and the peak is at the head or in the final norm's backward:

        forward    L (layer + product) + e h T + head + e x LoRA
        backward   L (layer + product) + final norm's backward, or backward of the last matrix - product

    (fused: gate and up are kept, 2 e m, and the product is made again; whole layers keep what they keep with
    checkpointing too where they keep all). To each one byte for every entry of the attention mask.
    """
    width, head = route.width, head_bytes(shape, batch, route.width)
    states = batch.tokens * width * shape.hidden
    copies = width * shape.adapter if width < 4 else 0
    if route.checkpointing:
        others = shape.layers - route.whole
        # The others, when those that keep all are done. What a layer kept is not made once more: `layer_peak` has it.
        beside = replace(route, whole=0, attending=max(0, route.attending - (not route.offload)))
        later = (min(others, 2) if route.offload else others) * states + kept_attention_bytes(shape, batch, beside)
        kept = _kept_at_head(shape, batch, route, states)
        peaks = [kept + 4 * batch.tokens * shape.hidden + states + head + copies]
        peaks += (
            [kept + _coming_back(shape, batch, route) + kept_layer_peak(shape, batch, route)] if route.whole else []
        )
        peaks += [later + layer_peak(shape, batch, route)] if others else []
        return max(peaks) + batch.mask_cells
    layer, last = _whole_layer(shape, batch, route)
    kept = shape.layers * layer
    # A mask is made additive once a layer, and every layer keeps its own.
    peaks = [kept + states + head + copies, kept + copies + last_norm_bytes(shape, batch, width)]
    return max(*peaks, kept + copies + last) + batch.mask_cells


def _kept_at_head(shape: Shape, batch: MicroBatch, route: Route, states: int) -> int:
    """What checkpointed layers have kept on the device when the forward is over."""
    if route.offload and route.whole:  # what the others keep has left
        return route.whole * states + kept_attention_bytes(shape, batch, replace(route, attending=0))
    return (min(shape.layers, 2) if route.offload else shape.layers) * states + kept_attention_bytes(
        shape, batch, route
    )


def _coming_back(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """What another layer's backward begins with, while the only one that keeps all works: its input, and attention's
    output. Where several keep all, others have given theirs back by then."""
    if not route.offload or route.whole != 1:
        return 0
    return batch.tokens * route.width * (shape.hidden + (shape.query if route.attending else 0))


def _whole_layer(shape: Shape, batch: MicroBatch, route: Route) -> tuple[int, int]:
    """Without checkpointing: what a layer keeps, its MLP included, and what the last one's backward adds to that."""
    if route.fused:
        # Where gate and up were kept, their gradients do not overwrite them.
        mlp = fused_mlp_bytes(shape, batch, route.width, route.quantized, kept=True)
        if whole_layers(shape, fused=True):  # norms are made again
            numbers = shape.hidden + attention_numbers(shape, fused=True) + rest_numbers(shape)
            return batch.tokens * (route.width * numbers + 4 * shape.heads) + route.width * batch.mask_cells, mlp
        return fused_layer_bytes(shape, batch, route.width) + 2 * product_bytes(shape, batch, route.width), mlp
    product = product_bytes(shape, batch, route.width)
    layer = layer_bytes(shape, batch, route.width, route.quantized)
    return layer + product, backward_bytes(shape, batch, route.width, route.quantized) - product
