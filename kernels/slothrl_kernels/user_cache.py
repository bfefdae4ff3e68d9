"""JSON files in the user's cache, ~/.cache/slothrl (or under XDG_CACHE_HOME): read if they can be, written whole."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def cached(name: str) -> Path:
    """Where this user's file of that name is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "slothrl" / f"{name}.json"


def read(file: Path) -> dict[str, Any]:
    """What it holds; nothing where there is none, or none that can be read."""
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def write(file: Path, stored: dict[str, Any]) -> None:
    """All of it or, with an OSError (a home that is read only, a full disk), nothing."""
    new = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(stored, indent=1))
        new.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
