"""Runs held against each other: the settings that differ, what came of them, and their curves in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from slothrl.diagnosis import WARNING, diagnose
from slothrl.outcome import outcome
from slothrl.report_curves import panels
from slothrl.report_page import card, page, section, table
from slothrl.report_tables import told
from slothrl.run_record import RunRecord, flat
from slothrl.svg_chart import line_chart

PLACES = ("output_dir", "resume", "resume_changed")  # where a run lies is no setting
SHORT = 60  # characters of a value in the terminal


def names(records: Sequence[RunRecord]) -> list[str]:
    """A short name a run: its folder's, with the parent's where two are the same."""
    short = [record.folder.name for record in records]
    return [
        name if short.count(name) == 1 else f"{record.folder.parent.name}/{name}"
        for name, record in zip(short, records, strict=True)
    ]


def different_settings(records: Sequence[RunRecord]) -> list[list[str]]:
    """[name, value in each run] of everything that is not the same in all: config, hashes, versions, device."""
    parts = [_settings(record) for record in records]
    keys = dict.fromkeys(key for part in parts for key in part)
    rows = [[key, *(_said(part.get(key)) for part in parts)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _settings(record: RunRecord) -> dict[str, Any]:
    about = record.about
    config = {name: value for name, value in flat(about.get("config") or {}).items() if name not in PLACES}
    versions = {f"version of {name}": value for name, value in (about.get("versions") or {}).items()}
    others = {name: about[name] for name in ("engine", "device") if name in about}
    # batches.* repeats trainer fields, lora.* the model's.
    made_of = {
        k: v for k, v in (about.get("made_of") or {}).items() if k.split(".")[0] in ("dataset", "model", "rewards")
    }
    return {**config, **{f"made of {name}": value for name, value in made_of.items()}, **others, **versions}


def _said(value: Any) -> str:
    return "-" if value is None else str(value)


def outcomes(records: Sequence[RunRecord]) -> list[list[str]]:
    """[what, value in each run]: state, steps, seconds, held-out scores with their intervals, warnings."""
    measured = [{m.name: m for m in outcome(record)} for record in records]
    rows = [
        ["state", *(record.state for record in records)],
        ["steps", *(str(record.steps[-1]["step"]) if record.steps else "0" for record in records)],
        ["seconds of training", *(_said(record.summary.get("train_seconds")) for record in records)],
    ]
    for name in dict.fromkeys(name for part in measured for name in part):
        found = [part.get(name) for part in measured]
        rows.append([f"{name}, before", *(told(m.before if m else None) for m in found)])
        rows.append([f"{name}, after", *(told(m.after if m else None) for m in found)])
        rows.append([f"{name}, change", *(told(m.change if m else None, signed=True) for m in found)])
    warnings = [sum(finding.level == WARNING for finding in diagnose(record)) for record in records]
    return [*rows, ["warnings of the diagnosis", *map(str, warnings)]]


def show_comparison(records: Sequence[RunRecord], console: Console) -> None:
    """Print both tables."""
    titles = names(records)
    settings = different_settings(records)
    for title, rows in (("settings that differ", settings), ("outcomes (95% intervals)", outcomes(records))):
        shown = Table(title=title, title_justify="left")
        for heading in ("", *titles):
            shown.add_column(heading, overflow="fold")
        for row in rows or [["none", *("" for _ in titles)]]:
            shown.add_row(*(cell if len(cell) <= SHORT else f"{cell[: SHORT - 1]}…" for cell in row))
        console.print(shown, markup=False)


def html_comparison(records: Sequence[RunRecord]) -> str:
    """The page as a string: both tables whole, and every curve of the runs that share it."""
    titles, columns = names(records), range(1, len(records) + 1)
    settings = table(("setting", *titles), different_settings(records), texts=columns)
    return page(
        f"{' · '.join(titles)}: slothrl comparison",
        [
            "<h1>Runs compared</h1>",
            section("Outcomes, 95% intervals", table(("", *titles), outcomes(records))),
            section("Settings that differ", settings or "<p>None.</p>"),
            section("Curves", f'<div class="curves">{"".join(overlaid(records))}</div>'),
        ],
    )


def overlaid(records: Sequence[RunRecord]) -> list[str]:
    """A card a curve, the runs in colours of their own. Of panels with several curves each gets a card."""
    curves: dict[tuple[str, str, bool], list[tuple[str, Any]]] = {}  # (title, unit, smooth): the runs' points
    for name, record in zip(names(records), records, strict=True):
        for panel in panels(record):
            for line in panel.lines:
                title = panel.title if len(panel.lines) == 1 else f"{panel.title}: {line.name}"
                curves.setdefault((title, panel.unit, panel.smooth), []).append((name, line.points))
    return [card(title, line_chart(lines, unit, smooth), unit) for (title, unit, smooth), lines in curves.items()]
