"""Whole layers by CUDA graphs (`graphed_layer`): for which calls, decided by what comes and what was measured.

A number of tokens gets recordings once it has come a few times in training and, with `model.graphs=auto`, one layer's
eager forward has shown that the device waits for the host. The first layer decides for all, at its turn. Whatever has
no recording runs as before: other numbers of tokens, switched or disabled adapters, another stream. A layer that keeps
all (no checkpoints) does so in buffers of its own, which stay; a second forward before the backward runs as before.

Layers that keep all within a budget (`model.activation_gib`) are recorded only where all of them do, and their buffers
and frame fit into it. A few beside others would take far more than they are to: with 8B and 4,096 tokens a frame of 523
MB, [W | B] of down included, and each 389 of its own that stay when its backward is over, beside 34 of attention's
output. Run eagerly each keeps 353 MB, which are free when the other layers' backward begins, and the last one's takes
369 beside them: less in all for any number of layers.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from slothrl_kernels.graphed_layer import graphed_layer
from slothrl_kernels.layer_frame import Frame, adapter_dtypes, frame_key, frame_widths
from slothrl_kernels.layer_own import Own, own_bytes
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.layer_recorder import CudaGraphs, Recorder
from slothrl_kernels.recorded_layer import Recorded, addresses, bucket, record_layer
from torch import Tensor

from slothrl.fuse_layer import fused_layer
from slothrl.pace import Pace
from slothrl.plan import Rows

WISHES = ("auto", "on", "off")
LIMIT = 8  # numbers of tokens whose recordings are kept
ARRIVALS = 2  # calls at a number of tokens before it is recorded; twice as many with everything that was given up
ROOM = 8  # times a frame's memory that must be free for "auto"
MOVES = 4  # times that all layers may be recorded anew because their weights are elsewhere


class LayerGraphs:
    """The recordings of one model's layers.

    Args:
        wish: "auto" or "on".
        recorder: of the device that the model is on.
        count: of layers.
    """

    def __init__(self, wish: str, recorder: Recorder, count: int) -> None:
        self.wish, self.recorder, self.count = wish, recorder, count
        self.recorded: OrderedDict[tuple, dict[Any, Recorded]] = OrderedDict()  # by kind of call, oldest use first
        self.paces: dict[tuple, Pace] = {}
        self.stopped: str | None = None  # why there are none any more
        self.most: int | None = None  # bytes that recorded layers which keep all may take, with their frame
        self._frames: dict[tuple, Frame] = {}
        self._own: dict[tuple, dict[Any, Own]] = {}  # of every layer that keeps all, by the frame's key
        self._arrived: Counter[tuple] = Counter()
        self._watched: Any = None
        self._recording_now = False  # some layer was recorded since the first one's last turn
        self._moves = self._given_up = 0

    def __deepcopy__(self, memo: dict) -> LayerGraphs:
        """A copy of the model has weights elsewhere: it begins anew."""
        return memo.setdefault(id(self), LayerGraphs(self.wish, type(self.recorder)(), self.count))

    def run(self, layer: Any, eager: Callable[..., Tensor], x: Tensor, parts: LayerParts, save: bool) -> Tensor:
        """`decoder_layer(x, parts, save)`: by a recording of `layer`, or by `eager`."""
        rows, whole = bucket(x.size(0) * x.size(1)), parts.keep == "all"  # keeping attention changes no step
        kind = (rows, whole, x.dtype)
        if self._recording_now and layer is self._watched:
            self.recorder.end()
            self._recording_now = False
        if not torch.is_grad_enabled() and kind not in self.recorded:
            kind = (rows, not whole, x.dtype)  # forward they are the same
        recorded = self._recording(layer, kind, x, parts)
        if recorded is not None:
            return graphed_layer(x, parts, recorded, save)
        if whole and torch.is_grad_enabled():
            self._make_room(rows, x, parts)
        call = partial(eager, x, parts, save=save)
        if layer is self._watched and kind in self.paces and kind not in self.recorded and torch.is_grad_enabled():
            return self.paces[kind].watch(call)
        return call()

    @property
    def nbytes(self) -> int:
        """Device memory of frames, of layers' own buffers and of recordings."""
        return sum(held.nbytes for held in (*self._frames.values(), *self.owned())) + self.recorder.nbytes

    @property
    def idle(self) -> int:
        """Bytes of layers' own buffers that wait for the next forward: it takes no other memory for what it keeps."""
        return sum(own.nbytes for own in self.owned() if not own.taken)

    def owned(self) -> list[Own]:
        """The own buffers of layers that keep all."""
        return [own for layers in self._own.values() for own in layers.values()]

    def __str__(self) -> str:
        if self.stopped:
            return f"off: {self.stopped}"
        sizes = ", ".join(f"{rows:,}" for rows in sorted({kind[0] for kind in self.recorded}))
        held = f"{len(self.recorded)} recorded ({sizes} tokens), {self.nbytes / 2**20:.0f} MiB"
        return "; ".join([held, *(f"{kind[0]:,} tokens: {pace}" for kind, pace in self.paces.items())])

    def _recording(self, layer: Any, kind: tuple, x: Tensor, parts: LayerParts) -> Recorded | None:
        if self.stopped or not self.recorder.ready():
            return None
        layers = self.recorded.get(kind)
        mine = None if layers is None else layers.get(layer)
        if mine is not None and mine.addresses == addresses(parts):
            self.recorded.move_to_end(kind)
            return mine
        if not torch.is_grad_enabled() or len(adapter_dtypes(parts)) != 1:
            return None
        if parts.keep == "all" and self.most is not None and self._kept_bytes(kind[0], x, parts) > self.most:
            return None
        if layers is None and not (self._follows(layer, kind, x, parts) or self._due(layer, kind, x, parts)):
            return None
        if mine is not None:
            self._moves += 1
            if self._moves > MOVES * len(layers or ()):
                return self._stop("the adapters or weights are somewhere else at every call")
        return self._record(layer, kind, x, parts)

    def _follows(self, layer: Any, kind: tuple, x: Tensor, parts: LayerParts) -> bool:
        """Whether the first layer is recorded for as many tokens, and this one keeps more or less than that."""
        rows, whole, dtype = kind
        if self._watched not in self.recorded.get((rows, not whole, dtype), ()) or layer is self._watched:
            return False
        return self.wish == "on" or not whole or self._has_room(rows, x, parts)

    def _due(self, layer: Any, kind: tuple, x: Tensor, parts: LayerParts) -> bool:
        """Whether recording of this kind of call begins now."""
        self._watched = self._watched or layer
        if layer is not self._watched:
            return False
        self._arrived[kind] += 1
        if self._arrived[kind] <= ARRIVALS << self._given_up:
            return False
        if self.wish == "on":
            return True
        if kind not in self.paces:
            self.paces[kind] = Pace()
        return bool(self.paces[kind].waits_for_host()) and self._has_room(kind[0], x, parts)

    def _has_room(self, rows: int, x: Tensor, parts: LayerParts) -> bool:
        free = torch.cuda.mem_get_info(x.device)[0]
        free += torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        own = self.count * own_bytes(rows, parts, x) if parts.keep == "all" else 0
        return free >= ROOM * rows * sum(frame_widths(parts, x, rows).values()) * x.element_size() + own

    def _kept_bytes(self, rows: int, x: Tensor, parts: LayerParts) -> int:
        """What layers take if all keep all: their frame, own buffers and attention's outputs."""
        widths = frame_widths(parts, x, rows)
        frame = rows * sum(widths.values()) + x.size(-1) * widths.get("product", 0)  # [W | B] of down
        output = rows * parts.heads * parts.width
        return (frame + self.count * output) * x.element_size() + self.count * own_bytes(rows, parts, x)

    def _record(self, layer: Any, kind: tuple, x: Tensor, parts: LayerParts) -> Recorded | None:
        try:
            frame = self._frame(kind[0], x, parts)
            own = self._own_of(layer, frame, x, parts)
            if own is not None and own.taken:
                return None  # what an earlier forward left is needed: another time
            if kind not in self.recorded:
                self.recorder.begin()
            made = record_layer(parts, frame, kind[0], self.recorder, own)
        except Exception as error:  # what cannot be recorded runs as before
            return self._stop(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        if kind not in self.recorded and len(self.recorded) >= LIMIT:
            self.recorded.popitem(last=False)
            self._given_up += 1
        self.recorded.setdefault(kind, {})[layer] = made
        self._recording_now = True
        return made

    def _frame(self, rows: int, x: Tensor, parts: LayerParts) -> Frame:
        """Room for so many rows; recordings in one that is too small are given up."""
        key = frame_key(parts, x, rows)
        old = self._frames.get(key)
        if old is not None and old.capacity >= rows:
            return old
        if old is not None:
            self._given_up += 1
            del old
            self._drop(key)
        self._frames[key] = Frame(rows, parts, x)
        return self._frames[key]

    def _make_room(self, rows: int, x: Tensor, parts: LayerParts) -> None:
        """For a forward that keeps all elsewhere and more than before: the memory of those before would lie idle."""
        key = frame_key(parts, x, rows)
        if key in self._frames and self._frames[key].capacity < rows:
            self._drop(key)

    def _drop(self, key: tuple) -> None:
        """A frame, the recordings in it and the own buffers of its layers."""
        frame = self._frames.pop(key)
        for kind in [k for k, layers in self.recorded.items() if any(r.frame is frame for r in layers.values())]:
            del self.recorded[kind]
        self._own.pop(key, None)

    def _own_of(self, layer: Any, frame: Frame, x: Tensor, parts: LayerParts) -> Own | None:
        """A layer's own buffers, where it keeps all: for all recordings in one frame the same."""
        if parts.keep != "all":
            return None
        layers = self._own.setdefault(frame.key, {})
        if layer not in layers:
            layers[layer] = Own(frame.capacity, parts, x)
        return layers[layer]

    def _stop(self, why: str) -> None:
        self.stopped = why
        self.recorded.clear()
        self._frames.clear()
        self._own.clear()
        self.recorder.close()
        warnings.warn(f"layers run without CUDA graphs from here on: {why}", stacklevel=2)


def graph_layers(model: Any, wish: str, recorder: Recorder | None = None, beside_vllm: bool = False) -> Rows:
    """Let the whole layers of a fused model run by CUDA graphs as `model.graphs` asks for; rows for the plan table.

    Args:
        model: after `fuse`; `unfuse` takes this away too.
        wish: "auto", "on" or "off".
        recorder: in the place of CUDA graphs.
        beside_vllm: vLLM generates in this process: "auto" makes none then, since its graphs and its sleeping cache
            beside ours have not been measured.

    Raises:
        ValueError: an unknown wish.
    """
    if wish not in WISHES:
        raise ValueError(f"graphs {wish!r} is not one of {', '.join(WISHES)}")
    layers = [fused for module in model.modules() if (fused := fused_layer(module)) is not None]
    for layer in layers:
        layer.graphs = None
    if wish == "off":
        return [("graphs", "none (model.graphs=off)")]
    devices = {p.device for p in model.parameters()}
    if why := _why_not(layers, devices, recorder):
        return [("graphs", f"none: {why}")]
    if beside_vllm and wish == "auto":
        return [("graphs", "none beside vLLM in this process (model.graphs=on to have them)")]
    graphs = LayerGraphs(wish, recorder or CudaGraphs(), len(layers))
    for layer in layers:
        layer.graphs = graphs
    when = "" if wish == "on" else ", where the first steps show that the GPU waits for the host"
    return [("graphs", f"CUDA graphs of {len(layers)} layers for numbers of tokens that come again{when}")]


def _why_not(layers: list[Any], devices: set[torch.device], recorder: Recorder | None) -> str | None:
    if recorder is None and not any(device.type == "cuda" for device in devices):
        return "there is no GPU"
    if len(devices) > 1:
        return "the model is on several devices"
    return None if layers else "no layer runs as one step"


def graphs_of(model: Any) -> LayerGraphs | None:
    """What `graph_layers` put into a model."""
    found = (fused_layer(module) for module in model.modules())
    return next((fused.graphs for fused in found if fused is not None and fused.graphs is not None), None)


def pool_bytes(model: Any) -> int:
    """Device memory that the recordings of a model's layers keep from everybody else, though nothing is in it; less
    the layers' own buffers: the next micro-batch keeps its activations there."""
    graphs = graphs_of(model)
    return 0 if graphs is None else graphs.recorder.nbytes - graphs.idle
