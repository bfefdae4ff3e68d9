"""What was timed on a GPU, kept in the user's cache, so that the next run decides alike without timing it again.

One file a subject, ~/.cache/slothrl/SUBJECT.json (or under XDG_CACHE_HOME), beside that of `nf4_launches`; in it by GPU
and versions, and by what was timed. A file that cannot be read is as good as none, and one that cannot be written
costs nothing but timing again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from slothrl_kernels.switch import HAS_TRITON
from slothrl_kernels.user_cache import cached, read, write

KERNELS = 1  # what was timed with other kernels or layers is nobody's: to be raised when they get faster


def timings_file(subject: str) -> Path:
    """Where this user's timings of a subject are kept."""
    return cached(subject)


def timed_on(device: torch.device) -> str | None:
    """Which GPU and versions a timing is one of; None off CUDA, where nothing is kept."""
    if device.type != "cuda":
        return None
    triton = "none"
    if HAS_TRITON:
        import triton as package

        triton = package.__version__
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton}, kernels {KERNELS}"


def recall(subject: str, group: str | None) -> dict[str, Any]:
    """All that is kept of a subject for a group, by what was timed.

    Args:
        group: `timed_on` and what else decides; None: nothing is kept.
    """
    found = read(timings_file(subject)).get(group, {}) if group is not None else {}
    return found if isinstance(found, dict) else {}


def keep(subject: str, group: str | None, key: str, value: Any) -> bool:
    """Write one timing into its file, beside all others; whole or not at all.

    Args:
        value: what JSON can hold.

    Returns:
        Whether it is kept.
    """
    if group is None:
        return False
    file = timings_file(subject)
    stored = read(file)
    mine = stored.get(group)
    stored[group] = {**(mine if isinstance(mine, dict) else {}), key: value}
    try:
        write(file, stored)
    except OSError:
        return False
    return True


def damaged(subject: str) -> bool:
    """Whether there is a file of which nothing can be read; the next timing that is kept writes it anew."""
    file = timings_file(subject)
    return os.path.exists(file) and not read(file)
