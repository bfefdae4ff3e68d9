"""Checkpoints on disk: written whole or not at all, verified before they are used, and free of pickles.

A checkpoint is a folder `checkpoint-<step>` of .safetensors and .json files. It is made under another name on the same
filesystem, every file is forced to the disk, `manifest.json` with their sha256 comes last, and one rename publishes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slothrl.errors import FaultError, UserError
from slothrl.plan import size

MANIFEST = "manifest.json"
FORMAT = 1
SUFFIXES = (".safetensors", ".json")  # all that is ever written or read
_NAME = re.compile(r"checkpoint-(\d+)")
_SCRATCH = re.compile(r"\.checkpoint-\d+\..*\.(tmp|old)")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BadCheckpointError(UserError):
    """A checkpoint that is not whole, or that holds what no checkpoint of ours does."""


class DiskFullError(FaultError):
    """A checkpoint did not fit on the disk. Nothing of it was left behind."""


@dataclass(frozen=True)
class Search:
    """What a run folder holds.

    Attributes:
        found: the newest checkpoint that verifies, None where none does.
        skipped: the newer ones that do not, each with the reason.
    """

    found: Path | None
    skipped: list[tuple[Path, str]]


# --- writing --------------------------------------------------------------------------------------------------------


def write(folder: Path, step: int, fill: Callable[[Path], None], about: dict[str, Any], needed: int = 0) -> Path:
    """Make `folder/checkpoint-<step>`, replacing one of that name.

    Args:
        fill: writes the files into the folder it is given.
        about: goes into the manifest: JSON values.
        needed: bytes that it will take, as far as one knows beforehand.

    Raises:
        DiskFullError: there is no room; earlier checkpoints are untouched.
        BadCheckpointError: `fill` wrote a file of another kind than safetensors or JSON.
    """
    target = folder / f"checkpoint-{step}"
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _disk_full(target, needed)
    scratch = folder / f".checkpoint-{step}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    scratch.mkdir()
    try:
        fill(scratch)
        _seal(scratch, step, about)
        _publish(scratch, target)
    except Exception as error:
        written = sum(path.stat().st_size for path in files_of(scratch))
        shutil.rmtree(scratch, ignore_errors=True)
        if _no_room(error):
            raise _disk_full(target, max(needed, written)) from error
        raise
    return target


def _seal(scratch: Path, step: int, about: dict[str, Any]) -> None:
    entries = {}
    for path in files_of(scratch):
        name = path.relative_to(scratch).as_posix()
        if path.suffix not in SUFFIXES:
            raise BadCheckpointError(f"{name} must not be in a checkpoint: safetensors and JSON only")
        _sync(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    manifest = scratch / MANIFEST
    record = {"format": FORMAT, "step": step, **about, "files": entries}
    manifest.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    _sync(manifest)
    for path in {scratch, *(path.parent for path in files_of(scratch))}:
        _sync(path)


def _publish(scratch: Path, target: Path) -> None:
    """Rename `scratch` to `target`; a folder cannot be renamed over a full one, so that one steps aside first."""
    aside = None
    if target.exists():
        aside = scratch.with_suffix(".old")
        target.rename(aside)
    scratch.rename(target)
    _sync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return True
    # safetensors raises its own type, with the system's number in the text.
    return any(f"os error {number}" in str(error) for number in NO_ROOM)


def _disk_full(target: Path, needed: int) -> DiskFullError:
    free = shutil.disk_usage(target.parent).free
    return DiskFullError(
        f"disk full: {target.name} needs {needed:,} bytes ({size(needed)}), and {free:,} ({size(free)}) are free in"
        f" {target.parent}: free some, or lower trainer.save_total_limit"
    )


# --- verifying ------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of one checkpoint. Raises `BadCheckpointError`."""
    try:
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadCheckpointError("it has no manifest.json: its save was cut off, or slothrl did not write it") from None
    except (OSError, ValueError) as error:
        raise BadCheckpointError(f"its manifest.json cannot be read ({type(error).__name__})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("files"), dict):
        raise BadCheckpointError(f"its manifest.json is not of format {FORMAT}")
    return record


def verify(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, which is returned.

    Raises:
        BadCheckpointError: a file is missing, changed, unknown, or neither safetensors nor JSON. An unknown file is
            never read here, but other programs would take a planted `optimizer.pt` or `adapter_model.bin` for data.
    """
    record = read_manifest(path)
    entries: dict[str, Any] = record["files"]
    there = {file.relative_to(path).as_posix() for file in files_of(path)} - {MANIFEST}
    if foreign := sorted(name for name in {*there, *entries} if Path(name).suffix not in SUFFIXES):
        raise BadCheckpointError(f"it holds {', '.join(foreign)}, and only safetensors and JSON are trusted")
    if unknown := sorted(there - set(entries)):
        raise BadCheckpointError(f"it holds {', '.join(unknown)}, of which its manifest knows nothing")
    if missing := sorted(set(entries) - there):
        raise BadCheckpointError(f"{', '.join(missing)} is missing")
    for name, entry in entries.items():
        if (found := (path / name).stat().st_size) != entry["bytes"]:
            raise BadCheckpointError(f"{name} has {found} bytes instead of {entry['bytes']}")
        if digest(path / name) != entry["sha256"]:
            raise BadCheckpointError(f"{name} is not what was saved: its sha256 differs")
    return record


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(path: Path) -> list[Path]:
    """Everything in a folder and below that is not itself a folder, sorted."""
    return sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())


# --- a run folder's checkpoints ---------------------------------------------------------------------------------------


def step_of(path: Path) -> int:
    """The optimizer step that a checkpoint's name tells; -1 for any other folder."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, verified or not, the newest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if step_of(p) >= 0 and p.is_dir()), key=step_of, reverse=True)


def newest(folder: Path) -> Search:
    """The newest checkpoint of a run folder that can be resumed from."""
    skipped = []
    for path in checkpoints(folder):
        try:
            if verify(path).get("resumable", True):
                return Search(path, skipped)
            skipped.append((path, "it holds the model only (trainer.save_only_model)"))
        except BadCheckpointError as error:
            skipped.append((path, str(error)))
    return Search(None, skipped)


def set_aside(folder: Path, above: int) -> list[Path]:
    """Rename the checkpoints past step `above`, from which nobody resumes any more; the new paths."""
    moved = []
    for path in checkpoints(folder):
        if step_of(path) > above:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def sweep(folder: Path) -> None:
    """Remove what saves that were cut off have left. Only the folder's one writer may call this."""
    for path in folder.glob(".checkpoint-*"):
        if _SCRATCH.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, limit: int | None, *keep: Path | None) -> None:
    """Delete the checkpoints written first until `limit` are left, but none of `keep`. None or 0: no limit.

    By time and not by step: the folder may hold those of an earlier run that went further.
    """
    if limit is None or limit <= 0:
        return
    found = sorted(checkpoints(folder), key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
    for path in list(found):
        if len(found) <= limit:
            return
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)
            found.remove(path)


def make_room(folder: Path, needed: int, limit: int | None, *keep: Path | None) -> None:
    """Where `needed` bytes are not free, delete now the oldest that the limit would delete after the save anyway."""
    if limit and limit > 1 and shutil.disk_usage(folder).free < needed:
        rotate(folder, limit - 1, *keep)
