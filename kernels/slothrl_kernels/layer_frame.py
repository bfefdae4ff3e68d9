"""Memory of fixed addresses for the recorded steps of decoder layers: what goes into them, between them, and out.

All layers of one shape take turns in one frame, since they run one after the other; what must outlive a layer's turn is
copied out. A step always runs over as many rows as it was recorded with. Rows beyond a call's tokens are zeros wherever
a step reads what was put in: zeros give zero gradients in every sum over rows, so nothing of them reaches a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.lora_flat import AdapterGradients

VIEWS = 512  # kept at most


def frame_widths(parts: LayerParts, x: Tensor) -> dict[str, int]:
    """Entries a token of every buffer that a layer of these parts needs.

    x: the layer's input. qkv: as projected, and rotated where no norms come first. turned: normed and rotated, later
    the gradient of q, k and v, which takes qkv's place without norms. rows: attention's output, then its gradient.
    state: the layer's output, then that one's gradient, then the input's. to_u: the gradient after attention. u, inner:
    what a layer that keeps all gives away and gets back, with what o and down gave where norms follow. cos, sin.
    """
    hidden, wide = x.size(-1), parts.heads * parts.width
    qkv = wide + 2 * parts.kv_heads * parts.width
    widths = {"x": hidden, "qkv": qkv, "rows": wide, "state": hidden, "to_u": hidden}
    if parts.norms is not None:
        widths["turned"] = qkv
    if parts.keep == "all":
        widths |= {"u": hidden, "inner": sum(p.weight.shape[0] for p in parts.inner)}
        widths |= {"of_o": hidden, "of_down": hidden} if parts.after is not None else {}
    if parts.tables is not None:
        widths |= {"cos": parts.tables[0].size(-1), "sin": parts.tables[1].size(-1)}
    return widths


class Frame:
    """Buffers (capacity, width) of x's dtype and device, zeros at first, and `found`: a layer's adapter gradients.

    Args:
        capacity: rows.
        parts, x: of any layer that is to use it.
    """

    def __init__(self, capacity: int, parts: LayerParts, x: Tensor) -> None:
        self.capacity, self.key = capacity, frame_key(parts, x)
        self._held = {name: x.new_zeros(capacity, width) for name, width in frame_widths(parts, x).items()}
        self._views: dict[tuple, Any] = {}
        self._filled = dict.fromkeys(self._held, 0)  # rows from here on are zeros
        counts = [AdapterGradients([group], x.new_empty(0)).places.count for group in parts.groups]
        self.first, (dtype,) = counts[0], adapter_dtypes(parts)
        self.found = torch.zeros(sum(counts), dtype=dtype, device=x.device)  # of q, k and v first
        self._tables: tuple[Tensor, Tensor] | None = None
        self._seen: list[Any] = []

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.found, *self._held.values()))

    def rows(self, name: str, count: int) -> Tensor:
        """(count, width), the first rows of a buffer."""
        return self.view((name, count), lambda: self._held[name][:count])

    def view(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` makes of the buffers' memory, made once: views cost the host as much as work does."""
        if key not in self._views:
            if len(self._views) >= VIEWS:
                self._views.clear()
            self._views[key] = make()
        return self._views[key]

    def fill(self, name: str, source: Tensor) -> None:
        """source (M, width) into the first rows; zeros behind them."""
        self.rows(name, source.size(0)).copy_(source)
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
        self._tables = None

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


def frame_key(parts: LayerParts, x: Tensor) -> tuple:
    """Equal for layers that can use one frame."""
    sizes = tuple((p.rank, *p.weight.shape) for p in parts.projections)
    return (x.dtype, x.device, adapter_dtypes(parts), sizes, tuple(frame_widths(parts, x).items()))


def adapter_dtypes(parts: LayerParts) -> tuple[torch.dtype, ...]:
    return tuple({t.dtype for t in parts.adapters() if t is not None})
