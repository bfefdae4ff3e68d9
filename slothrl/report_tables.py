"""The tables of a report as plain rows, the same for HTML and Markdown."""

from __future__ import annotations

import shlex
import statistics
from typing import Any

from slothrl.diagnosis import quarters, statuses, values
from slothrl.intervals import Interval
from slothrl.outcome import Measurement, outcome
from slothrl.report_curves import panels
from slothrl.run_record import RunRecord, before_and_after, flat, is_number

SAMPLES = 6  # prompts shown before and after
SAMPLE_TEXT = 1500  # characters of each completion
OUTCOME = ("held out", "before", "after", "change", "interval (95%)")
CURVES = ("metric", "unit", "first quarter", "last quarter", "lowest", "highest")


def outcome_rows(record: RunRecord) -> list[list[str]]:
    return [[m.name, told(m.before), told(m.after), told(m.change, signed=True), method(m)] for m in outcome(record)]


def told(interval: Interval | None, signed: bool = False) -> str:
    """ "0.733 [0.555, 0.858]", or the number alone where its interval is a point for want of scores."""
    if interval is None:
        return "-"
    sign = "+" if signed else ""
    value = f"{interval.value:{sign}.3f}"
    unknown = interval.method.startswith("no interval")
    return value if unknown else f"{value} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def method(measurement: Measurement) -> str:
    """How the intervals were made: of the scores, and of the change."""
    scores = dict.fromkeys(part.method for part in (measurement.before, measurement.after) if part is not None)
    of_change = f"; change: {measurement.change.method}" if measurement.change is not None else ""
    return " and ".join(scores) + of_change


def curve_rows(record: RunRecord) -> list[list[str]]:
    """A row a curve: means of the first and the last quarter, and the extremes."""
    found = []
    for panel in panels(record):
        for line in panel.lines:
            numbers = values(line.points)
            first, last = quarters(numbers)
            name = panel.title if len(panel.lines) == 1 else f"{panel.title}: {line.name}"
            figures = (statistics.fmean(first), statistics.fmean(last), min(numbers), max(numbers))
            found.append([name, panel.unit, *(f"{figure:.4g}" for figure in figures)])
    return found


def sample_rows(record: RunRecord) -> list[list[str]]:
    """prompt, completion before, score, completion after, score: of the same held-out prompts.

    Prompts whose score changed come first, so that a few rows show what training did.
    """
    before, after = before_and_after(record.held_out, "metric")
    prompts, first = before.get("prompts") or [], before.get("completions") or []
    last = after.get("completions") or [None] * len(first)
    scores = [part.get("scores") or [None] * len(first) for part in (before, after)]
    if not first or len({len(last), len(scores[0]), len(scores[1]), len(first)}) > 1:
        return []
    prompts = prompts if len(prompts) == len(first) else [f"held-out prompt {i + 1}" for i in range(len(first))]
    # Gains, then losses, then the rest, two of each in turn: a few rows that are not chosen to please.
    kinds: list[list[int]] = [[], [], []]
    for i, (a, b) in enumerate(zip(*scores, strict=True)):
        known = is_number(a) and is_number(b)
        kinds[0 if known and b > a else 1 if known and b < a else 2].append(i)
    share = SAMPLES // 3
    chosen = [i for kind in kinds for i in kind[:share]]
    chosen += [i for kind in kinds for i in kind[share:]]
    return [
        [clip(prompts[i]), clip(first[i]), _score(scores[0][i]), clip(last[i]) if after else "-", _score(scores[1][i])]
        for i in chosen[:SAMPLES]
    ]


def clip(completion: Any) -> str:
    """Both ends of a long text: a reasoning completion ends with its answer."""
    said = str(completion)
    half = SAMPLE_TEXT // 2
    return (
        said if len(said) <= SAMPLE_TEXT else f"{said[:half]}\n[… {len(said) - 2 * half} characters …]\n{said[-half:]}"
    )


def _score(value: Any) -> str:
    return f"{value:.2f}" if is_number(value) else "-"


def memory_rows(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) in MB: a row a holder, a column a phase."""
    phases = [phase for phase in record.memory if isinstance(phase.get("parts"), dict)]
    if not phases:
        return [], []
    names = list(dict.fromkeys(name for phase in phases for name in phase["parts"]))
    names = [name for name in names if any(phase["parts"].get(name) for phase in phases)]
    rows = [[name, *(f"{phase['parts'].get(name, 0) / 1e6:,.0f}" for phase in phases)] for name in names]
    rows.append(["in use", *(f"{phase.get('total', 0) / 1e6:,.0f}" for phase in phases)])
    return ["MB", *(str(phase.get("name")) for phase in phases)], rows


def failure_rows(record: RunRecord) -> list[list[str]]:
    """function, status, completions, share: every status of every isolated reward function."""
    found = []
    for name, counts in statuses(record).items():
        total = sum(counts.values()) or 1
        found += [[name, status, f"{count:g}", f"{count / total:.2%}"] for status, count in counts.items()]
    return found


def override_line(record: RunRecord) -> str:
    words = record.about.get("overrides") or record.arguments
    return shlex.join(["python", "-m", "slothrl", *map(str, words)])


def config_rows(record: RunRecord) -> list[list[str]]:
    return [[name, _plain(value)] for name, value in flat(record.about.get("config") or {}).items()]


def hash_rows(record: RunRecord) -> list[list[str]]:
    """What the run was made of: dataset, model, LoRA, rewards and batches, with the sha256 sums among them."""
    return [[name, _plain(value)] for name, value in (record.about.get("made_of") or {}).items()]


def version_rows(record: RunRecord) -> list[list[str]]:
    about = record.about
    rows = [[name, str(about[name])] for name in ("started", "device", "engine", "model", "data") if about.get(name)]
    return rows + [[name, str(version)] for name, version in (about.get("versions") or {}).items()]


def _plain(value: Any) -> str:
    return "not set" if value is None else str(value)
