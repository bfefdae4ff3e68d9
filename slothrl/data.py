"""Data in: load a data set and hold some rows out.

Importing this loads neither torch nor `datasets`: a mistyped column is reported before anything heavy starts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slothrl.data_checks import (
    choice_problems,
    column_problems,
    is_generated,
    named,
    static_data_problems,
    task_knobs,
    unknown_source,
)
from slothrl.data_files import as_dataset, iterate, read, with_column
from slothrl.errors import ConfigError, UserError
from slothrl.prompts import PromptReport, build_prompts, build_sft
from slothrl.tasks import TASKS, Row, generate, nearest
from slothrl.tasks_code import code_problems, code_rows, human_eval_rows
from slothrl.tasks_math import problem_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from slothrl.config import DataConfig

__all__ = ["DataSplits", "PromptReport", "build_prompts", "build_sft", "load_data", "static_data_problems"]

GENERATED_SIZE = 1000  # training rows of a generated task where data.train_size is not set


@dataclass
class DataSplits:
    """What `load_data` found: `eval` is None where nothing is held out; `description` is one line for people."""

    train: Dataset
    eval: Dataset | None
    description: str


def load_data(config: DataConfig) -> DataSplits:
    """Loads training and held-out rows.

    `prompt_column` and `answer_column` are copied to `prompt` and `answer`; every other column stays. Where the source
    has no held-out rows of its own, `eval_size` rows are cut from training by `seed`, and training rows with the same
    prompt as a held-out one go. CSV cells stay text.

    Args:
        config: the `data` group.

    Returns:
        The splits; `eval` is None with `eval_size=0`.

    Raises:
        UserError: a source, file, column or size that cannot be had; the message names the knob.
    """
    if config.source not in _LOADERS:
        raise UserError(unknown_source(config))
    if problems := choice_problems(config):
        raise ConfigError(problems)
    train, held_out, origin = _LOADERS[config.source](config)
    train = _name_columns(train, config, origin)
    if held_out is not None:
        held_out = _name_columns(held_out, config, f"{origin} (held out)")
        held_out = _at_most(held_out, config.eval_size, config.seed) if config.eval_size else None
    elif config.eval_size:
        train, held_out = _cut(train, config, origin)
    train = _at_most(train, config.train_size, config.seed)
    counts = f"{len(train)} training rows, {len(held_out) if held_out is not None else 0} held out"
    return DataSplits(train, held_out, f"{origin}: {counts}")


Loaded = tuple["Dataset", "Dataset | None", str]  # training rows, held-out rows or None, where they come from


def _load_generated(config: DataConfig) -> Loaded:
    task, size = task_knobs(config), config.train_size or GENERATED_SIZE
    train, held_out = generate(config.source, size, config.eval_size, config.seed, **task)
    knobs = "".join(f", {knob} {value}" for knob, value in task.items() if value is not None)
    origin = f"{config.source} (generated{knobs})"
    return as_dataset(train, origin), as_dataset(held_out, origin) if held_out else None, origin


def _load_gsm8k(config: DataConfig) -> Loaded:
    if config.path is None:
        name = "openai/gsm8k"
        splits = [_from_hub(name, "main", split) for split in ("train", "test")]
    else:
        name = config.path
        paths = [Path(name) / "train.jsonl", Path(name) / "test.jsonl"]
        splits = [read(path, "data.path") for path in paths if path.exists() or path.name == "train.jsonl"]
    made = [as_dataset([_gsm8k_row(row, n, name) for n, row in enumerate(iterate(rows), 1)], name) for rows in splits]
    return made[0], made[1] if len(made) > 1 else None, f"gsm8k ({name})"


def _gsm8k_row(row: Mapping[str, Any], number: int, where: str) -> Row:
    solution = row.get("answer")
    if not row.get("question") or not isinstance(solution, str) or "####" not in solution:
        shape = "a question and an answer that ends in '#### number'"
        raise UserError(f"{where}, row {number}: not GSM8K's format ({shape}); use data=file for other data")
    answer = solution.rsplit("####", 1)[1].strip().replace(",", "").replace("$", "")
    return {"prompt": row["question"], "answer": answer, "solution": solution}


def _load_math(config: DataConfig) -> Loaded:
    if is_generated(config):
        return _load_generated(config)
    raw, held_out, origin = _load_hub(config) if config.path is None else _load_file(config)
    made = [as_dataset(problem_rows(iterate(rows), origin), origin) for rows in (raw, held_out) if rows is not None]
    return made[0], made[1] if held_out is not None else None, f"math ({origin})"


def _load_code(config: DataConfig) -> Loaded:
    if config.path is None and config.name is None:
        return as_dataset(code_problems(), "code"), None, "code (the set that ships with slothrl)"
    if config.path is not None:  # not through a table: a column of tests holds values of all kinds
        raw, origin = read(Path(config.path), "data.path"), config.path
        held_out = read(Path(config.eval_path), "data.eval_path") if config.eval_path else None
    elif config.name == "humaneval":
        raw, held_out, origin = human_eval_rows(), None, "humaneval"
    else:
        raw, held_out, origin = _load_hub(config)
    made = [code_rows(iterate(rows), origin) for rows in (raw, held_out) if rows is not None]
    left_out = sum(count for _, count in made)
    note = f"; {left_out} rows left out, whose tests cannot be judged outside the sandbox" if left_out else ""
    found = [as_dataset(rows, origin) for rows, _ in made]
    return found[0], found[1] if held_out is not None else None, f"code ({origin}{note})"


def _load_file(config: DataConfig) -> Loaded:
    path = Path(config.path) if config.path else None
    train = as_dataset(read(path, "data.path"), str(path))
    if not config.eval_path:
        return train, None, str(path)
    return train, as_dataset(read(Path(config.eval_path), "data.eval_path"), config.eval_path), str(path)


def _load_hub(config: DataConfig) -> Loaded:
    name = named(config)
    train = _from_hub(name, config.subset, config.train_split)
    held_out = _from_hub(name, config.subset, config.eval_split) if config.eval_split else None
    return train, held_out, f"{name} ({config.subset or 'default'}, {config.train_split})"


def _load_reasoning_gym(config: DataConfig) -> Loaded:
    name = named(config)
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError("data.source=reasoning_gym needs one more package: pip install reasoning-gym") from error
    size = (config.train_size or GENERATED_SIZE) + config.eval_size
    try:
        entries = list(reasoning_gym.create_dataset(name, size=size, seed=config.seed, **task_knobs(config)))
    except (AssertionError, TypeError, ValueError) as error:
        known = getattr(getattr(reasoning_gym, "factory", None), "DATASETS", ())
        hint = nearest(name, known) if name not in known else ""
        raise UserError(f"reasoning-gym refuses data.name={name} with this data.task: {error}{hint}") from error
    rows = [  # metadata differs from entry to entry, which a table cannot hold: JSON text
        {"prompt": e["question"], "answer": e["answer"], "metadata": json.dumps(e.get("metadata"), default=str)}
        for e in entries
    ]
    return as_dataset(rows, f"reasoning-gym {name}"), None, f"reasoning-gym {name}"


_LOADERS: dict[str, Callable[[DataConfig], Loaded]] = {
    **dict.fromkeys(TASKS, _load_generated),
    "math": _load_math,
    "code": _load_code,
    "gsm8k": _load_gsm8k,
    "reasoning_gym": _load_reasoning_gym,
    "file": _load_file,
    "hub": _load_hub,
}


def _from_hub(name: str, subset: str | None, split: str) -> Dataset:
    import datasets

    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client, its transport and every builder raise families of their own
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"hub data set '{name}' (subset {subset or 'default'}, split {split}) cannot be loaded: "
            f"{type(error).__name__}: {reason}; check data.name, data.subset and the splits, or offline use data=file"
        ) from error
    if not isinstance(dataset, datasets.Dataset) or not len(dataset):
        raise UserError(f"hub data set '{name}', split {split}, has no rows: check data.train_split, data.eval_split")
    return dataset


def _name_columns(dataset: Dataset, config: DataConfig, where: str) -> Dataset:
    if problems := column_problems(dataset.column_names, config, where):
        raise ConfigError(problems)
    for name, source in (("prompt", config.prompt_column), ("answer", config.answer_column)):
        if source in dataset.column_names and source != name:  # copied, so that a template still finds the original
            dataset = with_column(dataset, name, list(dataset[source]))
    return dataset


def _cut(train: Dataset, config: DataConfig, where: str) -> tuple[Dataset, Dataset]:
    if config.eval_size >= len(train):
        raise UserError(
            f"data.eval_size={config.eval_size} leaves none of the {len(train)} rows of {where} to train on: "
            "lower data.eval_size or set data.eval_path"
        )
    picked = set(random.Random(config.seed).sample(range(len(train)), config.eval_size))
    column = "prompt" if "prompt" in train.column_names and not config.template else None
    keys = [json.dumps(row, default=str) for row in (train[column] if column else train)]
    held_out = {keys[index] for index in picked}
    rest = [index for index, key in enumerate(keys) if key not in held_out]
    if not rest:
        raise UserError(f"every row of {where} has a held-out prompt: lower data.eval_size or set data.eval_path")
    return train.select(rest), train.select(sorted(picked))


def _at_most(dataset: Dataset, size: int | None, seed: int) -> Dataset:
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(sorted(random.Random(seed).sample(range(len(dataset)), size)))
