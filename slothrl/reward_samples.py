"""What `python -m slothrl reward` shows to reward functions: completions made from gold answers, or a file's."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slothrl.data_files import check_file, read
from slothrl.errors import UserError

if TYPE_CHECKING:
    from slothrl.config import DataConfig

Row = dict[str, Any]
GOLD = ("gold", "gold in a sentence", "gold in tags", "worked solution")  # kinds, one of which should score fully
EMPTY = "empty"


@dataclass(frozen=True)
class Sample:
    """One call's worth of completions, all of one kind.

    Attributes:
        kind: a row of the table.
        rows: the data's rows, each with `prompt`.
        completions: one text a row.
    """

    kind: str
    rows: list[Row]
    completions: list[str]

    def batch(self) -> dict[str, Any]:
        """The arguments of a reward function, as TRL gives them; completions take the form of their prompts."""
        columns: dict[str, Any] = {}
        for key in dict.fromkeys(key for row in self.rows for key in row if key not in ("prompt", "completion")):
            columns[key] = [row.get(key) for row in self.rows]
        prompts = [row["prompt"] for row in self.rows]
        messages = [[{"role": "assistant", "content": text}] for text in self.completions]
        pairs = zip(prompts, messages, self.completions, strict=True)
        return {
            **columns,
            "prompts": prompts,
            "completions": [message if isinstance(prompt, list) else text for prompt, message, text in pairs],
            # Nobody has a tokenizer here: words and signs stand for tokens.
            "completion_ids": [_word_ids(text) for text in self.completions],
        }


def samples_of_data(config: DataConfig, count: int) -> list[Sample]:
    """Rows of the configured data with completions of every kind that their columns allow.

    Raises:
        UserError: the data cannot be loaded.
    """
    from slothrl.data import build_prompts, load_data

    splits = load_data(config)
    few = splits.train.select(range(min(count, len(splits.train))))
    rows = [dict(row) for row in build_prompts(few, config, _Words()).dataset]  # pyright: ignore - a stand-in
    gold = [_text(row.get("answer")) or _text(row.get("solution")) for row in rows]
    worked = [_text(row.get("solution")) for row in rows]
    made: dict[str, list[str]] = {}
    if any(gold):
        made["gold"] = gold
        made["gold in a sentence"] = [f"I thought about it. The answer is {text}." for text in gold]
        made["gold in tags"] = [f"<think>\nLet me see.\n</think>\n<answer>\n{text}\n</answer>" for text in gold]
        if any(worked) and worked != gold:
            made["worked solution"] = worked
        made["another row's gold"] = [*gold[1:], gold[0]]
    rng = random.Random(0)
    made |= {
        EMPTY: [""] * len(rows),
        "garbage": ["".join(rng.choices(string.ascii_letters + string.punctuation + " \n", k=200)) for _ in rows],
        "long repetition": ["and then we compute the answer again, " * 200] * len(rows),
    }
    return [Sample(kind, rows, texts) for kind, texts in made.items()]


def samples_of_file(path: str, size: int = 8) -> list[Sample]:
    """Given completions, in batches.

    Args:
        path: a .jsonl, .json, .csv or .parquet file of rows with prompt, completion and columns.
        size: rows a batch.

    Raises:
        UserError: the file cannot be read, or a row has no prompt or completion.
    """
    try:
        check_file(Path(path), "completions")
        rows = read(Path(path), "completions")
    except UserError as error:  # the reader speaks of data.path
        raise UserError(str(error).replace("data.path", "completions")) from error
    for number, row in enumerate(rows, 1):
        for name in ("prompt", "completion"):
            if not isinstance(row.get(name), str | list):
                raise UserError(f"{path}, row {number}: no {name}; each row needs prompt, completion and the columns")
    if not rows:
        raise UserError(f"{path} has no rows: set completions to a file with some")
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [Sample("given", part, [_text(row["completion"]) for row in part]) for part in parts]


class _Words:
    """Stands in for a tokenizer, so that prompts are built by the run's own code and none is too long."""

    chat_template = "chat"
    apply_chat_template: Callable[..., str] = staticmethod(lambda talk, **options: "")

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[] for _ in texts]}


def _word_ids(text: str) -> list[int]:
    ids: dict[str, int] = {}
    return [ids.setdefault(word, len(ids)) for word in re.findall(r"\w+|[^\w\s]", text)]


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "content" in part for part in value):
        return str(value[-1]["content"] or "")
    return json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
