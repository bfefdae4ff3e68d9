"""`python -m slothrl report`: the report of one run again, or several runs held against each other."""

from __future__ import annotations

import sys
from pathlib import Path

from slothrl.errors import ConfigError, UserError

USAGE = """\
python -m slothrl report RUN                       writes RUN/report.html and RUN/report.md, and prints the diagnosis
python -m slothrl report RUN_A RUN_B … [--out FILE]  compares runs: a table here, and compare.html with the curves
                                                   laid over each other, beside the first run or at FILE
RUN is a run folder, or a checkpoint or the adapter in it.
"""


def main(argv: list[str]) -> int:
    """Report or compare; returns the exit code."""
    from slothrl.train import fail

    try:
        if {"--help", "-h"} & set(argv):
            print(USAGE)
            return 0
        places, out = _arguments(argv)
        return _report(places[0]) if len(places) == 1 else _compare(places, out)
    except UserError as error:
        return fail(error)
    except OSError as error:
        return fail(UserError(f"{error.filename}: {error.strerror}"))


def _arguments(argv: list[str]) -> tuple[list[Path], Path | None]:
    """The runs, and where the comparison goes.

    Raises:
        ConfigError: no run, an unknown option, or `--out` for a single run.
    """
    places, out, waiting = [], None, list(argv)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name == "--out":
            out = Path(value if equals else waiting.pop(0) if waiting else "")
        elif word.startswith("-"):
            raise ConfigError([f"{word}: no such option of `slothrl report`; see --help"])
        else:
            places.append(Path(word))
    if not places:
        raise ConfigError(["report: name a run folder; see --help"])
    if out is not None and (len(places) == 1 or not out.name):
        raise ConfigError(["--out takes a file, and is for comparing several runs: a run's own report goes into it"])
    return places, out


def _report(place: Path) -> int:
    from slothrl.diagnosis import diagnose
    from slothrl.report_tables import outcome_rows
    from slothrl.run_record import read_run
    from slothrl.run_report import write_report

    record = read_run(place)
    for row in outcome_rows(record):
        print(f"{row[0]}: {row[1]} -> {row[2]}, change {row[3]}")
    for finding in diagnose(record):
        print(f"{finding.level}: {finding.text}" + (f"\n  what helps: {finding.knob}" if finding.knob else ""))
    for path in write_report(record.folder):
        print(f"wrote {path}")
    return 0


def _compare(places: list[Path], out: Path | None) -> int:
    from rich.console import Console

    from slothrl.report_compare import html_comparison, show_comparison
    from slothrl.run_record import read_run

    records = [read_run(place) for place in places]
    show_comparison(records, Console())
    target = out or records[0].folder.parent / "compare.html"
    target.write_text(html_comparison(records), encoding="utf-8", errors="replace")
    print(f"wrote {target}", file=sys.stderr)
    return 0
