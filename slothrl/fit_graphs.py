"""What recorded decoder layers hold beside a micro-batch's activations, as pure functions of sizes; letters as in
`slothrl.fit_activations`.
"""

from __future__ import annotations

from slothrl_kernels.layer_frame import OPEN

from slothrl.fit_activations import MicroBatch, Route, fused_mlp_bytes
from slothrl.fit_shape import Shape


def graphed_bytes(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """What CUDA graphs of fused layers hold, one layer at a time (`slothrl_kernels.layer_frame`): their frame,

        e (3h + 2q + 2v)   the layer's input, q k v, attention's output, the layer's output, a gradient; with norms of q
                           and k another e (q + 2v)

    a token, or `open_frame_bytes` where the input is large, or `kept_frame_bytes`, and a pool of their own for what a
    recorded step holds at its fullest, `fused_mlp_bytes`.
    """
    h, q, v = shape.hidden, shape.query, shape.key_value
    per_token = 3 * h + 2 * q + 2 * v + (q + 2 * v if shape.head_norms else 0)
    frame = batch.tokens * route.width * per_token
    if not route.checkpointing:
        frame = kept_frame_bytes(shape, batch, route)
    elif shape.norms != 4 and batch.tokens * h**2 >= OPEN:
        frame = open_frame_bytes(shape, batch, route)
    return frame + fused_mlp_bytes(shape, batch, route.width, route.quantized, tile=route.tile)


def kept_frame_bytes(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """The same without checkpointing: layers keep what they would keep anyway, and beside it

        e (5h + 3q + 2v + 6r)   in all: the input, attention's output and its gradient, those of q k v, of the output,
                                after attention and of the first norm, the output
        e (m + r)               likewise, and for each of the h rows of the weight: what goes into down, where that is
                                quantised and adds to the stream; where a norm does, e (h + r) a token
        (8 + e (2h + 7r)) L     in each layer: the norms, rank products, the norms' scales

    a token.
    """
    h, r = shape.hidden, -(-shape.rank // 8) * 8
    down = shape.mlp + r if route.quantized and shape.norms != 4 else 0
    per_token = 5 * h + 3 * shape.query + 2 * shape.key_value + 6 * r + down
    per_token += (2 * h + 7 * r) * shape.layers + (h + r) * (shape.norms == 4)
    return route.width * (batch.tokens * per_token + h * down) + 8 * batch.tokens * shape.layers


def open_frame_bytes(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """The same with checkpointing where the layer's input is so large that its steps' ends are open (`open_ends`):

        e (3h + q + 2v + 8r)   the first norm, the stream after attention, the output's gradient, those of q k v
        e max(h + m + 3r, 2h + q + r)   the second norm and what goes into down; the gradients after attention, of
                               attention's output and of the first norm, in the same memory

    a token, and where weights are quantised, unpacked beside their adapters, those of q, k, v and o or that of down,

        e max((q + 2v + 3r) (h + 3r) + h (q + r), h (m + r))
    """
    h, m, q = shape.hidden, shape.mlp, shape.query
    given = q + 2 * shape.key_value
    one, two, three = (-(-count * shape.rank // 8) * 8 for count in (1, 2, 3))
    per_token = 3 * h + given + 2 * three + 2 * one
    per_token += max(h + two + m + one, 2 * h + q + one)
    weights = max((given + three) * (h + three) + h * (q + one), h * (m + one)) if route.quantized else 0
    return route.width * (batch.tokens * per_token + weights)
