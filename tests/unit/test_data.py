"""Loading, checks, prompts and SFT rows: every file type, every message a user can meet."""

import csv
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from slothrl.config import DataConfig
from slothrl.data import load_data, static_data_problems
from slothrl.errors import UserError

ROWS = [{"prompt": f"question {n}", "answer": f"0{n}", "level": str(n % 3)} for n in range(20)]
GSM8K = [
    {"question": "Tom has 2 dogs and gets 3. How many?", "answer": "2 + 3 = <<2+3=5>>5 dogs.\n#### 5"},
    {"question": "A car costs?", "answer": "It is $<<1000+200=1200>>1,200.\n#### $1,200"},
    {"question": "How cold is it?", "answer": "3 less than 0 #### no.\n#### -3"},
]


def write(path: Path, rows) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def config_of(rows, tmp_path, name="rows.jsonl", **knobs) -> DataConfig:
    return DataConfig(source="file", path=write(tmp_path / name, rows), **{"eval_size": 0, **knobs})


def refuses(config, *parts, static=True):
    """Loading says it, in one line; so does the check before loading, where it can."""
    with pytest.raises(UserError) as caught:
        load_data(config)
    for text in [str(caught.value), *(["\n".join(static_data_problems(config))] if static else [])]:
        assert "\n" not in text
        assert all(part in text for part in parts), text


def test_importing_loads_nothing_heavy():
    heavy = "{'torch', 'datasets', 'transformers', 'trl', 'pyarrow', 'omegaconf'}"
    code = f"import sys, slothrl.data; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- sources ----


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "ROWS.CSV"])
def test_each_file_type_comes_back_as_written(tmp_path, name):
    if name.isupper():
        Path(write(tmp_path / "rows.csv", ROWS)).rename(tmp_path / name)
        config = DataConfig(source="file", path=str(tmp_path / name), eval_size=0)
    else:
        config = config_of(ROWS, tmp_path, name)
    assert static_data_problems(config) == []
    splits = load_data(config)
    assert list(splits.train) == ROWS  # "07" is still text, from CSV too
    assert splits.eval is None
    assert "20 training rows, 0 held out" in splits.description


def test_generated_rows_are_disjoint_and_described():
    config = DataConfig(source="arithmetic", eval_size=30, task={"digits": 1, "operations": ["+"]})
    splits = load_data(config)
    assert (len(splits.train), len(splits.eval)) == (70, 30)
    assert not set(splits.train["prompt"]) & set(splits.eval["prompt"])
    assert "digits 1" in splits.description and "70 training rows, 30 held out" in splits.description


def test_held_out_cut_follows_the_seed_and_leaves_no_twin_in_training(tmp_path):
    rows = [{"prompt": f"q{n % 12}", "answer": str(n)} for n in range(24)]  # every prompt twice
    splits = load_data(config_of(rows, tmp_path, eval_size=5))
    assert len(splits.eval) == 5
    assert not set(splits.train["prompt"]) & set(splits.eval["prompt"])
    assert list(load_data(config_of(rows, tmp_path, eval_size=5)).eval) == list(splits.eval)
    assert list(load_data(config_of(rows, tmp_path, eval_size=5, seed=1)).eval) != list(splits.eval)


def test_eval_path_and_train_size(tmp_path):
    other = write(tmp_path / "other.csv", [{"prompt": f"held {n}", "answer": "x"} for n in range(9)])
    splits = load_data(config_of(ROWS, tmp_path, eval_path=other, eval_size=4, train_size=6))
    assert (len(splits.train), len(splits.eval)) == (6, 4)
    assert all(prompt.startswith("held") for prompt in splits.eval["prompt"])
    refuses(config_of(ROWS, tmp_path, eval_path=str(tmp_path / "no.csv"), eval_size=4), "data.eval_path", "no.csv")


def test_named_columns_are_copied_and_rows_may_lack_some(tmp_path):
    rows = [{"q": "one", "label": "1", "prompt": "old"}, {"q": "two", "label": "2", "hint": "h"}]
    dataset = load_data(config_of(rows, tmp_path, prompt_column="q", answer_column="label")).train
    assert dataset["prompt"] == ["one", "two"] and dataset["q"] == ["one", "two"]
    assert dataset["answer"] == ["1", "2"] and dataset["hint"] == [None, "h"]


def test_gsm8k_folder(tmp_path):
    write(tmp_path / "train.jsonl", GSM8K)
    config = DataConfig(source="gsm8k", path=str(tmp_path), eval_size=1)
    assert len(load_data(config).eval) == 1  # no test.jsonl: cut from training
    write(tmp_path / "test.jsonl", GSM8K[:2])
    splits = load_data(config)
    assert splits.train["answer"] == ["5", "1200", "-3"]
    assert splits.train["solution"] == [row["answer"] for row in GSM8K]
    assert splits.train["prompt"][0] == GSM8K[0]["question"] and len(splits.eval) == 1
    write(tmp_path / "train.jsonl", [*GSM8K, {"question": "x", "answer": "5"}])
    refuses(config, "row 4", "#### number", static=False)
    (tmp_path / "train.jsonl").unlink()
    refuses(config, "train.jsonl", "data.path")


def test_hub_splits_and_being_offline(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(GSM8K if "gsm8k" in name else ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_data(DataConfig(source="hub", name="a/b", subset="c", eval_split="validation", eval_size=3))
    assert load_data(DataConfig(source="gsm8k")).train["answer"][1] == "1200"
    gsm8k = [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert asked == [("a/b", "c", "train"), ("a/b", "c", "validation"), *gsm8k]

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refuses(DataConfig(source="hub", name="a/b"), "a/b", "Couldn't reach", "data.name", "data=file", static=False)
    refuses(DataConfig(source="hub"), "data.name is not set")


def test_reasoning_gym_and_its_absence(monkeypatch):
    config = DataConfig(source="reasoning_gym", name="chain_sum", train_size=8, eval_size=4, task={"max_terms": 3})
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    refuses(config, "pip install reasoning-gym", static=False)
    package = types.ModuleType("reasoning_gym")

    def create_dataset(name, size, seed, max_terms=2):
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return [{"question": f"{n} + {max_terms}", "answer": str(n), "metadata": {"n": n}} for n in range(size)]

    package.create_dataset = create_dataset
    package.factory = types.SimpleNamespace(DATASETS={"chain_sum": None})
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    splits = load_data(config)
    assert (len(splits.train), len(splits.eval)) == (8, 4)
    assert json.loads(splits.train["metadata"][0])["n"] == int(splits.train["answer"][0])
    config.task = {"terms": 3}
    refuses(config, "data.task", "terms", static=False)
    config.name = "chain_sun"
    refuses(config, "data.name=chain_sun", "did you mean 'chain_sum'?", static=False)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("knobs", "parts"),
    [
        ({"source": "aritmetic"}, ["did you mean 'arithmetic'?", "gsm8k, reasoning_gym, file, hub"]),
        ({"source": "???"}, ["data.source is not set"]),
        ({"source": "file"}, ["data.path is not set"]),
        ({"source": "file", "path": "no/where.jsonl"}, ["there is no no/where.jsonl", "data.path"]),
        ({"source": "arithmetic", "task": {"size": 3}}, ["data.task.size is no knob of arithmetic"]),
        ({"source": "arithmetic", "eval_size": 100}, ["only 100 different problems", "data.eval_size"]),
        ({"source": "countdown", "eval_size": -1}, ["data.eval_size must be at least 0"]),
        ({"source": "countdown", "train_size": 0}, ["data.train_size must be at least 1"]),
        ({"source": "countdown", "max_prompt_length": 0}, ["data.max_prompt_length must be at least 1"]),
        ({"source": "countdown", "format": "chatt"}, ["data.format", "auto, chat, plain", "did you mean 'chat'?"]),
        ({"source": "countdown", "overlong": "trunc"}, ["data.overlong", "did you mean 'truncate'?"]),
        ({"source": "countdown", "template": "{numbers} {targt}"}, ["data.template", "did you mean 'target'?"]),
        ({"source": "countdown", "template": "{numbers.__class__}"}, ["plain {column}", "{numbers.__class__}"]),
        ({"source": "countdown", "template": "{numbers[0]}"}, ["plain {column}", "{numbers[0]}"]),
        ({"source": "countdown", "template": "{target:>9}"}, ["plain {column}", "{target:>9}"]),
        ({"source": "countdown", "template": "{target!r} {}"}, ["plain {column}", "{target!r}"]),
        ({"source": "countdown", "template": "{target"}, ["data.template is broken"]),
    ],
)
def test_mistakes_in_the_configuration(knobs, parts):
    refuses(DataConfig(**{"eval_size": 5, **knobs}), *parts)


@pytest.mark.parametrize(
    ("name", "text", "parts", "static"),
    [
        ("a.txt", "x", ["unsupported", ".jsonl, .json, .parquet, .csv"], True),
        ("a.jsonl", "", ["a.jsonl is empty"], True),
        ("a.jsonl", "\n{broken\n", ["a.jsonl, line 2: broken JSON"], True),
        ("a.jsonl", '{"prompt": "p", "answer": "1"}\n\n{"prompt": \n', ["a.jsonl, line 3: broken JSON"], False),
        ("a.jsonl", "[1, 2]\n", ["line 1: not a JSON object"], True),
        ("a.jsonl", '{"promt": "p", "answer": "1"}\n', ["'prompt'", "did you mean 'promt'?", "promt, answer"], True),
        ("a.csv", "prompt,anser\np,1\n", ["'answer'", "did you mean 'anser'?", "data.answer_column"], True),
        ("a.csv", "prompt,answer\n", ["has no rows"], False),
        ("a.csv", "prompt,answer\np,1,2\n", ["line 2", "number of cells"], False),
        ("a.json", '{"prompt": "p"}', ["not a list of objects"], False),
        ("a.json", "[", ["no readable .json file"], False),
        ("a.json", "[]", ["has no rows"], False),
        ("a.parquet", "junk", ["no readable .parquet file", "data.path"], False),
        ("a.json", '[{"prompt": "p", "answer": 1}, {"prompt": "p", "answer": "b"}]', ["mixes kinds"], False),
    ],
)
def test_mistakes_in_a_file(tmp_path, name, text, parts, static):
    (tmp_path / name).write_text(text, encoding="utf-8")
    refuses(DataConfig(source="file", path=str(tmp_path / name), eval_size=0), *parts, static=static)


def test_held_out_rows_must_leave_some_to_train_on(tmp_path):
    refuses(config_of(ROWS, tmp_path, eval_size=20), "data.eval_size=20", "20 rows", "data.eval_path", static=False)
    twins = [{"prompt": "same", "answer": "1"}] * 3
    refuses(config_of(twins, tmp_path, eval_size=1), "every row", "data.eval_size", static=False)


def test_an_answer_is_asked_for_only_where_it_can_be_needed(tmp_path):
    config = config_of([{"prompt": "p"}], tmp_path)
    refuses(config, "no answer column 'answer'", "null where no reward")
    config.answer_column = None
    assert static_data_problems(config) == [] and len(load_data(config).train) == 1
    assert static_data_problems(config_of([{"messages": []}], tmp_path)) == []


def test_all_problems_are_reported_together(tmp_path):
    config = config_of([{"q": "p", "a": 1}], tmp_path, overlong="x", format="y", train_size=-1)
    assert len(static_data_problems(config)) == 5
