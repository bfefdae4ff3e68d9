"""A decoder layer's steps recorded at one number of rows, and what they were recorded for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from slothrl_kernels.kept_steps import KeptSteps
from slothrl_kernels.layer_frame import Frame
from slothrl_kernels.layer_own import Own
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.layer_recorder import Recorder, Replay
from slothrl_kernels.layer_steps import LayerSteps
from slothrl_kernels.open_steps import OpenSteps

GRAIN = 16  # the fewest rows two buckets are apart, and into how many an octave is divided


class Recorded(NamedTuple):
    """One layer's steps at one number of rows, recorded.

    parts: what they were recorded for, held because a recording reads it; addresses: where it was then.
    own: the layer's own buffers, where it keeps all.
    """

    frame: Frame
    rows: int
    parts: LayerParts
    addresses: tuple
    before: Replay
    after: Replay
    middle: Replay
    last: Replay
    own: Own | None = None

    @property
    def whole(self) -> bool:
        """Whether its backward takes what the forward kept in the layer's own buffers; else it computes it again."""
        return self.own is not None


def bucket(tokens: int) -> int:
    """The number of rows that `tokens` are rounded up to: the next multiple of at most a 16th of them, and of 16."""
    grain = max(GRAIN, 1 << max(0, (tokens // GRAIN).bit_length() - 1))
    return -(-tokens // grain) * grain


def addresses(parts: LayerParts) -> tuple:
    """Where a layer's weights and adapters are in memory, with its scalings: a recording reads them there."""
    found: list[Any] = [weight.data_ptr() for weight in parts.norm_weights()]
    for p in parts.projections:
        weight = p.weight.data_ptr() if isinstance(p.weight, Tensor) else id(p.weight)  # held by the recording
        found += [weight, *(None if t is None else t.data_ptr() for t in (p.bias, p.a, p.b)), p.scaling]
    return tuple(found)


def record_layer(parts: LayerParts, frame: Frame, rows: int, recorder: Recorder, own: Own | None = None) -> Recorded:
    """Record a layer over `rows` rows of a frame, whose contents are lost.

    Args:
        own: for a layer that keeps all: its buffers, which nobody has a lease of; None: new ones of the frame's size.

    Raises: whatever a step or the recorder raises; RuntimeError for buffers that are taken; ValueError for parts that
        `decoder_layer` would not take.
    """
    like = frame.rows("u" if frame.open else "state", rows)
    parts.check(like[None])
    if parts.keep == "all":
        own = own or Own(frame.capacity, parts, like)
        if own.taken:
            raise RuntimeError("a layer's own buffers are in use: no time to record")
        steps: Any = KeptSteps(parts, frame, own, rows)
    else:
        own, steps = None, (OpenSteps if frame.open else LayerSteps)(parts, frame, rows)
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        made = [recorder.record(step) for step in (steps.before, steps.after, steps.middle, steps.last)]
    frame.clear()
    return Recorded(frame, rows, steps.parts, addresses(parts), *made, own=own)
