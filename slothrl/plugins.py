"""Losses and advantages by name, found without importing torch: what is wrong with a name shows before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from slothrl.errors import UserError
from slothrl.reward_sources import GROUPS, RewardSpec, check_static, nearest, parse

# What `slothrl.losses` and `slothrl.advantages` have beside TRL's own, which trainer.* chooses; a test compares.
NAMES: Mapping[str, tuple[str, ...]] = {
    "loss": ("gspo", "gspo_token", "rloo", "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"),
    "advantage": ("rloo", "reinforce_pp"),
}


def plugin_spec(kind: str, text: str) -> RewardSpec | None:
    """Where a loss or an advantage comes from; None for one of slothrl's own.

    Raises:
        UserError: no such name, file, module or function.
    """
    if text in NAMES[kind]:
        return None
    spec = parse(text, kind=kind)
    if not (spec.path or spec.module):
        known = sorted({*NAMES[kind], *(point.name for point in entry_points(group=GROUPS[kind]))})
        if text not in known:
            there = f"there are {', '.join(known)}; write your own as pkg.mod:function or ./file.py:function"
            raise UserError(f"unknown {kind} {text!r}{nearest(text, known)}; {there}")
    check_static(spec)
    return spec


def static_plugin_problems(algo: Any) -> list[str]:
    """What is wrong with `algo.loss` and `algo.advantage`, one line each."""
    found = []
    for kind in NAMES:
        if (text := getattr(algo, kind)) is not None:
            try:
                plugin_spec(kind, text)
            except UserError as error:
                found.append(f"algo.{kind}={text}: {error}")
    return found
