"""Which backend attends over a pack: what each can do, and the fastest of them on this GPU, measured once a kind.

What was measured is kept in the user's cache (`kept_timings`): backends round differently, and so a later run, or one
that goes on, takes the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.attention
from torch import Tensor

from slothrl_kernels import kept_timings
from slothrl_kernels.attention_dense import is_dense
from slothrl_kernels.attention_package import installed_version, refusal_of_package
from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.packed_layout import PackedLayout
from slothrl_kernels.switch import takes_triton

AttentionImpl = Literal["auto", "flash", "flash_attn", "triton", "sdpa", "flex", "torch"]
IMPLS = ("flash", "flash_attn", "triton", "sdpa", "flex", "torch")
# Not measured: flex, whose compilation takes tens of seconds, and torch, which keeps all probabilities.
CANDIDATES = ("flash", "flash_attn", "triton", "sdpa")
SUBJECT = "attention_choices"  # the file's name


@dataclass(frozen=True)
class Choice:
    """The backend taken for a kind of call, and each candidate's milliseconds, forward and backward, or its error.

    Attributes:
        kept: an earlier process measured it.
    """

    impl: str
    measured: dict[str, float | str]
    kept: bool = False


CHOICES: dict[tuple, Choice] = {}  # what was measured, or taken over, in this process


def said() -> list[str]:
    """`CHOICES` in words, one line a kind of call: which backend is taken, and the milliseconds or error of each."""
    lines = []
    for (_, dtype, width, heads, kv_heads, window, softcap, parents, _, tokens, *_), choice in CHOICES.items():
        features = {"a window": window is not None, "a softcap": softcap, "shared prefixes": parents}
        kind = ", ".join([f"{heads} heads on {kv_heads} of {width}", *(name for name, has in features.items() if has)])
        times = "; ".join(
            f"{impl} {found:.2f} ms" if isinstance(found, float) else f"{impl}: {found}"
            for impl, found in choice.measured.items()
        )
        kept = f"; kept from an earlier run in {kept_timings.timings_file(SUBJECT)}" if choice.kept else ""
        lines.append(f"{choice.impl} for up to {2**tokens:,} tokens, {kind}, {str(dtype)[6:]} ({times}{kept})")
    return lines


def refusal(impl: str, q: Tensor, layout: PackedLayout, rule: Rule) -> str | None:
    """Why backend `impl` cannot serve this call, in words, or None."""
    if impl == "torch":
        return None
    if impl == "sdpa":
        if rule.window is not None or rule.softcap is not None:
            return "it knows no window and no softcap"
        return None if is_dense(layout) else "segments differ in length, or have parents"
    if impl == "triton":
        if q.dtype == torch.float64 or not 8 <= q.size(2) <= 256:
            return f"it takes 32 and 16 bits and head sizes from 8 to 256, not {q.dtype} and {q.size(2)}"
        return None
    if not q.is_cuda:
        return "it has no backward on a CPU"
    if impl == "flex":
        return "it takes 32 and 16 bits" if q.dtype == torch.float64 else None
    if impl == "flash_attn":
        return refusal_of_package(q, layout, rule)
    return _refusal_of_flash(q, layout, rule)


def _refusal_of_flash(q: Tensor, layout: PackedLayout, rule: Rule) -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without it"
    if torch.version.cuda is not None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0"
    if q.dtype not in (torch.bfloat16, torch.float16) or q.size(2) % 8 or q.size(2) > 256:
        return f"it takes 16 bits and head sizes of 8 to 256 in steps of 8, not {q.dtype} and {q.size(2)}"
    if rule.softcap is not None:
        return "torch's has no softcap"
    return "its window cannot reach across a prefix" if rule.window is not None and layout.has_parents else None


def choose(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule, run: Callable[..., Tensor]) -> str:
    """The backend for impl="auto": the reference off CUDA, else the fastest candidate that serves.

    Each kind of call is measured once, forward and backward on the tensors at hand, and remembered, here and in the
    user's cache: GPU, dtype, heads, features of the rule and the layout, token counts rounded up to powers of two.
    While a CUDA graph captures or torch.compile traces, and where only one serves, nothing is measured.

    Args:
        run: (impl, q, k, v, layout, rule) -> the output of `packed_attention` by that backend.
    """
    if not q.is_cuda:
        return "torch"
    serving = [
        impl
        for impl in CANDIDATES
        if refusal(impl, q, layout, rule) is None and (impl != "triton" or takes_triton("auto", q))
    ]
    if len(serving) < 2:
        return serving[0] if serving else "torch"
    key = _kind(q, k, layout, rule)
    if key not in CHOICES:
        if torch.compiler.is_compiling():
            return serving[0]
        group = measured_on(q.device)
        if (choice := _recalled(group, key, serving)) is None:
            if torch.cuda.is_current_stream_capturing():
                return serving[0]
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]  # the same memory
            choice = _measure(serving, lambda impl: run(impl, *leaves, layout, rule), leaves)
            if isinstance(choice.measured[choice.impl], float):  # else none of them ran
                kept_timings.keep(SUBJECT, group, _text(key), {"impl": choice.impl, "measured": choice.measured})
        CHOICES[key] = choice
    return CHOICES[key].impl


def measured_on(device: torch.device) -> str | None:
    """Which GPU and versions a choice is one for, those of FlashAttention among them; None off CUDA."""
    group = kept_timings.timed_on(device)
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)  # since torch 2.11; None: torch's own
    behind = current() if current is not None else None
    return group and f"{group}, flash {behind or 'of torch'}, flash-attn {installed_version()}"


def _text(key: tuple) -> str:
    return ", ".join(map(str, key[1:]))  # the GPU is the group's


def _recalled(group: str | None, key: tuple, serving: list[str]) -> Choice | None:
    """What an earlier process measured for this kind; None where nothing is kept that can be taken."""
    stored: Any = kept_timings.recall(SUBJECT, group).get(_text(key))
    if not isinstance(stored, dict) or stored.get("impl") not in serving:
        return None
    measured = stored.get("measured")
    return Choice(stored["impl"], measured if isinstance(measured, dict) else {}, kept=True)


def _kind(q: Tensor, k: Tensor, layout: PackedLayout, rule: Rule) -> tuple:
    sizes = (layout.tokens, layout.max_length, len(layout.prefix_tokens))
    window = None if rule.window is None else rule.window.bit_length()
    features = (window, rule.softcap is not None, layout.has_parents, is_dense(layout))
    name = torch.cuda.get_device_name(q.device)
    return (name, q.dtype, q.size(2), q.size(1), k.size(1), *features, *((n - 1).bit_length() for n in sizes))


def _measure(serving: list[str], run: Callable[[str], Tensor], leaves: list[Tensor]) -> Choice:
    """Time each candidate; one that fails, out of memory above all, is out, with its error beside the others' times."""
    measured: dict[str, float | str] = {}
    for impl in serving:
        try:
            measured[impl] = _milliseconds(lambda impl=impl: run(impl), leaves)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            measured[impl] = str(error).splitlines()[0]
    times = {impl: taken for impl, taken in measured.items() if isinstance(taken, float)}
    return Choice(min(times, key=lambda impl: times[impl]) if times else serving[0], measured)


def _milliseconds(call: Callable[[], Tensor], leaves: list[Tensor], repeats: int = 3) -> float:
    """The fastest of some forwards and backwards, after one that compiles."""

    def same(tensor: Tensor) -> Tensor:
        return tensor

    taken = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        # A checkpointed layer calls this too, and would take the backward here for its own and run itself again.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(same, same):
            out = call()
            torch.autograd.grad(out, leaves, out.detach())
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return min(taken[1:])
