"""Packed attention on the flash-attn package (Dao, arXiv:2307.08691), where it is installed: packs without parents.

By its documented function `flash_attn_varlen_func` alone, whose autograd knows no gradient of the log-sum-exp: two of
its calls cannot be merged as attention_flash.py merges torch's, so shared prefixes are not for it. The package is
imported the first time that it could serve.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.packed_layout import PackedLayout

ARGUMENTS = ("softmax_scale", "causal", "window_size", "softcap", "deterministic")
SOFTCAP_SINCE = (2, 7)  # earlier ones have it in the forward first, and in the backward of some head sizes


class Package(NamedTuple):
    """flash_attn_varlen_func and its version; or None, and why."""

    attend: Callable[..., Any] | None
    version: tuple[int, ...] = ()
    reason: str = ""


@cache
def package() -> Package:
    """The installed flash-attn, imported; tried once a process."""
    if importlib.util.find_spec("flash_attn") is None:
        return Package(None, reason="the flash-attn package is not installed")
    try:
        from flash_attn import flash_attn_varlen_func as attend  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, above all
        said = (str(error).splitlines() or [""])[0]
        return Package(None, reason=f"the flash-attn package cannot be imported: {said}")
    if missing := [name for name in ARGUMENTS if name not in inspect.signature(attend).parameters]:
        return Package(None, reason=f"this flash-attn has no {', '.join(missing)}: version 2.7 has")
    return Package(attend, tuple(int(n) for n in re.findall(r"\d+", installed_version())[:3]))


def installed_version() -> str:
    """Of the flash-attn package, without importing it; "none" where there is none."""
    try:
        return importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def refusal_of_package(q: Tensor, layout: PackedLayout, rule: Rule) -> str | None:
    """Why it cannot serve this call on CUDA, in words, or None."""
    if layout.has_parents:
        return "its interface gives no gradient across a shared prefix"
    if q.dtype not in (torch.bfloat16, torch.float16) or q.size(2) > 256:
        return f"it takes 16 bits and head sizes up to 256, not {q.dtype} and {q.size(2)}"
    if torch.version.cuda is not None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0"
    found = package()
    if found.attend is None:
        return found.reason
    if rule.softcap is not None and found.version < SOFTCAP_SINCE:
        return f"a softcap needs its version 2.7, not {installed_version()}"
    return None


def package_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, rule: Rule) -> Tensor:
    """`packed_attention` on checked arguments, of a layout without parents.

    Raises:
        RuntimeError: the package is not there.
    """
    found = package()
    if found.attend is None:
        raise RuntimeError(f"impl='flash_attn': {found.reason}")
    cu, longest = layout.cu_seqlens, layout.max_length
    return found.attend(
        q,
        k,
        v,
        cu,
        cu,
        longest,
        longest,
        softmax_scale=rule.scale,
        causal=True,
        # Keys on the left that a query sees beside its own; -1 is how the package says all.
        window_size=(-1, -1) if rule.window is None else (rule.window - 1, 0),
        softcap=rule.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
