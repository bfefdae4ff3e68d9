"""How the scores of an attention come about, filled in and checked: what every backend is given."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """`packed_attention`'s arguments of the same names.

    Attributes:
        scale: of q k^T.
        window: only keys at a position > the query's - window; None also where no key of the pack is farther away.
        softcap: None, or what bounds the scores.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
