"""Files in, rows out: readers by suffix, with the line and the knob in every complaint."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slothrl.errors import UserError
from slothrl.tasks import Row

if TYPE_CHECKING:
    from datasets import Dataset


def read(path: Path | None, knob: str) -> list[Row]:
    check_file(path, knob)
    assert path is not None
    try:
        return READERS[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and json's errors are ValueErrors
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no readable {path.suffix} file ({reason}): mend it or set {knob}") from error


def _read_jsonl(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig") as file:
        return [_json_object(line, path, number) for number, line in enumerate(file, 1) if line.strip()]


def _json_object(line: str, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: broken JSON ({error}); mend that line of data.path") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: not a JSON object; each line of data.path is one row")
    return row


def _read_json(path: Path) -> list[Row]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of objects")
    return rows


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has another number of cells than the header")
            rows.append(row)
        return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def check_file(path: Path | None, knob: str) -> None:
    if path is None:
        raise UserError(f"{knob} is not set: data.source=file needs a {', '.join(READERS)} file")
    if not path.exists():
        raise UserError(f"there is no {path}: set {knob} to what exists")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is of an unsupported kind: {knob} takes {', '.join(READERS)}")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty: set {knob} to a file with rows")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check {knob}") from error


def first_columns(path: Path) -> list[str] | None:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix.lower() == ".csv":
            return next(csv.reader(file), [])
        if path.suffix.lower() == ".jsonl":
            number, line = next(((n, line) for n, line in enumerate(file, 1) if line.strip()), (1, ""))
            return list(_json_object(line, path, number))
    return None


def as_dataset(rows: list[Row], where: str) -> Dataset:
    import datasets

    if not rows:
        raise UserError(f"{where} has no rows: set data.path or data.name to data with some")
    columns = dict.fromkeys(column for row in rows for column in row)  # a row may lack some of them
    try:
        return datasets.Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{where}: a column mixes kinds of values ({reason}): make each one all text or all numbers"
        ) from error


def iterate(dataset: Dataset | list[Row]) -> Iterable[Row]:
    return iter(dataset)  # type: ignore[return-value]  # rows are dicts unless a format is set


def with_column(dataset: Dataset, name: str, values: list[Any]) -> Dataset:
    if dataset.column_names == [name]:
        return type(dataset).from_dict({name: values})  # without any column a dataset would have no rows either
    others = dataset.remove_columns(name) if name in dataset.column_names else dataset
    return others.add_column(name, values)  # type: ignore[call-arg]
