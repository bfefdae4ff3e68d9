"""A run's report, written at its end, however it ends, and again by `python -m slothrl report`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slothrl.report import write_json
from slothrl.run_record import FAULT, read_run

REPORT_HTML, REPORT_MARKDOWN = "report.html", "report.md"


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Write the report when the block ends; one that fails to be written is told and breaks nothing."""
    fault = folder / FAULT
    fault.unlink(missing_ok=True)  # of the part of the run before
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk is a reason to be here
            write_json(fault, {"type": type(error).__name__, "message": str(error)})
        raise
    finally:
        _write_if_possible(folder)


def _write_if_possible(folder: Path) -> None:
    if not any((folder / name).exists() for name in ("metrics.jsonl", "held_out.jsonl")):
        return  # nothing was measured
    try:
        write_report(folder)
    except Exception as error:  # the run's own outcome must not be hidden by its report's
        again = f"python -m slothrl report {folder}"
        print(f"note: no report was written ({type(error).__name__}: {error}); again: {again}", file=sys.stderr)


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.md into a run folder; returns their paths.

    Raises:
        UserError: there is no run.
        OSError: they cannot be written.
    """
    from slothrl.report_html import html_report
    from slothrl.report_markdown import markdown_report

    record = read_run(folder)
    html, markdown = record.folder / REPORT_HTML, record.folder / REPORT_MARKDOWN
    html.write_text(html_report(record), encoding="utf-8", errors="replace")
    markdown.write_text(markdown_report(record), encoding="utf-8", errors="replace")
    return html, markdown
