"""Going on with a run: what it was started with, which checkpoint, whether it is still the same run, and its logs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from slothrl import checkpoint as checkpoints
from slothrl.checkpoint import BadCheckpointError
from slothrl.errors import ConfigError, UserError
from slothrl.run_lock import only_writer

RUN = "run.json"
LOGS = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl")
OVERLAY = "--config-dir"


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint that belongs to this run."""

    path: Path
    step: int


# --- the command line -------------------------------------------------------------------------------------------------


def record_command(folder: Path, arguments: Sequence[str]) -> None:
    """Write down what a run is started with, so that `resume=FOLDER` alone goes on with it. The first part's stays."""
    path = folder / RUN
    if not path.exists():
        kept = [word for word in arguments if _key(word) not in ("resume", "resume_changed")]
        path.write_text(json.dumps({"arguments": kept}, indent=1) + "\n", encoding="utf-8")


def recalled(arguments: Sequence[str]) -> list[str]:
    """The command line with `resume=auto` settled, and with what the resumed run was started with put before it.

    Raises:
        ConfigError: `resume=auto` in a sweep.
    """
    given = _settled(list(arguments))
    named = _value(given, "resume")
    path = run_folder(Path(named).expanduser()) / RUN if named else None
    if path is None or not path.is_file():
        return given
    return recorded(path.parent, given)


def recorded(run: Path, given: Sequence[str]) -> list[str]:
    """What the run in folder `run` was started with, without what `given` replaces, and then `given`."""
    first: list[str] = json.loads((run / RUN).read_text(encoding="utf-8"))["arguments"]
    if any(word.partition("=")[0] == OVERLAY for word in given):
        first = first[2:] if first[:1] == [OVERLAY] else first
    # The run may have been moved: where it lies now is where it goes on.
    replaced = {_key(word) for word in given if "=" in word} | {"output_dir", "resume"}
    return [*(word for word in first if "=" not in word or _key(word) not in replaced), *given]


def run_folder(path: Path) -> Path:
    """The run folder of a run folder or of a checkpoint in it."""
    return path.absolute().parent if checkpoints.step_of(path) >= 0 else path


def resume_command(overrides: Sequence[str], output_dir: Path) -> str:
    """The command that goes on with the run in `output_dir`."""
    kept = [] if (output_dir / RUN).is_file() else [o for o in overrides if _key(o) not in ("resume", "output_dir")]
    return " ".join(shlex.quote(part) for part in ["python", "-m", "slothrl", *kept, f"resume={output_dir}"])


def _settled(given: list[str]) -> list[str]:
    if _value(given, "resume") != "auto":
        return given
    if {"--multirun", "-m"} & set(given):
        raise ConfigError(["resume=auto goes on with one run: it does not go with --multirun"])
    rest = [word for word in given if _key(word) != "resume"]
    named = _value(rest, "output_dir")
    folder = Path(named).expanduser() if named else _latest_run()
    if folder is None or not checkpoints.checkpoints(folder):
        print(f"resume=auto: no checkpoint in {folder or 'outputs'}; starting afresh", flush=True)
        _clear(folder)
        return rest
    return [*rest, f"resume={folder}"]


def _clear(folder: Path | None) -> None:
    """Put aside the logs of a part that ended before its first checkpoint: their steps would be there twice."""
    found = [folder / name for name in LOGS if (folder / name).exists()] if folder is not None else []
    if folder is None or not found or (folder / "summary.json").exists():
        return
    with only_writer(folder):  # it may be a run that is still before its first checkpoint
        for path in found:
            path.rename(path.with_name(f"{path.name}.abandoned"))


def _latest_run() -> Path | None:
    """The newest run under outputs/ that has checkpoints and did not finish."""
    runs = sorted((p.parent for p in Path("outputs").glob(f"*/*/{RUN}")), reverse=True)
    return next((run for run in runs if checkpoints.checkpoints(run) and not _finished(run)), None)


def _finished(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("resume") is None


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _value(words: Sequence[str], key: str) -> str | None:
    found = [word.partition("=")[2].strip("'\"") for word in words if "=" in word and _key(word) == key]
    return found[-1] if found else None


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def find(place: Path, console: Console) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to go on from and its manifest: `place` itself, or the newest good one inside it.

    Raises:
        UserError: there is none.
    """
    if checkpoints.step_of(place) >= 0:
        try:
            return place, checkpoints.verify(place)
        except BadCheckpointError as error:
            raise UserError(f"resume={place}: {error}") from None
    search = checkpoints.newest(place)
    for path, reason in search.skipped:
        console.print(f"skipped {path.name}: {reason}", markup=False, style="yellow")
    if search.found is None:
        none = "no checkpoint there" if not search.skipped else "no checkpoint there can be used"
        raise UserError(f"resume={place}: {none}; without resume=… the run starts from the beginning")
    return search.found, checkpoints.read_manifest(search.found)


def settle(
    place: Path, output_dir: Path, made_of: dict[str, Any], settings: dict[str, Any], changed: bool, console: Console
) -> ResumePoint:
    """Find the checkpoint, hold it against the run that is to go on, and take the logs back to it.

    Args:
        place: a run folder or a checkpoint.
        output_dir: the run folder that goes on; its later checkpoints and log lines are put away.
        made_of: `fingerprint` of the run as it is now.
        settings: its trainer fields and what else makes its updates.
        changed: go on although `made_of` differs.

    Raises:
        UserError: no usable checkpoint, or it belongs to another run: the differences, a line each.
    """
    from slothrl.fingerprint import differences

    path, manifest = find(place, console)
    if different := differences(manifest.get("fingerprint") or made_of, made_of):
        if not changed:
            raise UserError(_refusal(path, different))
        console.print(f"resume_changed: {'; '.join(different)}", markup=False, style="yellow")
    for line in differences(manifest.get("settings") or settings, settings):
        console.print(f"changed since {path.name}: {line}", markup=False)
    step = int(manifest["step"])
    console.print(f"going on from {path.name}: every file verified", markup=False)
    if path.absolute().parent == output_dir.absolute():
        for moved in checkpoints.set_aside(output_dir, above=step):
            console.print(f"renamed to {moved.name}: the run goes on from step {step}", markup=False)
        take_back(output_dir, manifest.get("logs", {}), console)
    return ResumePoint(path, step)


def _refusal(path: Path, different: list[str]) -> str:
    lines = "\n".join(f"  {line}" for line in different)
    return (
        f"resume={path} was saved by a run made of something else (then -> now):\n{lines}\n"
        "  resume_changed=true goes on all the same: optimizer, schedule and the number of steps done carry over"
    )


def log_lengths(folder: Path) -> dict[str, int]:
    """Bytes of each log as it is now, for the manifest."""
    return {name: (folder / name).stat().st_size for name in LOGS if (folder / name).exists()}


def take_back(folder: Path, lengths: dict[str, int], console: Console) -> None:
    """Cut the logs to what they were at the checkpoint, so that no step is in them twice."""
    for name in LOGS:
        path = folder / name
        if not path.exists():
            continue
        content = path.read_bytes()
        kept = content[: lengths.get(name, 0)]
        kept = kept[: kept.rfind(b"\n") + 1]  # a crash of the machine may have torn the last line
        if kept != content:
            lost = content[len(kept) :].count(b"\n")
            console.print(f"{name}: {lost} lines of steps that are done again removed", markup=False)
            path.write_bytes(kept)
