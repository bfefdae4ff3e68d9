"""The frame of a self-contained HTML page: its stylesheet, and a few elements whose text is always escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

# No script runs and nothing is fetched, whatever a completion holds: escaping is the first wall, this the second.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --edge: #e5e7eb; --back: #f8fafc; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--back); margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0 0 6px; }
small { font-weight: 400; }
.soft { color: var(--soft); } .pill { font-size: 13px; padding: 2px 10px; border-radius: 99px; vertical-align: 4px;
  margin-left: 10px; background: #e2e8f0; } .pill.done { background: #d1fae5; } .pill.failed { background: #fecaca; }
.pill.interrupted { background: #fef3c7; }
.cards, .curves { display: grid; gap: 14px; } .cards { grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); }
.curves { grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); }
.card { background: #fff; border: 1px solid var(--edge); border-radius: 10px; padding: 14px 16px; min-width: 0; }
.big { font-size: 24px; font-weight: 600; }
.finding { border-left: 4px solid #94a3b8; background: #fff; padding: 8px 14px; margin: 8px 0;
  border-radius: 0 8px 8px 0; }
.finding.warning { border-color: #ea580c; } .finding.good { border-color: #059669; }
.finding p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; background: #fff; border: 1px solid var(--edge); width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--edge); vertical-align: top;
  overflow-wrap: anywhere; } th { background: #f1f5f9; font-weight: 600; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; min-width: 120px; }
td.text div { max-height: 280px; overflow: auto; }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: #fff; border: 1px solid var(--edge); padding: 12px; overflow: auto; white-space: pre-wrap; }
details { margin: 10px 0; } summary { cursor: pointer; }
svg { width: 100%; height: auto; display: block; } .grid { stroke: #e5e7eb; }
.tick, .axis { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #6b7280; }
polyline.line { stroke-width: 1.8; stroke-linejoin: round; } polyline.pale { stroke-width: 1.2; opacity: .35; }
.legend { font-size: 12.5px; color: var(--soft); } .legend span { margin-right: 14px; display: inline-block; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; `body` is markup, `title` text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def text(value: Any) -> str:
    """A value as text that HTML takes for nothing else."""
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), quote=True)


def section(title: str, *parts: str) -> str:
    """A heading and what follows; nothing where every part is empty."""
    filled = [part for part in parts if part]
    return f"<h2>{text(title)}</h2>\n" + "\n".join(filled) if filled else ""


def table(
    headings: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = (), texts: Sequence[int] = ()
) -> str:
    """A table of escaped cells.

    Args:
        numbers: columns to align right.
        texts: columns to set in a fixed-width face with their line breaks.
    """
    if not rows:
        return ""

    def cells(tag: str, row: Sequence[Any]) -> str:
        kinds = ["number" if i in numbers else "text" if i in texts and tag == "td" else "" for i in range(len(row))]
        classes = [f' class="{kind}"' if kind else "" for kind in kinds]
        # A long completion scrolls in a box of its own.
        inside = [f"<div>{text(v)}</div>" if kind == "text" else text(v) for v, kind in zip(row, kinds, strict=True)]
        return "".join(f"<{tag}{kind}>{value}</{tag}>" for kind, value in zip(classes, inside, strict=True))

    head = f"<thead><tr>{cells('th', headings)}</tr></thead>" if any(headings) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def card(title: str, inside: str, unit: str = "") -> str:
    """A box; `inside` is markup. The unit is left out where the title names it."""
    named = unit.lower() in title.lower()
    beside = "" if named else f' <small class="soft">{text(unit)}</small>'
    return f'<div class="card"><h3>{text(title)}{beside}</h3>{inside}</div>'


def details(title: str, inside: str) -> str:
    return f"<details><summary>{text(title)}</summary>{inside}</details>" if inside else ""
