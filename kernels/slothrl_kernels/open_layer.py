"""`graphed_layer` of a large layer that keeps less than all: what is at the ends of its recorded steps (`open_steps`).

Over many values a copy into a frame or out of it costs more than a launch. So the norms that read autograd's tensors,
the GEMMs that write q, k and v, the stream after attention and the output, the gradient of o's A, rotations and the
input's gradient run as `decoder_layer` runs them, from and into tensors that are new every time.
"""

from __future__ import annotations

from torch import Tensor

from slothrl_kernels.decoder_layer import _Kept, _norm_backward, _Normed, _normed, _onto_residual
from slothrl_kernels.layer_attention import Attended, Parked, attend, attend_backward, kept_of
from slothrl_kernels.layer_frame import Frame, adapter_dtypes
from slothrl_kernels.layer_parts import Keep, LayerParts
from slothrl_kernels.lora_flat import Adapters, adapters_in, gradient_of_a, views_of_gradients
from slothrl_kernels.lora_onto import LoraOnto
from slothrl_kernels.recorded_layer import Recorded


def open_forward(
    x: Tensor, parts: LayerParts, recorded: Recorded, keep: Keep
) -> tuple[Tensor, Attended | Parked | None]:
    """The layer's output (M, h), and what `keep` says of attention for a backward.

    Args:
        x, parts, recorded: as of `graphed_layer`, of a recording in an open frame.
    """
    frame, shape, x = recorded.frame, x.shape, x.reshape(-1, x.size(-1))
    recorded.before()
    normed = _first_norm(x, parts, frame)
    attended = attend(normed.group.forward(normed.both), shape, parts, keep != "input")
    (u, _), _ = _onto_residual(_onto(parts, frame, x, "o"), attended.rows, x, parts)
    kept = None if keep == "input" else kept_of(attended, parts)
    del attended
    both = frame.rows("normed_mlp", x.size(0))
    _normed(u, parts.second, parts.inner, _values(parts, frame)[2], parts, both)
    recorded.after()
    product = frame.rows("product", x.size(0))
    return _onto(parts, frame, x, "down").forward(product, u, u), kept  # over u: torch would copy it to add to it


def open_backward(
    x: Tensor, to_y: Tensor, parts: LayerParts, recorded: Recorded, kept: _Kept
) -> tuple[Tensor, list[Tensor | None]]:
    """dx (M, h) and the adapters' gradients, as `decoder_layer`'s backward gives them, as tensors of their own.

    Args:
        x: (B, S, h). to_y: (M, h). kept: at most attention.
    """
    frame, shape, x = recorded.frame, x.shape, x.reshape(-1, x.size(-1))
    tokens = x.size(0)
    recorded.before()
    normed = _first_norm(x, parts, frame)
    attended = kept.attended
    if attended is None:
        attended = attend(normed.group.forward(normed.both), shape, parts, watched=True)
    rows = attended.rows
    _, shrunk = _onto_residual(_onto(parts, frame, x, "o"), rows, x, parts, frame.rows("u", tokens))
    frame.end("u", tokens)
    frame.fill("shrunk", shrunk)
    frame.fill("to_y", to_y)
    del shrunk
    recorded.middle()
    of_a = frame.view(("o's A",), lambda: adapters_in(parts.groups, frame.found)[1].a)
    if of_a is not None:
        gradient_of_a([parts.o], of_a, frame.right("to_u", tokens, x.size(1)), rows)
    del rows
    to_qkv = frame.left("to_qkv", tokens, normed.group.outputs)
    attend_backward(frame.rows("to_rows", tokens), attended, shape, parts, to_qkv)
    frame.end("to_qkv", tokens)
    del attended
    recorded.last()
    (dtype,) = adapter_dtypes(parts)
    found = frame.found.to(dtype, copy=True)  # one copy of all: what autograd keeps is nobody else's
    to_n, to_u = frame.rows("to_n", tokens), frame.left("to_u", *x.shape)
    return _norm_backward(to_n, to_u, x, normed.r, parts.first, parts), views_of_gradients(parts.groups, found)


def _first_norm(x: Tensor, parts: LayerParts, frame: Frame) -> _Normed:
    """norm(x) where the projections of q, k and v take it, and the last step does."""
    values = _values(parts, frame)[0]
    normed = _normed(x, parts.first, parts.qkv, values, parts, frame.rows("normed", x.size(0)))
    frame.end("normed", x.size(0))
    normed.group.held(frame.weights.get("qkv"))
    return normed


def _onto(parts: LayerParts, frame: Frame, x: Tensor, name: str) -> LoraOnto:
    projection, place = (parts.o, 1) if name == "o" else (parts.down, 3)
    onto = LoraOnto(projection, _values(parts, frame)[place], x, parts.impl)
    return onto.held(frame.weights.get(name))


def _values(parts: LayerParts, frame: Frame) -> list[Adapters]:
    """The adapters' values as `OpenSteps.before` left them."""
    return frame.view(("adapters",), lambda: adapters_in(parts.groups, frame.values))
