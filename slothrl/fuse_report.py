"""What `fuse` did to a model: counts of what was fused, and what was not, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from slothrl.plan import Rows


@dataclass
class FuseReport:
    """What was fused and what was not.

    Attributes:
        fused: what -> how many, such as "q_proj + k_proj + v_proj" -> 32.
        kept: (what, reason) -> how many modules were left as they are.
        notes: what holds for the whole model.
        difference: of the model's results before and after on one random input, over the largest of them; None where
            the model could not be run.
    """

    fused: Counter[str] = field(default_factory=Counter)
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    difference: float | None = None

    def rows(self) -> Rows:
        """Rows for the plan table."""
        done = ", ".join(f"{count} {what}" for what, count in self.fused.items())
        if done and self.difference is not None:
            done += f"; results moved by {self.difference:.1e} of the largest"
        rows = [("fused", done or "nothing")]
        left = "; ".join(f"{count} {what}: {why}" for (what, why), count in self.kept.items())
        rows += [("not fused", left)] if left else []
        return rows + [("", note) for note in self.notes]

    def __str__(self) -> str:
        return "\n".join(f"{what:10} {how}" for what, how in self.rows())
