"""report.md: one run as text, for a terminal, an issue or a diff."""

from __future__ import annotations

import re
from collections.abc import Sequence

from slothrl.diagnosis import diagnose
from slothrl.report_curves import missing
from slothrl.report_tables import (
    CURVES,
    OUTCOME,
    config_rows,
    curve_rows,
    failure_rows,
    hash_rows,
    memory_rows,
    outcome_rows,
    override_line,
    sample_rows,
    version_rows,
)
from slothrl.run_record import RunRecord

# What Markdown, or HTML inside it, gives a meaning to.
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$-])")


def markdown_report(record: RunRecord) -> str:
    """The report as Markdown. Every text of the run is escaped, so that a completion is shown and not rendered."""
    steps = record.steps[-1]["step"] if record.steps else 0
    headings, memory = memory_rows(record)
    findings = [f"- **{f.level}**: {plain(f.text)}" + _helps(f.knob) for f in diagnose(record)]
    curves = [table(CURVES, curve_rows(record)), *(f"Not measured: {plain(reason)}." for reason in missing(record))]
    parts = [
        (f"# {plain(record.title)}: {record.state}, {steps} steps", [code(override_line(record))]),
        ("## Diagnosis", ["\n".join(findings)]),
        ("## Held-out scores", [table(OUTCOME, outcome_rows(record))]),
        ("## Curves", curves),
        ("## Memory by phase", [table(headings, memory)]),
        ("## Reward calls", [table(("function", "status", "completions", "share"), failure_rows(record))]),
        ("## Held-out completions", [table(("prompt", "before", "score", "after", "score"), sample_rows(record))]),
        ("## Versions", [table(("what", "value"), version_rows(record))]),
        ("## Made of", [table(("what", "value"), hash_rows(record))]),
        ("## Config", [table(("name", "value"), config_rows(record))]),
    ]
    shown = [(title, [part for part in body if part]) for title, body in parts]
    return "\n\n".join("\n\n".join([title, *body]) for title, body in shown if body) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of escaped cells; empty where there are no rows."""
    if not rows:
        return ""
    lines = [[plain(cell) for cell in row] for row in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    said = SPECIAL.sub(r"\\\1", str(value))
    return " ".join(said.split())


def code(line: str) -> str:
    """A fenced block with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{line}\n{fence}"


def _helps(knob: str) -> str:
    return f" What helps: {plain(knob)}." if knob else ""
