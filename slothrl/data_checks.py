"""What is wrong with a data configuration, found before anything is loaded."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slothrl.data_files import check_file, first_columns
from slothrl.errors import UserError
from slothrl.tasks import TASKS, check_knobs, generate, nearest
from slothrl.tasks_code import COLUMNS

if TYPE_CHECKING:
    from slothrl.config import DataConfig

_FORMATS = ("auto", "chat", "plain")

_OVERLONG = ("drop", "truncate", "error")

_READY_FOR_SFT = {"messages", "text"}  # columns that need no prompt column beside them

COMPLETIONS = ("completion", "solution")  # columns that stand in for an answer in SFT

_SOURCES = (*TASKS, "code", "gsm8k", "reasoning_gym", "file", "hub")


def static_data_problems(config: DataConfig) -> list[str]:
    """What is wrong with the data configuration, as far as a few milliseconds can tell.

    Args:
        config: the `data` group.

    Returns:
        One line a problem; empty where none was found.
    """
    problems = choice_problems(config)
    try:
        columns = _columns_ahead(config)
        if columns is not None:
            problems += column_problems(columns, config, f"data.source={config.source}")
        elif config.template:
            placeholders(config.template)
    except UserError as error:
        problems.append(str(error))
    return problems


def choice_problems(config: DataConfig) -> list[str]:
    problems = []
    for knob, value, valid in (("format", config.format, _FORMATS), ("overlong", config.overlong, _OVERLONG)):
        if value not in valid:
            problems.append(f"data.{knob} must be one of {', '.join(valid)}; not '{value}'{nearest(value, valid)}")
    for knob, value, low in (
        ("max_prompt_length", config.max_prompt_length, 1),
        ("train_size", 1 if config.train_size is None else config.train_size, 1),
        ("eval_size", config.eval_size, 0),
    ):
        if value < low:
            problems.append(f"data.{knob} must be at least {low}, not {value}")
    return problems


def _columns_ahead(config: DataConfig) -> list[str] | None:
    """Columns that the source will have, None where only loading tells; raises UserError for what is wrong already."""
    if config.source in ("math", "code") and config.path is not None:
        check_file(Path(config.path), "data.path")
        if config.eval_path is not None:
            check_file(Path(config.eval_path), "data.eval_path")
        return None  # columns of several shapes, which the rows themselves tell
    if config.source == "code":
        return COLUMNS if config.name in (None, "humaneval") else None
    if is_generated(config):  # a few hundred rows show a wrong knob or too small a space
        few = max(0, min(config.eval_size, 300))
        return list(generate(config.source, 1, few, config.seed, **task_knobs(config))[0][0])
    if config.source == "gsm8k":
        if config.path is not None:
            check_file(Path(config.path) / "train.jsonl", "data.path")
        return ["prompt", "answer", "solution"]
    if config.source == "reasoning_gym":
        named(config)
        return ["prompt", "answer", "metadata"]
    if config.source == "file":
        for path, knob in ((config.path, "data.path"), (config.eval_path, "data.eval_path")):
            if path is not None or knob == "data.path":
                check_file(Path(path) if path else None, knob)
        return first_columns(Path(str(config.path)))
    if config.source == "hub":
        named(config)
        return None
    raise UserError(unknown_source(config))


def is_generated(config: DataConfig) -> bool:
    """Whether the rows are made here; data=math takes a file or a data set of the hub as well."""
    return config.source in TASKS and not (config.source == "math" and (config.path or config.name))


def unknown_source(config: DataConfig) -> str:
    known = _SOURCES
    if config.source == "???":
        return f"data.source is not set; it takes one of {', '.join(known)}"
    return f"data.source has no '{config.source}'{nearest(config.source, known)}; it takes one of {', '.join(known)}"


def named(config: DataConfig) -> str:
    if not config.name:
        raise UserError(f"data.name is not set: data.source={config.source} needs the name to load")
    return config.name


def task_knobs(config: DataConfig) -> dict[str, Any]:
    task = {str(knob): value for knob, value in dict(config.task).items()}
    if is_generated(config):
        check_knobs(config.source, task)  # before size or seed among them meets an argument of that name
    return task


def column_problems(columns: Iterable[str], config: DataConfig, where: str) -> list[str]:
    columns = list(columns)
    there = f"its columns: {', '.join(columns)}"
    problems = []
    if config.template:
        for name in placeholders(config.template):
            if name not in columns:
                hint = nearest(name, columns)
                problems.append(f"data.template asks for {{{name}}}, no column of {where}{hint}; {there}")
    elif config.prompt_column not in columns and not _READY_FOR_SFT & set(columns):
        hint = nearest(config.prompt_column, columns)
        problems.append(f"{where} has no prompt column '{config.prompt_column}'{hint}; set data.prompt_column; {there}")
    spared = _READY_FOR_SFT | set(COMPLETIONS)
    if config.answer_column and config.answer_column not in columns and not spared & set(columns):
        hint = nearest(config.answer_column, columns)
        knob = "set data.answer_column (null where no reward compares with an answer)"
        problems.append(f"{where} has no answer column '{config.answer_column}'{hint}; {knob}; {there}")
    return problems


def placeholders(template: str) -> list[str]:
    """The columns that a template names; only whole columns, so that a template reads as what it prints."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"data.template is broken ({error}); write {{{{ and }}}} for braces that stay") from error
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name or name.isdigit() or set(".[") & set(name) or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise UserError(f"data.template takes plain {{column}} placeholders only, not {{{shown}}}")
        names.append(name)
    return names
