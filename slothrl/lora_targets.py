"""The modules that a LoRA goes into, held against the model's own names before weights are loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

ALL = "all-linear"


def target_problems(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """What is wrong with `model.lora.target_modules`; nothing where each name, or the pattern, finds a layer, and
    none of them is the output head.

    PEFT refuses a list of which nothing is found, and passes over single names that are not.

    Args:
        model: the base, without an adapter; on the meta device will do.
        targets: as PEFT takes them: "all-linear", a pattern for whole names, or names or their last parts.
    """
    if isinstance(targets, str):
        if targets.lower() == ALL:
            return []
        try:
            found = any(re.fullmatch(targets, name) for name, _ in model.named_modules())
        except re.error as error:
            return [f"model.lora.target_modules={targets}: no regular expression ({error})"]
        hint = f"it is matched with whole names, such as {_first_linear(model)}; or write {ALL}, or a list of names"
        missing = f"model.lora.target_modules={targets}: no module of the model is called so; {hint}"
        return _head_problems(model, targets) if found else [missing]
    there = {name for name, _ in model.named_modules()}
    last = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    unknown = [t for t in targets if t not in there and not any(name.endswith(f".{t}") for name in there)]
    return [
        f"model.lora.target_modules: the model has no '{target}'{_hint(target, last)}; its linear layers are"
        f" {', '.join(last)}"
        for target in unknown
    ] + _head_problems(model, targets)


def _head_problems(model: Any, targets: str | Sequence[str]) -> list[str]:
    """The output head as a target: log-probs are made of its weight, so that a LoRA on it would never be trained."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if module is head]
    if isinstance(targets, str):
        found = [name for name in names if re.fullmatch(targets, name)]
    else:
        found = [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]
    return [
        f"model.lora.target_modules: '{name}' is the output head, whose weight alone the log-probs are computed from:"
        f" leave it out, or write {ALL}, which does"
        for name in found
    ]


def _first_linear(model: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if isinstance(module, nn.Linear)), "none")


def _hint(target: Any, names: list[str]) -> str:
    near = difflib.get_close_matches(str(target), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
