"""report.html: one run on one page that needs nothing but itself."""

from __future__ import annotations

from slothrl.diagnosis import diagnose
from slothrl.outcome import Measurement, outcome
from slothrl.report_curves import Panel, missing, panels
from slothrl.report_page import card, details, page, section, table, text
from slothrl.report_tables import (
    OUTCOME,
    config_rows,
    failure_rows,
    hash_rows,
    memory_rows,
    method,
    outcome_rows,
    override_line,
    sample_rows,
    told,
    version_rows,
)
from slothrl.run_record import RunRecord
from slothrl.svg_chart import line_chart, stacked_bars


def html_report(record: RunRecord) -> str:
    """The page as a string. Completions, prompts and everything else a run holds are escaped."""
    headings, memory = memory_rows(record)
    samples = table(("prompt", "before", "score", "after", "score"), sample_rows(record), (2, 4), (0, 1, 3))
    return page(
        f"{record.title}: slothrl report",
        [
            _head(record),
            section("Diagnosis", *(_finding(found.level, found.text, found.knob) for found in diagnose(record))),
            section("Held-out scores", table(OUTCOME, outcome_rows(record), numbers=(1, 2, 3))),
            section("Curves", _curves(record)),
            section("Held-out completions, before and after", samples),
            section("Memory by phase", _memory(record), table(headings, memory, range(1, len(headings)))),
            section(
                "Reward calls", table(("function", "status", "completions", "share"), failure_rows(record), (2, 3))
            ),
            section("What was run", *_about(record)),
        ],
    )


def _head(record: RunRecord) -> str:
    state, summary = record.state, record.summary
    steps = record.steps[-1]["step"] if record.steps else 0
    facts = [f"{steps} steps"]
    if summary.get("train_seconds"):
        facts.append(f"{summary['train_seconds']:,.0f} s of training, {summary['seconds']:,.0f} s in all")
    facts += [str(record.about[name]) for name in ("started", "device", "model") if record.about.get(name)]
    cards = "".join(card(m.name, _score(m)) for m in outcome(record))
    return (
        f'<h1>{text(record.title)}<span class="pill {text(state)}">{text(state)}</span></h1>'
        f'<div class="soft">{text(" · ".join(facts))}</div><p></p><div class="cards">{cards}</div>'
    )


def _score(measurement: Measurement) -> str:
    before, after, change = measurement.before, measurement.after, measurement.change
    numbers = [f"{part.value:.3f}" for part in (before, after) if part is not None]
    inside = f'<div class="big">{text(" → ".join(numbers))}</div>'
    if change is not None:
        inside += f"<div>change {text(told(change, signed=True))}</div>"
        inside += f'<div class="soft">95%: {text(method(measurement))}</div>'
    return inside


def _finding(level: str, said: str, knob: str) -> str:
    helps = f"<p class='soft'>what helps: <code>{text(knob)}</code></p>" if knob else ""
    return f'<div class="finding {text(level)}"><p>{text(said)}</p>{helps}</div>'


def _curves(record: RunRecord) -> str:
    drawn = "".join(card(panel.title, draw(panel), panel.unit) for panel in panels(record))
    absent = "".join(f'<p class="soft">Not drawn: {text(reason)}.</p>' for reason in missing(record))
    return f'<div class="curves">{drawn}</div>{absent}' if drawn else ""


def draw(panel: Panel) -> str:
    return line_chart([(line.name, line.points) for line in panel.lines], panel.unit, panel.smooth)


def _memory(record: RunRecord) -> str:
    rows = [
        (str(phase.get("name")), {name: value / 1e9 for name, value in phase["parts"].items()})
        for phase in record.memory
        if isinstance(phase.get("parts"), dict)
    ]
    return card("The fullest moment of each phase", stacked_bars(rows, "GB")) if rows else ""


def _about(record: RunRecord) -> list[str]:
    names = ("name", "value")
    hashes = table(names, hash_rows(record), texts=(1,))
    return [
        f"<pre>{text(override_line(record))}</pre>",
        table(("", ""), version_rows(record)),
        details("Data, model, LoRA, rewards and batches, with their hashes", hashes),
        details("The whole config", table(names, config_rows(record), texts=(1,))),
    ]
