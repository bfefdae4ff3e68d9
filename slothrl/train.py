"""`python -m slothrl train`: Hydra's command line, with every mistake found before anything heavy is imported."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from slothrl.errors import ConfigError, UserError

USAGE = """\
python -m slothrl [train] [--config-dir FOLDER] [--multirun] [--dry-run] [group=choice] [key=value] …

Without arguments: GRPO on the embedded model. Groups and their choices:
{groups}
Every field of TRL's GRPOConfig (SFTConfig for algo=sft) is trainer.<field>=…
  --config-dir FOLDER  your own groups; a file of the same name replaces ours
  --multirun, -m       one run a combination: algo=grpo,gspo seed=0,1
  --dry-run            show the plan and whether it will fit, and stop: exit code 2 where it will not
  --cfg job            print the composed config and stop
Other commands: {commands}
  (python -m slothrl commands says what each does)
Examples:
  python -m slothrl algo=dapo trainer.max_steps=50 'reward.functions=[./my_reward.py:score]'
  python -m slothrl model=hub model.name=Qwen/Qwen2.5-0.5B-Instruct data=gsm8k
"""
INTERRUPTED = 130  # what a shell gives for Ctrl-C
DRY = "--dry-run"
SIGNALLED = (INTERRUPTED, 143)  # and for SIGTERM
INFORMATION = {"--info", "-i", "--hydra-help", "--cfg", "-c", "--version", "--shell-completion", "-sc"}


def main(argv: list[str]) -> int:
    """Check, then train; returns the exit code."""
    from slothrl.compose import check_jobs, register, with_defaults
    from slothrl.resume import recalled

    try:
        overlay, rest = _take_overlay(recalled(argv))
        register(overlay)
        if {"--help", "-h"} & set(rest):
            print(usage())
            return 0
        flags = [a for a in rest if a.startswith("-")]
        overrides = with_defaults([a for a in rest if not a.startswith("-") and not _is_value(a, rest)])
        values = [a for a in rest if _is_value(a, rest)]
        multirun = bool({"--multirun", "-m"} & set(flags))
        if not INFORMATION & {flag.split("=")[0] for flag in flags}:
            _check_hydra_folder(overrides, "hydra.sweep.dir" if multirun else "hydra.run.dir")
            jobs = expand(overrides) if multirun else [_without_hydra(overrides)]
            check_jobs(jobs, anywhere=DRY in flags)
            if DRY in flags:
                return _dry_run(jobs, overlay)
        record = [] if multirun else _hydra_folder(overrides)
        return _hydra_main([*_pair(flags, values), *overrides, *record])
    except UserError as error:
        return fail(error)


def _dry_run(jobs: list[list[str]], overlay: Path | None) -> int:
    from slothrl.dry_run import dry_run

    return dry_run(jobs, overlay)


def _take_overlay(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Split off --config-dir, which Hydra would rank behind our own files."""
    rest, overlay, i = [], None, 0
    while i < len(argv):
        name, _, value = argv[i].partition("=")
        if name in ("--config-dir", "-cd"):
            if not value:
                i += 1
                value = argv[i] if i < len(argv) else ""
            overlay = Path(value).expanduser()
            if not value or not overlay.is_dir():
                raise ConfigError([f"--config-dir {value}: no such folder"])
        else:
            rest.append(argv[i])
        i += 1
    return overlay, rest


def _is_value(argument: str, arguments: list[str]) -> bool:
    """Whether `argument` is the word behind a flag such as --cfg."""
    i = arguments.index(argument)
    return i > 0 and arguments[i - 1] in INFORMATION and not argument.startswith("-") and "=" not in argument


def _pair(flags: list[str], values: list[str]) -> list[str]:
    waiting = list(values)
    return [word for flag in flags for word in ([flag, waiting.pop(0)] if flag in INFORMATION and waiting else [flag])]


def _hydra_folder(overrides: list[str]) -> list[str]:
    """Hydra's own record of the run beside the run's other files, where a folder is named."""
    from slothrl.resume import run_folder

    named = {o.partition("=")[0]: o.partition("=")[2] for o in overrides}
    if "hydra.run.dir" in named:
        return []
    if folder := named.get("resume"):  # the first part's record stays
        folder = run_folder(Path(folder))
        return [f"hydra.run.dir={folder}", "hydra.output_subdir=null"] if folder.is_dir() else []
    folder = named.get("output_dir")
    return [f"hydra.run.dir={folder}"] if folder and not folder.startswith("~") else []


def _check_hydra_folder(overrides: list[str], key: str) -> None:
    """Hydra answers with a traceback where it cannot make its own folder."""
    from slothrl.checks import unwritable

    folder = {"hydra.run.dir": "outputs", "hydra.sweep.dir": "multirun"}[key]  # conf/config.yaml
    for override in overrides:
        name, _, value = override.partition("=")
        if name == key:
            folder = value.strip("'\"").split("${")[0]  # what stands before the date
    if reason := unwritable(Path(folder).expanduser().absolute()):
        raise ConfigError([f"{key}={folder}: {reason}"])


def _without_hydra(overrides: list[str]) -> list[str]:
    return [o for o in overrides if not o.lstrip("+~").startswith("hydra")]


def expand(overrides: list[str]) -> list[list[str]]:
    """The jobs of a --multirun line, as Hydra's basic sweeper makes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(_without_hydra(overrides))
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]


def usage() -> str:
    from slothrl.__main__ import COMMANDS
    from slothrl.compose import conf_dir

    groups = sorted(folder for folder in conf_dir().iterdir() if folder.is_dir())
    lines = [f"  {g.name:8} {', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups]
    return USAGE.format(groups="\n".join(lines), commands=", ".join(name for name in COMMANDS if name != "train"))


def _hydra_main(arguments: list[str]) -> int:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    code = 0

    def job(config) -> None:
        nonlocal code
        code = max(code, _job(config))
        if code in SIGNALLED:  # Ctrl-C means the whole sweep
            sys.exit(code)

    previous, sys.argv = sys.argv, ["slothrl", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=None, config_name="config")(job)()
    except SystemExit:
        if code not in SIGNALLED:
            raise
    finally:
        sys.argv = previous
    return code


def _job(config) -> int:
    """One run inside Hydra; mistakes become lines on stderr and an exit code, never a traceback."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from slothrl.interrupts import exit_code
    from slothrl.resume import record_command, run_folder

    runtime = HydraConfig.get()
    resumed = run_folder(Path(config.resume).expanduser()) if config.resume else None
    folder = Path(config.output_dir).expanduser() if config.output_dir else resumed or Path(runtime.runtime.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return fail(UserError(f"output_dir={folder}: {error.strerror}"))
    from slothrl.compose import SearchPath
    from slothrl.run import run

    overlay = ["--config-dir", str(SearchPath.overlay.resolve())] if SearchPath.overlay else []
    command = [*overlay, *runtime.overrides.task]
    record_command(folder, command)
    try:
        summary = run(config, folder.resolve(), overrides=command)
    except UserError as error:
        _retry(config, error, folder.resolve(), command, sweep=runtime.mode == RunMode.MULTIRUN)
        return fail(error)
    except KeyboardInterrupt as error:
        return _stopped(folder.resolve(), error)
    return exit_code(signal.Signals[summary.signal]) if summary.signal else 0


def _retry(config, error: UserError, folder: Path, command: list[str], sweep: bool) -> None:
    """Where `retry_smaller` asks for it and it can help, this does not come back: the smaller run takes over."""
    from slothrl.faults import OutOfMemoryFault
    from slothrl.retry import smaller_run, start_over

    if isinstance(error, OutOfMemoryFault) and (again := smaller_run(config, error, folder, command)):
        if sweep:
            print("retry_smaller: not in a sweep, whose other runs are still to come", file=sys.stderr)
            return
        fail(error)
        start_over(again)


def _stopped(folder: Path, error: KeyboardInterrupt) -> int:
    """Say where a run can go on that a signal ended at once; the exit code."""
    from slothrl.checkpoint import checkpoints
    from slothrl.interrupts import Stopped, exit_code
    from slothrl.resume import resume_command

    print("stopped", file=sys.stderr)
    if checkpoints(folder):
        print(f"go on with: {resume_command((), folder)}", file=sys.stderr)
    return exit_code(error.number if isinstance(error, Stopped) else signal.SIGINT)


def fail(error: UserError) -> int:
    """Say what is wrong, a line each, and give the exit code for it."""
    lines = error.problems if isinstance(error, ConfigError) else [str(error)]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return error.exit_code
