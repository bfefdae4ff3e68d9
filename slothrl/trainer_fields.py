"""Every field of TRL's trainer configs, read from their source, so that a typo is told before anything heavy loads.

Importing TRL takes ten seconds on a small machine; parsing the same files takes a tenth of one and can never disagree
with the installed version.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slothrl.errors import UserError


@dataclass(frozen=True)
class TrainerField:
    """One config field: its annotation as written, and its default where that is a literal (else None)."""

    name: str
    annotation: str
    default: Any

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value` for this field, or None; annotations it cannot read accept anything."""
        names = {part.strip().strip("\"'") for part in self.annotation.replace("Optional[", "None|").split("|")}
        plain = {name.split("[")[0].rstrip("]") for name in names}
        if not plain <= {"int", "float", "bool", "str", "None", "list", "dict"}:
            return None
        if value is None:
            return None if "None" in plain else f"needs {self.annotation}, not null"
        kinds = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "dict": dict}
        for kind in plain - {"None"}:
            # bool is an int to Python, but a number asked for as "true" is a mistake.
            if isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool)):
                return None
            if kind == "float" and isinstance(value, str) and _is_float(value):
                return None
        return f"needs {self.annotation}, not {value!r}"


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def trainer_fields(trainer: str) -> dict[str, TrainerField]:
    """The fields of TRL's config for `trainer` ("grpo" or "sft"), inherited ones included.

    Raises:
        UserError: TRL or transformers is not installed.
    """
    trl, transformers = _package("trl"), _package("transformers")
    files = [
        (transformers / "training_args.py", "TrainingArguments"),
        (trl / "trainer" / "base_config.py", "_BaseConfig"),
        (trl / "trainer" / f"{trainer}_config.py", f"{trainer.upper()}Config"),
    ]
    fields: dict[str, TrainerField] = {}
    for path, class_name in files:
        if path.exists():
            fields.update(_class_fields(path, class_name))
    return fields


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # of a top-level package: found, not imported
    if spec is None or spec.origin is None:
        raise UserError(f"{name} is not installed: pip install slothrl")
    return Path(spec.origin).parent


def _class_fields(path: Path, class_name: str) -> dict[str, TrainerField]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    return {
        item.target.id: TrainerField(item.target.id, ast.unparse(item.annotation), _default(item.value))
        for node in found
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id[0] != "_"
        if not ast.unparse(item.annotation).startswith("ClassVar")
    }


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # field(default=…)
        value = next((k.value for k in value.keywords if k.arg == "default"), None)
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        return None
