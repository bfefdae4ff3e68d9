"""A decoder layer's own buffers for what it keeps from a forward to its backward, where its steps are recorded.

The forward's steps write there what the backward's read there: nothing is copied. They hold one forward's values at a
time. Whoever is to run a backward on them has a `Lease`; while that lives, other forwards of the layer go without.
"""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from slothrl_kernels.layer_attention import Turned
from slothrl_kernels.layer_frame import Buffers
from slothrl_kernels.layer_parts import LayerParts
from slothrl_kernels.layer_steps import heads_in
from slothrl_kernels.lora_flat import count_of, rank_of


class Lease:
    """Lives as long as its owner needs what is in a layer's own buffers; with autograd's graph it dies."""


def own_widths(parts: LayerParts, x: Tensor) -> dict[str, int]:
    """Entries a token of every buffer that a layer has to itself.

    qkv: as projected, and rotated where no norms come first. turned: q and k normed and rotated,
    where norms do. u: the stream after attention. inner: gate and up. normed, normed_mlp: the norms of x and u, beside
    their rank products. shrunk, shrunk_mlp: o's and down's. of_o, of_down: what these gave, where norms follow.
    Attention keeps its output itself, autograd the layer's input.
    """
    hidden, heads = x.size(-1), parts.heads + parts.kv_heads
    widths = {"qkv": (heads + parts.kv_heads) * parts.width, "u": hidden}
    widths["inner"] = sum(p.weight.shape[0] for p in parts.inner)
    widths |= {"normed": hidden + rank_of(parts.qkv), "normed_mlp": hidden + rank_of(parts.inner)}
    widths |= {"shrunk": rank_of((parts.o,)), "shrunk_mlp": rank_of((parts.down,))}
    if parts.norms is not None:
        widths["turned"] = heads * parts.width
    if parts.after is not None:
        widths |= {"of_o": hidden, "of_down": hidden}
    return widths


def own_bytes(rows: int, parts: LayerParts, x: Tensor) -> int:
    """What an `Own` of so many rows takes."""
    values = rows * sum(own_widths(parts, x).values()) + count_of(parts.groups)
    return values * x.element_size() + 2 * rows * _scales_of(x).itemsize


def _scales_of(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Own(Buffers):
    """The buffers of `own_widths`; `values`: the adapters as the forward read them (`adapter_values`); `scales`: the
    two norms' r (capacity,), as `rms_norm_forward` returns it.

    Args:
        capacity: rows.
        parts: the layer.
        like: (..., h) of the computation's dtype and device.
    """

    def __init__(self, capacity: int, parts: LayerParts, like: Tensor) -> None:
        super().__init__(capacity, own_widths(parts, like), like)
        self.values = like.new_zeros(count_of(parts.groups))
        self.scales = [like.new_zeros(capacity, dtype=_scales_of(like)) for _ in range(2)]
        self._lease: ref[Lease] | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + sum(r.nbytes for r in self.scales) + super().nbytes

    @property
    def taken(self) -> bool:
        """Whether somebody is to run a backward on what is here."""
        return self._lease is not None and self._lease() is not None

    def lend(self) -> Lease:
        """To whoever just ran a forward, for its backward. Raises RuntimeError where they are taken."""
        if self.taken:
            raise RuntimeError("a layer's own buffers hold what another backward needs")
        lease = Lease()
        self._lease = ref(lease)
        return lease

    def turned(self, shape: torch.Size, parts: LayerParts) -> Turned:
        """q, k and v of the tokens of (B, S, h), where they are."""
        tokens = shape[0] * shape[1]
        over = None if parts.norms is None else self.rows("turned", tokens)
        key = "heads", *shape[:2], parts.heads, parts.kv_heads, parts.width
        return self.view(key, lambda: heads_in(self.rows("qkv", tokens), over, shape, parts))
