"""What a decoder layer is made of: the arguments of `decoder_layer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from slothrl_kernels.glu import Activation
from slothrl_kernels.lora_math import Projection
from slothrl_kernels.qk_norm_rope import QKNorm
from slothrl_kernels.switch import Impl

Keep = Literal["input", "attention", "all"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Keeper(Protocol):
    """Where what attention leaves for the backward waits: the host's memory, for one."""

    def pack(self, x: Tensor, first: bool = False) -> Any:
        """What stands for x meanwhile; x itself is not held once it is copied, and nobody may write to it before the
        layer after this one has closed its keeper. first: the layer's backward begins with it."""
        ...

    def unpack(self, held: Any) -> Tensor:
        """x again, of its shape and strides."""
        ...

    def close(self) -> None:
        """All of it has been packed, or has been used."""
        ...


class Norm(NamedTuple):
    """RMSNorm as `rms_norm` takes it; its weight is frozen."""

    weight: Tensor
    eps: float
    shift: float
    cast_first: bool


class LayerParts(NamedTuple):
    """One decoder layer: x + o(attention(norm(x))), and onto that its gated MLP of its norm.

    first, second: the norms before attention and MLP, over h.
    qkv: one projection for q, k and v, or three; outputs (heads + 2 kv_heads) * width. o: heads * width -> h.
    heads, kv_heads, width: of attention; width entries a head.
    tables: cos and sin (B or 1, S, R) as `rope` takes them, or None: no rotation (NoPE).
    norms: the weights (width,) of norms over the heads of q and of k before the rotation (Qwen 3), or None; both are of
        the kind `norm`. Only with tables.
    attend: q (B, heads, S, width), k and v (B, kv_heads, S, width) -> (B, S, heads, width), differentiable, without
        random numbers: it may be run twice.
    inner, down: the MLP's, as of `lora_mlp`.
    keep: what the backward finds: the layer's input alone; attention's inputs and output too; or all that takes a large
        GEMM to compute.
    impl: of the kernels.
    after: norms over h of what o and what down give, before that is added to the stream (Gemma 2 and 3), or None.
    keeper: takes what is kept of attention; None: it stays where it is. Not with keep "all".
    """

    first: Norm
    qkv: tuple[Projection, ...]
    heads: int
    kv_heads: int
    width: int
    tables: tuple[Tensor, Tensor] | None
    norms: tuple[Tensor, Tensor] | None
    norm: QKNorm
    attend: Attend
    o: Projection
    second: Norm
    inner: tuple[Projection, ...]
    down: Projection
    activation: Activation
    keep: Keep
    impl: Impl
    after: tuple[Norm, Norm] | None = None
    keeper: Keeper | None = None

    @property
    def groups(self) -> list[tuple[Projection, ...]]:
        """Projections that share an input: q, k and v; o; gate and up; down."""
        return [self.qkv, (self.o,), self.inner, (self.down,)]

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.qkv, self.o, *self.inner, self.down)

    def norm_weights(self) -> list[Tensor]:
        """Of all its norms."""
        return [norm.weight for norm in (self.first, self.second, *(self.after or ()))] + list(self.norms or ())

    def after_o(self) -> Norm | None:
        return None if self.after is None else self.after[0]

    def after_down(self) -> Norm | None:
        return None if self.after is None else self.after[1]

    def adapters(self) -> list[Tensor | None]:
        """A_1, B_1, A_2, …: what gets gradients."""
        return [t for p in self.projections for t in (p.a, p.b)]

    def check(self, x: Tensor) -> None:
        """Raise ValueError where shapes do not fit x (B, S, h) or something else than adapters requires grad."""
        h, wide = x.size(-1), self.heads * self.width
        qkv, inner = (sum(p.weight.shape[0] for p in group) for group in (self.qkv, self.inner))
        inputs = {p.weight.shape[1] for p in (*self.qkv, *self.inner)}
        if x.dim() != 3 or inputs != {h} or qkv != wide + 2 * self.kv_heads * self.width:
            raise ValueError(f"x {tuple(x.shape)} and projections of {inputs} inputs, {qkv} for q, k, v do not fit")
        if tuple(self.o.weight.shape) != (h, wide) or tuple(self.down.weight.shape) != (h, inner // 2):
            raise ValueError(f"o {tuple(self.o.weight.shape)} or down {tuple(self.down.weight.shape)} do not fit")
        if self.norms is not None and self.tables is None:
            raise ValueError("norms of q and k without a rotation after them")
        biases = [p.bias for p in self.projections if p.bias is not None]
        weights = [p.weight for p in self.projections if isinstance(p.weight, Tensor)]
        if any(t.requires_grad for t in (*self.norm_weights(), *biases, *weights)):
            raise ValueError("only adapters get gradients: freeze norms, biases and weights, or use plain torch")
