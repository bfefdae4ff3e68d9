"""What bench_decode.py prints of its arms' results: a table a shape, and where ours is slower than bitsandbytes."""

from __future__ import annotations

from typing import Any

from tests.gpu.decode_profile import said

Results = dict[str, dict[str, Any] | None]  # by arm; None: it failed


def table(title: str, sequences: list[int], results: Results) -> str:
    """Markdown: ms a step by sequences, prefill, rollout and start of each arm, and where profiled the GPU's busy ms.

    The busy time is what linear layers, attention and sampler take; what a step takes beyond it is the host's.
    """
    lines = [f"\n### {title}: ms a step by sequences\n"]
    lines += [f"| arm | {' | '.join(map(str, sequences))} | prefill, tokens/s | 64 x (504 + 1,024), s | start, s |"]
    lines += ["|---" * (len(sequences) + 4) + "|"]
    missing = float("nan")
    for arm, found in results.items():
        if found is None:
            lines.append(f"| {arm} | failed: see its log |")
            continue
        cells = [f"{found.get(str(count), missing):.2f}" for count in sequences]
        cells += [f"{found.get('prefill', missing):,.0f}", f"{found.get('rollout', missing):.1f}"]
        lines.append(f"| {arm} | {' | '.join(cells)} | {found['start']:.0f} |")
        if profiled := found.get("profile"):
            busy = [f"{profiled[str(n)]['busy']:.2f}" if str(n) in profiled else "" for n in sequences]
            lines.append(f"| {arm}, the GPU busy | {' | '.join(busy)} | | | |")
    lines += [f"\n{line}" for line in slower(sequences, results)]
    for arm, found in results.items():
        for count, step in ((found or {}).get("profile") or {}).items():
            lines.append(f"\n{arm}, {count} sequences: {said(step)}.")
    return "\n".join(lines)


def slower(sequences: list[int], results: Results) -> list[str]:
    """For each of our arms one line: at which numbers of sequences bitsandbytes' arm is faster."""
    theirs, lines = results.get("bitsandbytes"), []
    for arm, ours in results.items():
        if not arm.startswith("slothrl") or ours is None or theirs is None:
            continue
        both = [(n, ours[str(n)], theirs[str(n)]) for n in sequences if str(n) in ours and str(n) in theirs]
        found = [f"{n} ({mine:.2f} against {other:.2f} ms)" for n, mine, other in both if mine > other]
        where = f"at {', '.join(found)} sequences" if found else "nowhere"
        lines.append(f"{arm} is slower than bitsandbytes: {where}, of {len(both)} numbers of sequences.")
    return lines
