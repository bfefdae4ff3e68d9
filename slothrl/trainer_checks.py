"""What TRL and its libraries would say only once the model is loaded: numbers out of range, loggers not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

INFINITY = float("inf")
# Field -> (smallest, largest, whether the smallest itself is allowed).
RANGES = {
    "learning_rate": (0, INFINITY, True),
    "weight_decay": (0, INFINITY, True),
    "max_grad_norm": (0, INFINITY, True),
    "warmup_steps": (0, INFINITY, True),
    "beta": (0, INFINITY, True),
    "epsilon": (0, INFINITY, True),
    "epsilon_high": (0, INFINITY, True),
    "num_train_epochs": (0, INFINITY, False),
    "temperature": (0, INFINITY, False),  # logits are divided by it; the held-out score alone is greedy
    "top_p": (0, 1, False),
}
# A logger of transformers -> packages of which one is enough.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def number_problems(trainer: dict[str, Any]) -> list[str]:
    """Numbers set for the trainer that no optimizer, sampler or schedule takes; what is no number is told elsewhere."""
    found = []
    for name, (low, high, inclusive) in RANGES.items():
        number = _number(trainer.get(name))
        if number is None or (low <= number if inclusive else low < number) and number <= high:
            continue
        wanted = "0 or more" if inclusive else "over 0" + (f" and at most {high}" if high < INFINITY else "")
        found.append(f"trainer.{name}={trainer[name]}: must be {wanted}")
    return found


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def logger_problems(report_to: Sequence[str]) -> list[str]:
    """Loggers whose package is not installed here."""
    return [
        f"logger.report_to={name}: {PACKAGES[name][0]} is not installed: pip install {PACKAGES[name][0]}"
        for name in report_to
        if name in PACKAGES and not any(importlib.util.find_spec(package) for package in PACKAGES[name])
    ]
