"""Where memory goes: bytes counted from the objects, what the device says, and an estimate of activations."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slothrl.host_embeddings import in_host
from slothrl.plan import size


@dataclass(frozen=True)
class Holding:
    """One line of where memory goes.

    Attributes:
        part: the bytes are of tensors counted here and nowhere else; False for what the device reports of all, and for
            what a GPU reads in the host's memory.
    """

    name: str
    bytes: int
    detail: str = ""
    part: bool = True


class _Ledger:
    """Bytes by kind, in the order in which kinds appear; memory that two tensors share is counted for the first."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}  # kind: [bytes, values, tensors]
        self.dtypes: dict[str, set[str]] = {}
        self._seen: set[tuple[torch.device, int]] = set()

    def add(self, kind: str, tensor: Any, values: int | None = None) -> None:
        """Count `tensor`, which holds `values` numbers where that is not its own size (packed weights)."""
        if not isinstance(tensor, Tensor) or tensor.numel() == 0 or tensor.is_meta:
            return
        # Not the storage's size: weights may be windows into one mapped checkpoint file.
        place = (tensor.device, tensor.data_ptr())
        if place in self._seen:
            return
        self._seen.add(place)
        row = self.rows.setdefault(kind, [0, 0, 0])
        row[0] += tensor.nbytes
        row[1] += tensor.numel() if values is None else values
        row[2] += 1
        self.dtypes.setdefault(kind, set()).add(str(tensor.dtype).removeprefix("torch."))

    def holdings(self) -> list[Holding]:
        return [
            Holding(kind, row[0], f"{_count(row[1])} values in {row[2]} tensors, {'/'.join(sorted(self.dtypes[kind]))}")
            for kind, row in self.rows.items()
        ]


def measure(model: nn.Module, optimizer: Any = None) -> list[Holding]:
    """Count what a model and its optimizer hold, by kind; tied weights once.

    Args:
        model: a transformers model, PEFT-wrapped or not, quantised by bitsandbytes or not.
        optimizer: its state is counted too; it is empty before the first step.

    Returns:
        One holding a kind that is there; for a model on a CUDA device also what torch and the driver say of the device,
        and, as no part, embeddings that are the device's in name only (`slothrl.host_embeddings`).
    """
    ledger, host = _Ledger(), _Ledger()
    embedding, head = _embedding(model, "get_input_embeddings"), _embedding(model, "get_output_embeddings")
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if in_host(parameter):
                host.add("embeddings, in the host's memory", parameter.data)
                continue
            kind = _kind(f"{prefix}.{name}", parameter, embedding, head)
            state = getattr(parameter, "quant_state", None)
            ledger.add(kind, parameter.data, None if state is None else state.shape.numel())
    for module in model.modules():
        _add_quantization(ledger, module)
    for buffer in model.buffers():
        ledger.add("buffers", buffer)
    for parameter in model.parameters():
        ledger.add("gradients", parameter.grad)
    for state in optimizer.state.values() if optimizer is not None else ():
        for value in state.values():
            ledger.add("optimizer state", value)
    holdings, elsewhere = ledger.holdings(), [replace(holding, part=False) for holding in host.holdings()]
    return holdings + elsewhere + _device_holdings(model, sum(holding.bytes for holding in holdings))


def _embedding(model: nn.Module, getter: str) -> int | None:
    """Where the weight of the input or output embeddings lies; None where the model has none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    module = getattr(base, getter)() if hasattr(base, getter) else None
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return None if weight is None else weight.data_ptr()


def _kind(name: str, parameter: nn.Parameter, embedding: int | None, head: int | None) -> str:
    if "lora_" in name:
        return "LoRA"
    if parameter.requires_grad:
        return "trainable weights"
    if getattr(parameter, "quant_state", None) is not None:
        return "4-bit weights"
    if parameter.dtype == torch.int8:
        return "8-bit weights"
    if parameter.data_ptr() == embedding:
        return "embeddings = head (tied)" if embedding == head else "embeddings"
    if parameter.data_ptr() == head:
        return "head"
    return "norms, biases" if parameter.ndim < 2 else "weights"


def _add_quantization(ledger: _Ledger, module: nn.Module) -> None:
    """What bitsandbytes keeps beside the packed weights: absmax, code books, offsets; row scales for int8."""
    for parameter in module.parameters(recurse=False):
        for tensor in _tensors(getattr(parameter, "quant_state", None)):
            ledger.add("quantisation state", tensor)
        ledger.add("quantisation state", getattr(parameter, "SCB", None))
    # An int8 layer moves weight and scales here in its first forward.
    state = getattr(module, "state", None)
    ledger.add("8-bit weights", getattr(state, "CB", None))
    ledger.add("quantisation state", getattr(state, "SCB", None))


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a bitsandbytes QuantState, and of the one inside it where it is doubly quantised."""
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, Tensor):
            yield value
        elif type(value) is type(state):
            yield from _tensors(value)


def _device_holdings(model: nn.Module, counted: int) -> list[Holding]:
    device = next((p.device for p in model.parameters() if p.is_cuda), None)
    if device is None:
        return []
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    others = f"{size(allocated - counted)} more than the sum: other tensors"
    return [
        Holding("torch allocated", allocated, others, part=False),
        Holding("torch reserved", reserved, "with the allocator's unused blocks", part=False),
        Holding("driver used", total - free, f"of {size(total)}: CUDA context, kernels, other processes", part=False),
    ]


def table(holdings: list[Holding]) -> str:
    """Holdings as aligned text, with the sum of the parts, and under it what the device says."""
    parts = [holding for holding in holdings if holding.part]
    total = Holding("sum", sum(holding.bytes for holding in parts))
    rows = [*parts, total, *(holding for holding in holdings if not holding.part)]
    width = max(len(row.name) for row in rows)
    lines = [f"{row.name:{width}}  {row.bytes / 1e6:>12,.2f} MB  {row.detail}".rstrip() for row in rows]
    lines.insert(len(parts), "-" * (width + 17))
    return "\n".join(lines)


def _count(values: int) -> str:
    return f"{values / 1e6:,.2f}M" if values >= 1e5 else f"{values:,}"


# --- activations ----------------------------------------------------------------------------------------------------


class SavedActivations:
    """What autograd keeps for the backward; `bytes` grows while the `saved_activations` block runs."""

    def __init__(self) -> None:
        self.storages: dict[tuple[torch.device, int], int] = {}

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Measure what a forward leaves for its backward: each storage once and whole, parameters and buffers aside.

    Keep the forward's result alive inside the block: memory that is freed and given out again counts once. Inside a
    checkpointed layer nothing is seen but the layer's inputs, which is what stays; the recomputation is not seen.
    """
    found = SavedActivations()
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found.storages[tensor.device, storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def activation_bytes(config: Any, tokens: int, checkpointing: bool, rank: int = 16) -> int:
    """Estimate what `tokens` tokens keep between forward and backward, logits aside.

    For Llama-like decoders (RMSNorm, grouped-query attention without [S, S] scores, gated MLP) with LoRA on all seven
    projections of a frozen base; half-precision computation means autocast over float32 LoRA weights, as the trainers
    do. With h the width, q = heads x head_dim, kv = kv_heads x head_dim, m the MLP's width, r the rank and e the bytes
    of a value, a token of one layer keeps

        8h + 8                      the inputs of both norms and their scales, in float32
        e (2h + 2q + 2kv + 4m + 7r) both norms' outputs; queries, attention output; keys, values; gate, SiLU(gate), up,
                                    their product; what the seven A matrices give
        4 heads                     attention's log-sum-exp, in float32
        e (3h + q)                  only over an unquantised half-precision base: PEFT casts the input of q, k, v, o,
                                    gate and up for each of them, where bitsandbytes' layers share one

    Without checkpointing all layers keep that. With it they keep their inputs, e h each, the final norm keeps 4h, and
    one layer at a time is recomputed: layers x e h + 4h + one layer. Not counted: rotary tables, masks, autocast's
    copies of the LoRA weights, and dropout; with padding in the batch attention repeats its keys and values.

    Args:
        config: of a transformers model; its `dtype` (bfloat16 if unset) is the computation's.
        tokens: of one micro-batch.
        checkpointing: whether gradient checkpointing is on.
        rank: LoRA's.
    """
    text = config.get_text_config()
    width = (getattr(text, "dtype", None) or torch.bfloat16).itemsize
    layer = _layer_bytes(text, width, getattr(config, "quantization_config", None) is not None, rank)
    if not checkpointing:
        return tokens * text.num_hidden_layers * layer
    return tokens * (text.num_hidden_layers * width * text.hidden_size + 4 * text.hidden_size + layer)


def _layer_bytes(text: Any, width: int, quantized: bool, rank: int) -> int:
    hidden, heads, mlp = text.hidden_size, text.num_attention_heads, text.intermediate_size
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    query, key_value = heads * head_dim, (getattr(text, "num_key_value_heads", None) or heads) * head_dim
    values = 2 * hidden + 2 * query + 2 * key_value + 4 * mlp + 7 * rank
    if width < 4 and not quantized:
        values += 3 * hidden + query
    return 8 * hidden + 8 + width * values + 4 * heads


@contextmanager
def memory_given_back() -> Iterator[None]:
    """A notebook or a sweep goes on after a run, whose trainer and model name each other and wait for the collector."""

    def free() -> None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    free()  # after a fault its traceback held everything until now
    try:
        yield
    finally:
        free()
