"""Whether a model's fused layers are faster than the modules they stand for: its first decoder layer, both ways.

On a GPU the two times are kept in the user's cache, by GPU, versions and layer: a run that goes on decides as it began.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch
from slothrl_kernels import kept_timings
from torch import Tensor, nn

from slothrl.fuse_replace import Replacement
from slothrl.fuse_trace import random_embeddings

TOKENS = 512  # few: where the host is waited for, and a small model could lose
WARMUPS, REPEATS = 2, 5
SUBJECT = "fused_layers"  # the file's name
MARGIN = 1.05  # times the modules' time from which on fusing has lost: clocks differ by less from run to run


class Timing(NamedTuple):
    """Milliseconds of one decoder layer's forward and backward, the fastest of a few; kept: of an earlier run."""

    fused: float
    plain: float
    kept: bool = False

    @property
    def loses(self) -> bool:
        return self.fused > MARGIN * self.plain

    def __str__(self) -> str:
        said = f"one layer, {TOKENS} tokens, there and back: {self.fused:.2f} ms fused, {self.plain:.2f} ms as it was"
        return f"{said} (kept from an earlier run in {kept_timings.timings_file(SUBJECT)})" if self.kept else said


class _Reached(Exception):
    """The layer's call is known: the forward need not go on."""


def time_layer(base: Any, replacements: Sequence[Replacement]) -> Timing | None:
    """The first decoder layer of `base` with the replacements in it, and without; or what an earlier run found of it.

    Call it inside of a `trial`. Nothing of it stays: no gradient, no hook, the replacements as installed as they were.

    Args:
        base: a causal language model of transformers, without PEFT's wrapper.
        replacements: what `fuse` installed, in that order.

    Returns:
        None where there is no such layer, or nothing in it is replaced.
    """
    replaced = {replacement.module for replacement in replacements}
    stacks = (list(module) for module in base.modules() if isinstance(module, nn.ModuleList))  # the outermost first
    layer = next((stack[0] for stack in stacks if stack and replaced & set(stack[0].modules())), None)
    if layer is None:
        return None
    mine = [replacement for replacement in replacements if replacement.module in set(layer.modules())]
    group = kept_timings.timed_on(next(layer.parameters()).device)
    if group is None:
        return _timed(base, layer, mine)
    key = layer_key(base, layer, mine)
    if (timing := _recalled(group, key)) is None:
        timing = _timed(base, layer, mine)
        kept_timings.keep(SUBJECT, group, key, {"fused": timing.fused, "plain": timing.plain})
    return timing


def layer_key(base: Any, layer: nn.Module, replacements: Sequence[Replacement]) -> str:
    """What decides how long a layer takes, as text: modules, sizes, dtypes, how it attends, what is replaced."""
    names = {module: name for name, module in layer.named_modules()}
    config = base.config.get_text_config()
    made_of: list[Any] = [(name, type(module).__name__) for module, name in names.items()]
    made_of += [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in layer.named_parameters()]
    made_of += [(names[r.module], type(r).__name__, str(getattr(r, "impl", ""))) for r in replacements]
    made_of += [
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "sliding_window")
    ]
    made_of += [getattr(config, "_attn_implementation", None), getattr(layer, "gradient_checkpointing", None)]
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    kind = next((p.dtype for p in layer.parameters() if not p.requires_grad), torch.float32)
    return f"{type(layer).__name__}, {config.hidden_size} wide, {str(kind)[6:]}, {TOKENS} tokens, {digest}"


def _recalled(group: str, key: str) -> Timing | None:
    stored = kept_timings.recall(SUBJECT, group).get(key)
    try:
        return None if stored is None else Timing(float(stored["fused"]), float(stored["plain"]), kept=True)
    except (TypeError, KeyError, ValueError):
        return None


def _timed(base: Any, layer: nn.Module, mine: Sequence[Replacement]) -> Timing:
    args, kwargs = _call_of(base, layer)
    x = args[0].detach().requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    taken: dict[bool, list[float]] = {True: [], False: []}
    try:
        for _ in range(WARMUPS + REPEATS):
            for fused in (False, True):
                for replacement in mine:
                    replacement.install() if fused else replacement.remove()
                taken[fused].append(_milliseconds(layer, (x, *args[1:]), kwargs, leaves))
    finally:
        for replacement in mine:
            replacement.install()
    fused, plain = (min(taken[way][WARMUPS:]) for way in (True, False))
    return Timing(fused, plain)


def _call_of(base: Any, layer: nn.Module) -> tuple[tuple, dict[str, Any]]:
    """What the layer is called with for TOKENS random embeddings."""
    seen: list[tuple[tuple, dict[str, Any]]] = []

    def reached(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = layer.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        base(**random_embeddings(base, TOKENS))
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _milliseconds(layer: nn.Module, args: tuple, kwargs: dict[str, Any], leaves: list[Tensor]) -> float:
    device = leaves[0].device
    _wait(device)
    begin = perf_counter()
    with torch.enable_grad():
        y = layer(*args, **kwargs)
        y = y if isinstance(y, Tensor) else y[0]
        torch.autograd.grad(y, leaves, y.detach(), allow_unused=True)
    _wait(device)
    return 1e3 * (perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
