"""What was timed on a GPU, kept in the user's cache, so that the next run decides alike without timing it again.

One file a subject, ~/.cache/slothrl/SUBJECT.json (or under XDG_CACHE_HOME), beside that of `nf4_launches`; in it by GPU
and versions, and by what was timed. A file that cannot be read is as good as none, and one that cannot be written
costs nothing but timing again.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from slothrl_kernels.nf4_launches import cache_file
from slothrl_kernels.switch import HAS_TRITON

KERNELS = 1  # what was timed with other kernels or layers is nobody's: to be raised when they get faster


def timings_file(subject: str) -> Path:
    """Where this user's timings of a subject are kept."""
    return cache_file().with_name(f"{subject}.json")


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
    found = _read(timings_file(subject)).get(group, {}) if group is not None else {}
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
    new = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = _read(file)
        mine = stored.get(group)
        stored[group] = {**(mine if isinstance(mine, dict) else {}), key: value}
        new.write_text(json.dumps(stored, indent=1))
        new.replace(file)
        return True
    except OSError:  # a home that is read only, a full disk
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        return False


def damaged(subject: str) -> bool:
    """Whether there is a file of which nothing can be read; the next timing that is kept writes it anew."""
    file = timings_file(subject)
    return os.path.exists(file) and not _read(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
