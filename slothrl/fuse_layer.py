"""A whole decoder layer as one step of autograd, in place of its modules; by call, where it does just what they do.

The layer's own code is not run then, nor its modules. What they are is read anew at each call: adapters get switched,
disabled, merged, hooks get put on them. Whatever the step does not do exactly, the module's own forward does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from slothrl_kernels import Impl, QKNorm
from slothrl_kernels.decoder_layer import decoder_layer
from slothrl_kernels.layer_parts import Keep, Keeper, LayerParts, Norm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slothrl.fuse_layers import LinearReader
from slothrl.fuse_mlp import FusedMLP
from slothrl.fuse_norm import FusedNorm
from slothrl.fuse_replace import Replacement

# Of a layer's keywords those that are not handed on to the function that computes attention.
_TAKEN = ("attention_mask", "past_key_values", "position_embeddings")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Attention:
    """An attention module: its layers, and how it calls the function that attends.

    linears: q, k and v, or one for all three; and o. norms: of q and of k, or none.
    heads, kv_heads, width: as `LayerParts`. options: the keywords it adds to those it was given.
    rotates: whether q and k are turned.
    """

    module: nn.Module
    linears: Sequence[nn.Module]
    norms: Sequence[FusedNorm]
    heads: int
    kv_heads: int
    width: int
    options: dict[str, Any]
    rotates: bool

    @property
    def numbers(self) -> int:
        """What is kept of a token for attention's backward beside its output: q, k and v; before their norms, too."""
        qkv = (self.heads + 2 * self.kv_heads) * self.width
        return 2 * qkv if self.norms else qkv


class Attend:
    """(q, k, v) -> what the model's choice of attention makes of them, under the masks and keywords of one call."""

    def __init__(self, module: nn.Module, mask: Any, options: dict[str, Any]) -> None:
        self.module, self.mask, self.options = module, mask, options
        plain: Any = type(module).forward
        config: Any = self.module.config
        name = config._attn_implementation
        self.function = ALL_ATTENTION_FUNCTIONS.get_interface(name, plain.__globals__.get("eager_attention_forward"))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(self.module, q, k, v, self.mask, **self.options)[0]


class FusedLayer(Replacement):
    """norm, attention, residual, norm, gated MLP, residual; or with a norm before each sum too (Gemma 2 and 3).

    norms: two, or four, in the order of the forward.

    Under transformers' checkpointing it keeps what is to be kept itself; `Direct` then stands before it in the place of
    torch's `checkpoint`.
    """

    def __init__(
        self, module: nn.Module, norms: Sequence[FusedNorm], attention: Attention, mlp: FusedMLP, impl: Impl
    ) -> None:
        super().__init__(module)
        self.norms, self.attention, self.mlp = norms, attention, mlp
        self.impl: Impl = impl
        self.inner = [reader.layer for reader in mlp.readers]
        self.readers = [LinearReader(linear) for linear in (*attention.linears, *self.inner)]
        inside = [m for m in module.modules() if m is not module]
        self.dropouts = [m for m in inside if isinstance(m, nn.modules.dropout._DropoutNd)]
        held = {*attention.linears, *self.inner, attention.module, mlp.module}
        self.places = [
            (m, name, child) for m in module.modules() for name, child in m.named_children() if child in held
        ]
        self.hooks = [vars(m)[name] for m in inside for name in _HOOKS]  # the modules' own: they fill and empty
        self.graphs: Any = None  # `LayerGraphs` of the model
        self._planned: LayerParts | None = None  # by `Direct`, for the forward that follows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts, self._planned = self._planned, None
        if parts is not None:
            return self._step(args[0], parts)
        checkpointed = getattr(self.layer, "gradient_checkpointing", False) and self.layer.training
        if checkpointed and not self._stands_alone():
            return self.original(*args, **kwargs)
        parts = self.plan(args, kwargs, "input" if checkpointed or not torch.is_grad_enabled() else "all")
        if parts is None:
            return self.original(*args, **kwargs)
        # Called from inside of torch's checkpoint: what is given to autograd to keep would be computed anew.
        return self._step(args[0], parts, save=not checkpointed)

    def _step(self, x: Tensor, parts: LayerParts, save: bool = True) -> Tensor:
        if self.graphs is None:
            return decoder_layer(x, parts, save=save)
        return self.graphs.run(self, decoder_layer, x, parts, save)

    def plan(self, args: tuple, kwargs: Mapping[str, Any], keep: Keep) -> LayerParts | None:
        """What this call computes, or None: the module's own forward has to."""
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or x.dim() != 3 or not self._plain(kwargs):
            return None
        found = [reader.read(x) for reader in self.readers]
        projections = tuple(r.projection for r in found if r is not None and r.plain and r.dtype == r.out_dtype)
        if len(projections) < len(found) or any(r is not None and r.dtype != x.dtype for r in found):
            return None
        if any(p.bias is not None and p.bias.requires_grad for p in projections):
            return None
        held = [*self.norms, *self.attention.norms]
        norms = [made for norm in held if (made := _norm(norm, x)) is not None]
        own = norms[: len(self.norms)]
        tables = kwargs.get("position_embeddings") if self.attention.rotates else None
        if len(norms) < len(held) or (self.attention.rotates and not self._fits(tables, x)):
            return None
        attention, count = self.attention, len(self.attention.linears)
        over = (norms[-2].weight, norms[-1].weight) if attention.norms else None
        after = (own[1], own[3]) if len(own) == 4 else None
        kind = QKNorm(*attention.norms[0].numbers()) if attention.norms else QKNorm()
        given = {key: value for key, value in kwargs.items() if key not in _TAKEN}
        attend = Attend(attention.module, kwargs.get("attention_mask"), {**attention.options, **given})
        qkv, o, inner, down = projections[: count - 1], projections[count - 1], projections[count:-1], projections[-1]
        shape = (attention.heads, attention.kv_heads, attention.width)
        return LayerParts(
            own[0], qkv, *shape, tables, over, kind, attend, o,
            own[len(own) // 2], inner, down, self.mlp.activation, keep, self.impl, after,
        )  # fmt: skip

    @property
    def rest(self) -> int:
        """Values of a token that a layer which computes nothing again keeps beside x and attention's: the sum after
        attention, gate and up, and where norms come before the sums what these norm."""
        hidden, inner = self.inner[-1].out_features, 2 * self.inner[-1].in_features
        return inner + (3 if len(self.norms) == 4 else 1) * hidden

    def remove(self) -> None:
        super().remove()
        self.graphs = None
        function = vars(self.module).get("_gradient_checkpointing_func")
        if isinstance(function, Direct):
            self.layer._gradient_checkpointing_func = function.theirs

    @property
    def layer(self) -> Any:
        return self.module

    def run(self, function: Any, args: tuple, keep: Keep, keeper: Keeper | None = None) -> tuple[Any]:
        """(the result of `function`, which ends in this forward,), or () where a checkpoint is needed around it."""
        keywords = function.keywords if isinstance(function, partial) else {}
        parts = self.plan(args, keywords, keep if torch.is_grad_enabled() else "input")
        if parts is None:
            return ()  # pyright: ignore
        self._planned = parts._replace(keeper=keeper)
        try:
            return (function(*args),)
        finally:
            self._planned = None

    def _stands_alone(self) -> bool:
        """Inside of a checkpoint: whether it is torch's, not reentrant; from the next call on it is left out."""
        theirs = self.layer._gradient_checkpointing_func
        if not is_plain_checkpoint(theirs):
            return False
        self.layer._gradient_checkpointing_func = Direct(self, theirs)
        return True

    def _plain(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether only the result is asked for, of modules that this step stands for."""
        return kwargs.get("past_key_values") is None and not kwargs.get("output_attentions") and self.untouched

    @property
    def untouched(self) -> bool:
        """Whether the modules inside are those of old, watched by nobody, and drop nothing out."""
        if any(self.hooks) or any(parent._modules.get(name) is not child for parent, name, child in self.places):
            return False
        return not any(m.p and m.training for m in self.dropouts)

    def _fits(self, tables: Any, x: Tensor) -> bool:
        """Whether cos and sin are tables as `rope` takes them, over whole heads or their beginning, in x's dtype."""
        cos = tables[0] if isinstance(tables, tuple) and len(tables) == 2 else None
        if not isinstance(cos, Tensor) or cos.dim() != 3 or cos.dtype != x.dtype or cos.shape != tables[1].shape:
            return False
        return cos.size(0) in (1, x.size(0)) and cos.size(1) == x.size(1) and 0 < cos.size(2) <= self.attention.width


class Direct:
    """In the place of a layer's checkpointing function: the fused layer alone where it keeps things itself."""

    def __init__(self, fused: FusedLayer, theirs: Any) -> None:
        self.fused, self.theirs = fused, theirs

    def __call__(self, function: Any, *args: Any) -> Any:
        for result in self.fused.run(function, args, "input"):
            return result
        return self.theirs(function, *args)


def is_plain_checkpoint(function: Any) -> bool:
    """Whether it is torch's `checkpoint`, in the way that is not reentrant."""
    mine = isinstance(function, partial) and function.func is checkpoint
    return mine and not function.keywords.get("use_reentrant", True)


def fused_layer(layer: nn.Module) -> FusedLayer | None:
    """What `fuse` put on this layer."""
    found = getattr(vars(layer).get("forward"), "__self__", None)
    return found if isinstance(found, FusedLayer) else None


def _norm(norm: FusedNorm, x: Tensor) -> Norm | None:
    weight: Any = norm.module.weight
    if weight.requires_grad or (norm.cast_first and weight.dtype != x.dtype):
        return None
    return Norm(weight, getattr(norm.module, norm.eps), norm.shift, norm.cast_first)
