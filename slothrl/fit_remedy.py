"""After memory has run out: the overrides with which the run is predicted to take so much less that it would fit."""

from __future__ import annotations

from slothrl.config import Config
from slothrl.fit_config import question
from slothrl.fit_memory import predict
from slothrl.fit_search import smaller
from slothrl.plan import size

ROOM = 0.85  # of what did not fit: a prediction is off by up to a tenth


def predicted_remedy(config: Config, engine: str) -> str | None:
    """One line: the nearest settings that are predicted to fit; None where nothing smaller does, or none is predicted.

    What ran out is the smaller of the device and what the run was predicted to take, where the prediction was too low.

    Args:
        engine: that the run had.
    """
    try:
        asked = question(config, engine)
    except Exception:  # mixtures of experts; a machine without a byte left: the fault itself is what must be told
        return None
    fullest = max(phase.total for phase in predict(asked.shape, asked.settings, asked.total))
    limit = min(asked.total, int(ROOM * fullest))
    change = smaller(asked.shape, asked.settings, limit, asked.accumulation)
    if change is None or not change.overrides:
        return None
    now = max(phase.total for phase in predict(asked.shape, change.settings, limit))
    settings = " ".join(change.overrides)
    return f"predicted to fit: {settings} resume_changed=true ({size(now)} instead of {size(fullest)})"
