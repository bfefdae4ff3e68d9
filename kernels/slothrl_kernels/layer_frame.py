"""Memory of fixed addresses for the recorded steps of decoder layers: what goes into them, between them, and out.

All layers of one shape take turns in one frame, since they run one after the other; what must outlive a layer's turn is
copied out, or lies in buffers of the layer's own where it keeps all (`layer_own`). A step always runs over as many rows
as it was recorded with. Rows beyond a call's tokens are zeros wherever a step reads what was put in: zeros give zero
gradients in every sum over rows, so nothing of them reaches a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.lora_flat import AdapterGradients, count_of, rank_of
from slothrl_kernels.lora_math import Projection
from slothrl_kernels.row_copy import copy_rows

VIEWS = 512  # kept at most
# Rows x width^2 from which on the GPU's work hides what open ends leave to the host: 4,096 tokens of an 8B model, where
# they save 1.5 %; 2,048 take as long either way, and 16,384 of a 0.6B model 3 to 13 % longer (H200, a slow host).
OPEN = 2**36


def frame_widths(parts: LayerParts, x: Tensor, rows: int) -> dict[str, int]:
    """Entries a token of every buffer that a layer of these parts needs over so many rows.

    x: the layer's input. qkv: as projected, and rotated where no norms come first. turned: normed and rotated, later
    the gradient of q, k and v, which takes qkv's place without norms. rows: attention's output, then its gradient.
    state: the layer's output, then that one's gradient, then the input's. to_u: the gradient after attention. cos, sin.

    Of layers that keep all: x; rows beside its rank products, as o takes it, to_rows its gradient; to_y the output's
    gradient beside its products, as down takes it (where a norm follows, what that makes of the one in state); to_u
    likewise for o (to_o where a norm follows), to_qkv for q, k and v; to_n the first norm's; product what goes into
    down, beside its products, where `gives_apart`; state.

    With `open_ends`: normed what the first norm gives beside its products; u the stream after attention; shrunk o's
    products; to_y and to_qkv as above; shared: what of `shared_widths` is in use at one time.
    """
    if open_ends(parts, x, rows):
        return _open_widths(parts, x)
    hidden, wide = x.size(-1), parts.heads * parts.width
    qkv = wide + 2 * parts.kv_heads * parts.width
    if parts.keep == "all":
        onto_o, onto_down = (hidden + rank_of((p,)) for p in (parts.o, parts.down))
        widths = {"x": hidden, "rows": wide + rank_of((parts.o,)), "to_rows": wide, "to_n": hidden, "state": hidden}
        widths |= {"to_y": onto_down, "to_u": onto_o} | ({} if parts.after is None else {"to_o": onto_o})
        widths["to_qkv"] = qkv + rank_of(parts.qkv)
        widths |= {"product": _into_down(parts)} if gives_apart(parts) else {}
    else:
        widths = {"x": hidden, "qkv": qkv, "rows": wide, "state": hidden, "to_u": hidden}
        widths |= {} if parts.norms is None else {"turned": qkv}
    if parts.tables is not None:
        widths |= {"cos": parts.tables[0].size(-1), "sin": parts.tables[1].size(-1)}
    return widths


def _open_widths(parts: LayerParts, x: Tensor) -> dict[str, int]:
    hidden, heads = x.size(-1), parts.heads + 2 * parts.kv_heads
    widths = {"normed": hidden + rank_of(parts.qkv), "u": hidden, "shrunk": rank_of((parts.o,))}
    widths |= {"to_y": hidden + rank_of((parts.down,)), "to_qkv": heads * parts.width + rank_of(parts.qkv)}
    return widths | {"shared": max(sum(turn.values()) for turn in shared_widths(parts, x))}


def shared_widths(parts: LayerParts, x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """What `open_ends` need in a forward alone and in a backward alone, in memory that the two share.

    A step writes all rows of these before anything reads them, or nothing in a sum over rows does: none must be zeros.
    normed_mlp: the second norm's result beside its rank products; product: what goes into down beside its products.
    to_u: the gradient after attention beside o's products; to_rows: attention's output's; to_n: the first norm's.
    """
    hidden = x.size(-1)
    forward = {"normed_mlp": hidden + rank_of(parts.inner), "product": _into_down(parts)}
    backward = {"to_u": hidden + rank_of((parts.o,)), "to_rows": parts.heads * parts.width}
    return forward, backward | {"to_n": hidden}


class Buffers:
    """Named buffers (capacity, width) of a dtype and device, zeros at first.

    Args:
        capacity: rows.
        widths: entries a row of each.
        like: any tensor of the dtype and device.
    """

    def __init__(self, capacity: int, widths: dict[str, int], like: Tensor) -> None:
        self.capacity = capacity
        self._held = {name: like.new_zeros(capacity, width) for name, width in widths.items()}
        self._views: dict[tuple, Any] = {}
        self._filled = dict.fromkeys(self._held, 0)  # rows from here on are zeros

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._held.values())

    def rows(self, name: str, count: int) -> Tensor:
        """(count, width), the first rows of a buffer."""
        return self.view((name, count), lambda: self._whole(name)[:count])

    def view(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` makes of the buffers' memory, made once: views cost the host as much as work does."""
        if key not in self._views:
            if len(self._views) >= VIEWS:
                self._views.clear()
            self._views[key] = make()
        return self._views[key]

    def _whole(self, name: str) -> Tensor:
        return self._held[name]

    def left(self, name: str, count: int, width: int) -> Tensor:
        """(count, width), the left columns of `rows`."""
        return self.view((name, count, width), lambda: self._whole(name)[:count, :width])

    def right(self, name: str, count: int, begin: int) -> Tensor:
        """(count, the rest), the columns of `rows` from `begin` on."""
        return self.view((name, count, begin, "right"), lambda: self._whole(name)[:count, begin:])

    def fill(self, name: str, source: Tensor) -> None:
        """source (M, width or fewer) into the left of the first rows; zeros below them."""
        copy_rows(self.left(name, *source.shape), source)
        self.end(name, source.size(0))

    def end(self, name: str, count: int) -> None:
        """Zeros from row `count` on."""
        if self._filled[name] > count:
            self._held[name][count : self._filled[name]].zero_()
        self._filled[name] = count

    def wrote(self, count: int, *names: str) -> None:
        """A step wrote into this many rows of these."""
        for name in names:
            if name in self._filled:
                self._filled[name] = max(self._filled[name], count)

    def clear(self) -> None:
        """Zeros everywhere, as at first."""
        for name, held in self._held.items():
            held.zero_()
            self._filled[name] = 0


class Frame(Buffers):
    """The buffers of `frame_widths`, and `found`: a layer's adapter gradients, in the adapters' dtype.

    Where layers keep all: `found` in the computation's dtype; `joined` [W | B] of down (h, F + R), where `gives_apart`.
    An `open` one is for `open_ends`: `found` likewise; `values`: the adapters', where `adapter_values` puts them;
    `weights`: [W | B] of "qkv", "o" and "down", of those that are packed, the last in the memory of the others.

    Args:
        capacity: rows.
        parts, x: of any layer that is to use it.
    """

    def __init__(self, capacity: int, parts: LayerParts, x: Tensor) -> None:
        super().__init__(capacity, frame_widths(parts, x, capacity), x)
        self.key, self.open = frame_key(parts, x, capacity), open_ends(parts, x, capacity)
        counts = [AdapterGradients([group], x.new_empty(0)).places.count for group in parts.groups]
        self.first, (dtype,) = counts[0], adapter_dtypes(parts)
        whole = parts.keep == "all"
        self.found = x.new_zeros(sum(counts), dtype=x.dtype if whole or self.open else dtype)  # of q, k and v first
        self.values = x.new_zeros(count_of(parts.groups) if self.open else 0)
        self._laid = self._lay(shared_widths(parts, x)) if self.open else {}
        shapes = [_joined_shapes(parts, names) for names in (("qkv", "o"), ("down",))] if self.open else []
        self._joined = x.new_zeros(max((sum(h * w for h, w in turn.values()) for turn in shapes), default=0))
        self.weights = {name: x for turn in shapes for name, x in _views_in(self._joined, turn).items()}
        self.joined = x.new_zeros(x.size(-1), _into_down(parts) if whole and gives_apart(parts) else 0)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._seen: list[Any] = []

    @property
    def nbytes(self) -> int:
        beside = (self.found, self.values, self.joined, self._joined)
        return sum(x.nbytes for x in beside) + super().nbytes

    def clear(self) -> None:
        super().clear()
        self._tables = None

    def _lay(self, turns: tuple[dict[str, int], ...]) -> dict[str, Tensor]:
        """The buffers of every turn beside each other in the memory of "shared"."""
        shared, found = self._held["shared"].view(-1), {}
        for widths in turns:
            found |= _views_in(shared, {name: (self.capacity, width) for name, width in widths.items()})
        return found

    def _whole(self, name: str) -> Tensor:
        return self._laid[name] if name in self._laid else super()._whole(name)

    def set_tables(self, tables: tuple[Tensor, Tensor] | None, shape: torch.Size) -> None:
        """cos and sin (B or 1, S, R), token by token of (B, S, h); nothing to do where they are those of last time."""
        if tables is None:
            return
        # Held, so that no other tensors can be taken for these two.
        seen = [tuple(shape[:2]), *(None if t.is_inference() else t._version for t in tables)]
        before = self._tables
        if before is not None and before[0] is tables[0] and before[1] is tables[1] and self._seen == seen:
            return
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.fill(name, table.expand(shape[0], -1, -1).reshape(shape[0] * shape[1], -1))
        self._tables, self._seen = tables, seen


def _views_in(flat: Tensor, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Matrices one after the other in `flat`, from its begin on."""
    sizes = [height * width for height, width in shapes.values()]
    pieces = zip(shapes.items(), flat[: sum(sizes)].split(sizes), strict=True)
    return {name: piece.view(shape) for (name, shape), piece in pieces}


def _joined_shapes(parts: LayerParts, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    groups = {"qkv": parts.qkv, "o": (parts.o,), "down": (parts.down,)}
    packed = {name: groups[name] for name in names if is_packed(groups[name])}
    return {
        name: (sum(p.weight.shape[0] for p in group) + below, group[0].weight.shape[1] + rank_of(group))
        for name, group in packed.items()
        for below in [rank_of(group) if name == "qkv" else 0]  # A', for the backward
    }


def is_packed(group: Sequence[Projection]) -> bool:
    """Whether none of a group's weights is dense."""
    return not any(isinstance(p.weight, Tensor) for p in group)


def frame_key(parts: LayerParts, x: Tensor, rows: int) -> tuple:
    """Equal for layers that can use one frame of so many rows, or of more where `open_ends` are the same."""
    sizes = tuple((p.rank, *p.weight.shape, is_packed([p])) for p in parts.projections)
    return (x.dtype, x.device, adapter_dtypes(parts), sizes, tuple(frame_widths(parts, x, rows).items()))


def open_ends(parts: LayerParts, x: Tensor, rows: int) -> bool:
    """Whether what is at the ends of steps over so many rows of x's width is left to their caller (`open_layer`)."""
    return parts.keep != "all" and parts.after is None and rows * x.size(-1) ** 2 >= OPEN


def gives_apart(parts: LayerParts) -> bool:
    """Whether a layer's output is one GEMM onto its residual, of a weight that is unpacked before."""
    down = parts.down
    return not isinstance(down.weight, Tensor) and down.bias is None and parts.after is None


def _into_down(parts: LayerParts) -> int:
    return parts.down.weight.shape[1] + rank_of((parts.down,))


def adapter_dtypes(parts: LayerParts) -> tuple[torch.dtype, ...]:
    return tuple({t.dtype for t in parts.adapters() if t is not None})
