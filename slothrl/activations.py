"""What a checkpointed layer keeps for its backward, and where: lossless, chosen anew at every forward.

    layer        its input (B, S, h): transformers' own checkpointing
    attention    the attention's output and log-sum-exp too (q, k and v where a layer is one step), so that the one part
                 of a layer whose cost grows with S is not run again, in as many layers as fit into half of the free
                 memory
    offload      as layer, with the input in the host's pinned memory, fetched again while the layer above is worked on
    all          everything that takes a large GEMM to compute, in as many layers as fit where a layer is one step:
                 nothing is computed twice there, in smaller micro-batches; in the others attention
    both         attention and offload: where a layer is one step all of it in the host's memory, as far as three
                 tenths of that go; else attention's on the device
    auto         on a GPU attention, where its share of a layer's FLOPs makes up for what saving takes, or where a layer
                 is one step and memory is plenty (`slothrl.kept_attention` says how much that is), and all in as many
                 of these as that memory has room for; else layer

Under each of them `model.activation_gib` has layers that are one step keep everything within so many GiB of the device
("auto" and "all": at most so many). They are the last layers of the forward. So they have given their memory back when
the first layer is computed again, and the peak of the backward is the higher one of the two:

    the last layers keep all     N w + its backward     or     what is computed again + its backward
    the first layers would       N w + what is computed again + its backward

(8B, 4,096 tokens, "both": w = 386 MB with its input; 369 MB for the backward of a layer that keeps all, 448 for the
head; 236 for two layers' copies and 639 for the backward of one that is computed again. So one whole layer adds nothing
to the peak, and two add 0.3 GiB and not 0.7.) With "offload" and "both" nothing of theirs goes to the host: the others'
last copies end, and their first come back, while they are worked on.

transformers asks each layer's `_gradient_checkpointing_func`, and trainers set it anew when they start: a hook in front
of the decoder puts ours there again, on this instance, and `release` takes both away.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from slothrl_kernels.layer_parts import Keep
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from slothrl.fuse_layer import Direct, fused_layer, is_plain_checkpoint
from slothrl.host_memory import free_of_host
from slothrl.kept_attention import (
    HOSTED,
    WORTH,
    AttentionSizes,
    in_host,
    layers_on_a_cpu,
    layers_that_keep,
    reserved_bytes,
)
from slothrl.offload import HostMemory
from slothrl.plan import Rows
from slothrl.token_bytes import bytes_per_token, bytes_to_come, left_beside, left_of_light

POLICIES = ("auto", "layer", "attention", "all", "offload", "both")
_KEPT = "_slothrl_activations"


def keep_activations(model: Any, policy: str, gib: float | None = None) -> Rows:
    """Let the checkpointed layers of `model` keep what `policy` says; rows for the plan table.

    It does nothing until gradient checkpointing is on, and nothing to reentrant checkpointing.

    Args:
        gib: GiB of the device's memory that layers which keep everything may take, counted in 16 bits; None: as the
            policy says.

    Raises:
        ValueError: an unknown policy, or a negative `gib`.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    release(model)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    owner, layers = _layers(base)
    if gib is not None and not gib >= 0:
        raise ValueError(f"activation_gib={gib}: GiB of memory, 0 or more")
    if owner is None or (policy == "layer" and gib is None):
        return [("activations", "layer inputs" if owner else "this model has no layers that transformers checkpoints")]
    kept = vars(model)[_KEPT] = Activations(owner, layers, policy, None if gib is None else int(gib * 2**30))
    words = {
        "layer": "layer inputs",
        "auto": f"layer inputs; attention too where it is {WORTH:.0%} of the work, or a layer is one step and it fits;"
        " then all that fits",
        "attention": "layer inputs and attention outputs, as far as they fit",
        "all": "all of a layer where that is one step, as far as it fits; else layer inputs and attention outputs",
        "offload": "layer inputs, in the host's memory",
        "both": "layer inputs in the host's memory; attention's too where a layer is one step, else on the device",
    }
    return [("activations", words[policy] + ("" if gib is None else kept.said(gib)))]


def release(model: nn.Module) -> None:
    """Take away what `keep_activations` put into `model`."""
    kept = vars(model).pop(_KEPT, None)
    if kept is not None:
        kept.remove()


def reserved_for_attention(model: nn.Module, tokens: int, free: int) -> int:
    """Bytes that a micro-batch's budget leaves for attention, for each of `tokens` tokens in one row, of `free`."""
    kept: Activations | None = vars(model).get(_KEPT)
    if kept is None:
        return 0
    config = kept.layers[0].self_attn.config
    each, usable = bytes_per_token(config, 2, checkpointing=True), left_beside(free, config, 0)
    return reserved_bytes(kept.policy, kept.sizes, tokens, free, each, kept.within, usable)


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that nobody has, or that torch's allocator holds for nobody."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class Activations:
    """Watches the forwards of a decoder and decides, for each, what its layers keep.

    Args:
        within: bytes that layers which keep everything may take; None: as the policy says.
    """

    def __init__(self, owner: nn.Module, layers: list[Any], policy: str, within: int | None = None) -> None:
        self.layers, self.policy, self.within = layers, policy, within
        self.trained = [p for p in owner.parameters() if p.requires_grad]
        self.host = HostMemory(len(layers)) if policy in HOSTED else None
        self.whole = self.attending = 0  # the last layers keep all, those before them their attention, in this forward
        self.handle = owner.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def said(self, gib: float) -> str:
        """What `gib` adds to the words about the policy."""
        if not self.sizes.whole:
            return f"; activation_gib={gib:g} does nothing: no layer is one step of autograd (model.fuse)"
        most = "at most " if self.policy in ("auto", "all") else ""
        return f"; everything of as many of the last layers as fit into {most}{gib:g} GiB (activation_gib)"

    def keeps(self, index: int) -> Keep:
        """What layer `index` keeps in this forward."""
        above = len(self.layers) - index  # it and those after it
        return "all" if above <= self.whole else "attention" if above <= self.whole + self.attending else "input"

    def remove(self) -> None:
        self.handle.remove()
        self._limit_recordings(None)
        for layer in self.layers:
            function = vars(layer).get("_gradient_checkpointing_func")
            if isinstance(function, _Checkpoint):
                layer._gradient_checkpointing_func = function.theirs

    def _before_forward(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        for index, layer in enumerate(self.layers):
            theirs = vars(layer).get("_gradient_checkpointing_func")
            theirs = theirs.theirs if isinstance(theirs, Direct) else theirs
            if is_plain_checkpoint(theirs):
                layer._gradient_checkpointing_func = _Checkpoint(self, index, theirs)
        if self.host is not None:
            self.host.begin()
        asks = self.policy not in ("layer", "offload") or self.within is not None
        if asks and given is not None and given.dim() >= 2 and torch.is_grad_enabled():
            layout = kwargs.get("packed_layout")  # its tokens do not all see each other
            reach = given.size(1) if layout is None else layout.max_position + 1
            self.whole, self.attending = self._how_many(given.size(0) * given.size(1), reach, given.device)
            if self.host is not None:
                self.host.staying = max(1, self.whole)
            self._limit_recordings(self.within)

    def _limit_recordings(self, most: int | None) -> None:
        fused = fused_layer(self.layers[0])
        if fused is not None and fused.graphs is not None:
            fused.graphs.most = most

    def _how_many(self, tokens: int, reach: int, device: torch.device) -> tuple[int, int]:
        """Layers that keep all, and others whose attention is kept.

        Args:
            tokens: of the forward. reach: the most keys that one of them sees.
        """
        sizes, count = self.sizes, len(self.layers)
        if device.type != "cuda":
            return layers_on_a_cpu(self.policy, sizes, tokens, self.within)
        hosted = self.host is not None and in_host(self.policy, sizes)
        room = (0, 0, 0) if hosted and self.within is None else self._room(tokens, device)
        keep = partial(layers_that_keep, self.policy, sizes, tokens, reach, *room, within=self.within)
        if self.host is None or not hosted:
            return keep()
        whole, pinned = keep()[0], self.host.spare(tokens * (sizes.bytes + 2 * sizes.hidden))
        if len(pinned) >= count - max(1, whole):  # of an earlier forward; the last layer's stays
            return whole, count - whole
        return keep(host=free_of_host() + sum(pinned))

    def _room(self, tokens: int, device: torch.device) -> tuple[int, int, int]:
        """`free`, `left` and `light` of `layers_that_keep`."""
        config, fused = self.layers[0].self_attn.config, fused_layer(self.layers[0])
        free = free_bytes(device) - bytes_to_come(self.trained)
        free += fused.graphs.idle if fused is not None and fused.graphs is not None else 0
        return free, left_beside(free, config, tokens), left_of_light(config, tokens)

    @property
    def sizes(self) -> AttentionSizes:
        """As the layers are now: they may have been fused since; while one is watched they run by their modules."""
        layer, config = self.layers[0], self.layers[0].self_attn.config
        heads, fused = config.num_attention_heads, fused_layer(layer)
        fused = fused if fused is not None and fused.untouched else None
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
        made = partial(AttentionSizes, len(self.layers), width, heads, weights, hidden=config.hidden_size)
        if fused is None:
            return made(width, whole=False)
        return made(width + fused.attention.numbers, whole=True, rest=fused.rest)


class _Checkpoint:
    """A layer's checkpointing function, in the place of transformers' own."""

    def __init__(self, activations: Activations, index: int, theirs: partial) -> None:
        self.activations, self.index, self.theirs = activations, index, theirs

    def __call__(self, function: Any, *args: Any) -> Any:
        activations, options, keeper = self.activations, {}, None
        keep = activations.keeps(self.index)
        if keep != "input":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
        host, fused = activations.host, fused_layer(activations.layers[self.index])
        if host is not None and keep == "attention":
            keeper = host.keeper(self.index, args[0] if args and isinstance(args[0], Tensor) else None)
        with nullcontext() if host is None else host.taking(self.index, keeper):
            for result in fused.run(function, args, keep, keeper) if fused else ():
                return result
            return self.theirs(function, *args, **options)


def keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Asked of each operation, by `create_selective_checkpoint_contexts`: attention of torch or flash-attn is kept."""
    name = str(operation)
    attends = ("attention" in name or "flash_attn" in name) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE


def _layers(base: nn.Module) -> tuple[nn.Module | None, list[Any]]:
    """(the decoder, its layers that transformers can checkpoint); those of the longest list, if there are several."""
    best: tuple[nn.Module | None, list[Any]] = (None, [])
    for owner in base.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList):
                layers = [m for m in child if hasattr(m, "_can_checkpoint_with_cache") and _has_attention(m)]
                if len(layers) == len(child) > len(best[1]):
                    best = (owner, layers)
    return best


def _has_attention(layer: Any) -> bool:
    return hasattr(getattr(getattr(layer, "self_attn", None), "config", None), "num_attention_heads")
