"""A transformers causal language model run over a pack: no padding, prompts shared, its own weights and modules.

transformers asks a public registry for the attention of every layer (`AttentionInterface`). Under the name
`slothrl_packed` it finds `packed_attention` there, and builds no mask, since nobody registered one of that name. The
layout travels as a keyword through the model's forward. Window, softcap, scale and grouped heads are what each layer
passes. Only the configs of the one model are told the name, and only inside `packed_mode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from slothrl_kernels.attention_choice import AttentionImpl
from slothrl_kernels.packed_attention import packed_attention
from slothrl_kernels.packed_layout import PackedLayout
from torch import Tensor, nn
from transformers import AttentionInterface

from slothrl.logprobs import _base_model

NAME = "slothrl_packed"
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout")  # one thing by three names
# What some layers add to their scores and packed_attention does not know: sinks, learned biases, chosen keys.
_NOT_SERVED = ("s_aux", "position_bias", "indices", "block_indices")


@contextmanager
def packed_mode(model: nn.Module) -> Iterator[None]:
    """Let `packed_forward` run on `model`; its forward and its backward both belong inside.

    The backward too, because gradient checkpointing runs the layers again there. Inside, no other forward of this model
    is possible: without a layout, its attention raises. On the way out the configs are as they were. Models that were
    made from one config object share it and change together.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not.
    """
    AttentionInterface.register(NAME, _attention)
    with attention_by(model, NAME):
        yield


@contextmanager
def attention_by(model: nn.Module, name: str) -> Iterator[None]:
    """Inside of it every config of `model` asks transformers' registry for attention by this name."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name  # the property would spread it over other sub-configs
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def packed_forward(model: nn.Module, input_ids: Tensor, layout: PackedLayout, impl: AttentionImpl = "auto") -> Tensor:
    """Hidden states of a pack after the model's last norm, before its head; differentiable.

    The decoder is called directly: adapters apply, a wrapper around `model.forward` (accelerate's autocast) does not.

    Args:
        model: as given to the `packed_mode` around this call.
        input_ids: (T,) int64, the segments of `layout` one after the other.
        layout: on the device of the input ids.
        impl: of `packed_attention`.

    Returns:
        (T, h).

    Raises:
        RuntimeError: outside of `packed_mode`; in the backward, when that runs outside of it.
        ValueError: input ids that do not fit the layout, attention dropout, PEFT prompt learning.
    """
    if input_ids.shape != (layout.tokens,):
        raise ValueError(f"input_ids must be ({layout.tokens},) as the layout says, not {tuple(input_ids.shape)}")
    base = _base_model(model)
    _check_mode(base)
    hidden = _hidden(base, input_ids, layout, packed_impl=impl)
    if hidden.requires_grad:  # the first thing that a backward comes to, before any layer is run again
        hidden.register_hook(lambda gradient: _check_mode(base))
    return hidden


def _hidden(base: Any, input_ids: Tensor, layout: PackedLayout, **options: Any) -> Tensor:
    backbone = getattr(base, base.base_model_prefix)
    rows = {"input_ids": input_ids[None], "position_ids": layout.position_ids[None]}
    return backbone(**rows, use_cache=False, packed_layout=layout, **options).last_hidden_state.squeeze(0)


def supports_packing(model: nn.Module) -> str | None:
    """None if `packed_forward` on this model is what its own forward is on separate rows; else the reason why not.

    It is tried, on 14 tokens, against transformers' eager attention, since no list of architectures says it: layers
    without attention (Mamba, linear attention), attention that does not ask the registry, sinks and biases that
    `packed_attention` does not know. Dropout is off meanwhile; nothing of the model is changed.
    """
    config = _base_model(model).config.get_text_config()
    if found := [f"{name}={value}" for name in _DROPOUTS if (value := getattr(config, name, None))]:
        return f"packed attention has no dropout, and the model's config says {found[0]}"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return _try_packing(model)
    finally:
        for module, training in modes:
            module.training = training


def _try_packing(model: nn.Module) -> str | None:
    base = _base_model(model)
    backbone = getattr(base, base.base_model_prefix)
    device = base.get_input_embeddings().weight.device
    layout = PackedLayout.build([3, 4, 2, 5], [-1, 0, 0, -1], device)
    ids = torch.arange(layout.tokens, device=device) * 7 % (base.config.get_text_config().vocab_size - 1) + 1
    rows = [ids[:7], torch.cat([ids[:3], ids[7:9]]), ids[9:]]
    with attention_by(model, "eager"):  # transformers' sdpa leaves out softcaps and sinks without a word
        alone = [backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
    wanted = torch.cat([alone[0], alone[1][3:], alone[2]])
    changed = ids.clone()
    changed[3:7] = changed[3:7].flip(0)
    asked = []
    try:
        with packed_mode(model):
            packed = _hidden(base, ids, layout, packed_impl="torch", packed_asked=asked)
            sibling_changed = _hidden(base, changed, layout, packed_impl="torch")
    except (TypeError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        return f"{type(base).__name__} does not run over a pack: {error}"
    layers = base.config.get_text_config().num_hidden_layers
    if len(asked) < layers:
        return (
            f"{len(asked)} of {layers} layers of {type(base).__name__} ask transformers' registry for their attention"
        )
    # 16 bits: what rounding adds up to over many layers, and LLM.int8's outliers, which it finds over the whole batch.
    tolerance = 1e-3 if packed.dtype in (torch.float32, torch.float64) else 0.1
    if (error := _distance(packed, wanted)) > tolerance:
        return f"{type(base).__name__} computes something else over a pack than row by row (off by {error:.0%})"
    others = torch.tensor([i for i in range(layout.tokens) if not 3 <= i < 7], device=device)
    if (error := _distance(sibling_changed[others], packed[others])) > tolerance / 2:
        return f"in {type(base).__name__} sequences of a pack see each other (off by {error:.0%})"
    return None


def _distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|; nan counts as infinitely far."""
    distance = ((x.double() - y.double()).norm() / y.double().norm()).item()
    return distance if distance == distance else float("inf")


def _configs(model: nn.Module) -> list[Any]:
    """Every config that a module of the model holds and may ask for its attention; each once."""
    found = {}
    for module in _base_model(model).modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def _check_mode(base: Any) -> None:
    if getattr(base, base.base_model_prefix).config._attn_implementation != NAME:
        raise RuntimeError("packed_forward and the backward that follows it must run inside packed_mode(model)")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout | None = None,
    packed_impl: AttentionImpl = "auto",
    packed_asked: list[nn.Module] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (1, Hq, T, d), key and value (1, Hkv, T, d) -> (1, T, Hq, d), no weights.

    packed_asked: each module that comes here is added to it.
    """
    if packed_layout is None:
        raise RuntimeError(f"{type(module).__name__} was given no layout: inside packed_mode only packed_forward runs")
    if dropout:
        raise ValueError(f"attention dropout ({dropout}) is not supported over a pack: set attention_dropout to 0")
    if attention_mask is not None or query.size(0) != 1 or others.get("is_causal") is False:
        raise ValueError(f"{type(module).__name__} makes masks or batches of its own, or is not causal")
    if unserved := [name for name in _NOT_SERVED if others.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} adds {', '.join(unserved)} to its attention")
    if packed_asked is not None:
        packed_asked.append(module)
    if torch.is_autocast_enabled(query.device.type):  # as it does torch's own attention: RoPE may have promoted q and k
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    # (T, heads, d): how projections lay them out. Not x[0], whose gradient is written into zeros, head by head.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = packed_attention(q, k, v, packed_layout, scaling, sliding_window, softcap, packed_impl)
    return out[None], None
