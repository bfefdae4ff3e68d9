"""Reports of real short runs: their numbers, their text, what they compare, and the score of a saved adapter."""

import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slothrl.__main__ import main
from slothrl.report import append_jsonl
from slothrl.report_tables import curve_rows
from slothrl.run_record import read_run

pytestmark = pytest.mark.usefixtures("one_thread")
# 0 or 1, and right for some completions of random models only.
REWARD = """
def short(completions, **_):
    return [float(len(text if isinstance(text, str) else text[-1]["content"]) % 2) for text in completions]

"""
EVIL = "</td><script>alert('x')</script>| `<b>&amp;"


@pytest.fixture(scope="module")
def runs(tiny_folders, tmp_path_factory) -> Path:
    """A folder with runs `a` and `b`, of other learning rates."""
    work = tmp_path_factory.mktemp("reports")
    (work / "mine.py").write_text(REWARD, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for name, rate in (("a", "1e-3"), ("b", "1e-2")):
            assert main(arguments(tiny_folders["tiny"], f"trainer.learning_rate={rate}", f"output_dir={name}")) == 0
    return work


def arguments(model: str, *more: str) -> list[str]:
    return [
        "gpu=cpu",
        "model=hub",
        f"model.name={model}",
        "rollout=transformers",
        "reward=custom",
        "reward.functions=[./mine.py:short]",
        "reward.score_samples=2",
        "reward.isolate=false",
        "data.train_size=40",
        "data.eval_size=6",
        "trainer.max_steps=3",
        "trainer.num_generations=4",
        "trainer.per_device_train_batch_size=8",
        "trainer.warmup_steps=0",
        "logger.progress=false",
        "logger.samples=0",
        *more,
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Page(HTMLParser):
    """The tags and the shown text of a page."""

    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.links, self.shown = [], [], ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.shown += data


def test_a_run_leaves_its_report(runs):
    run, page = runs / "a", Page((runs / "a" / "report.html").read_text(encoding="utf-8"))
    assert page.links == []  # it needs nothing but itself
    assert "script" not in page.tags
    before, after = [record for record in lines(run / "held_out.jsonl") if "metric" in record]
    text = (run / "report.md").read_text(encoding="utf-8")
    for record in (before, after):
        assert record["score"] == pytest.approx(sum(record["scores"]) / 6)
        assert f"{record['score']:.3f} [" in page.shown
        assert f"{record['score']:.3f} \\[" in text
    for place in ("Reward", "Entropy", "Learning rate", "Time by phase", "pass@1 (short, greedy)", "pass@2 (short, 2"):
        assert place in page.shown
    made_of = json.loads((run / "provenance.json").read_text())["made_of"]
    for known in (made_of["dataset.sha256"], made_of["model.weights"], "trainer.learning_rate=1e-3"):
        assert known in page.shown
    assert any(prompt in page.shown for prompt in before["prompts"])


def test_its_figures_are_those_of_the_metrics(runs):
    metrics = [line for line in lines(runs / "a" / "metrics.jsonl") if "loss" in line]
    rows = {row[0]: row[2:] for row in curve_rows(read_run(runs / "a"))}
    for title, key in (("Reward", "reward"), ("Entropy", "entropy"), ("Gradient norm", "grad_norm")):
        values = [line[key] for line in metrics]
        figures = (values[0], values[-1], min(values), max(values))  # a quarter of three steps is one
        assert rows[title] == [f"{figure:.4g}" for figure in figures]
    assert len(metrics) == 3
    spent = [sum(value for name, value in line.items() if name.startswith("time/")) for line in metrics]
    between = metrics[-1]["seconds"] - metrics[0]["seconds"]  # what came before the first step is no phase's
    assert sum(spent[1:]) == pytest.approx(between, rel=0.2, abs=0.1)
    assert statistics.fmean(line["time/rollout"] for line in metrics) > 0
    assert all({"time/LoRA push", "time/KV cache"} <= line.keys() for line in metrics)


def test_completions_are_text_and_nothing_else(runs, tmp_path, capsys):
    run = tmp_path / "evil<i>"
    shutil.copytree(runs / "a", run)
    records = lines(run / "held_out.jsonl")
    (run / "held_out.jsonl").unlink()
    for record in records:
        names = ("prompts", "completions")
        append_jsonl(run / "held_out.jsonl", {**record, **{n: [EVIL] * 6 for n in names if n in record}})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert main(["report", str(run)]) == 0
    assert "pass@1 (short, greedy): " in capsys.readouterr().out
    markup = (run / "report.html").read_text(encoding="utf-8")
    page = Page(markup)
    assert EVIL in page.shown
    assert not {"script", "i", "b"} & set(page.tags) - {"i"}  # <i> is the legend's
    assert "<i>" not in markup.replace("<i style", "")
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert re.search(r"(?<!\\)<", text) is None


def test_two_runs_compared(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", str(runs / "a"), str(runs / "b"), "--out", str(tmp_path / "c.html")]) == 0
    printed = capsys.readouterr().out
    rate = next(line for line in printed.splitlines() if "trainer.learning_rate" in line)
    assert re.findall(r"[\d.]+", rate.split("rate")[1]) == ["0.001", "0.01"]
    settings = printed.split("outcomes")[0]
    assert "output_dir" not in settings
    assert "num_generations" not in settings  # the same in both
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") >= 8
    for name in "ab":
        after = [record for record in lines(runs / name / "held_out.jsonl") if "metric" in record][-1]
        assert f"{after['score']:.3f} [" in page.shown
    assert main(["report", str(runs / "a"), str(runs / "b")]) == 0
    assert (runs / "compare.html").is_file()


@pytest.mark.parametrize("place", ["a", "a/adapter"])
def test_eval_gives_the_runs_own_score(runs, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    assert main(["eval", f"adapter={place}", f"out={tmp_path / 'eval.json'}"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    after, sampled = lines(runs / "a" / "held_out.jsonl")[-2:]
    assert found["records"][0] == {**after, "step": 0}
    assert found["records"][1] == {**sampled, "step": 0}
    assert found["scores"][0]["value"] == after["score"]
    assert found["scores"][0]["low"] < after["score"] < found["scores"][0]["high"]
    assert found["engine"] == "transformers"


def test_eval_of_the_base_is_the_score_before(runs, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["eval", "adapter=none", *arguments(tiny_folders["tiny"], f"out={tmp_path / 'eval.json'}")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["records"][0] == lines(runs / "a" / "held_out.jsonl")[0]
    assert found["adapter_sha256"] is None


def test_a_failed_run_leaves_a_report_too(runs, tiny_folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "calls = []\n\ndef short(completions, **_):\n    calls.append(1)\n    assert len(calls) < 6, 'no more <b>'\n"
        "    return [float(i) for i, _ in enumerate(completions)]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(arguments(tiny_folders["tiny"], "output_dir=run", "reward.score_samples=0")) == 2
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "failed" in page.shown
    assert "no more <b>" in page.shown
    assert json.loads((tmp_path / "run" / "fault.json").read_text())["type"] == "UserError"


def test_sampling_for_pass_at_k_changes_no_training(runs, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    more = ("trainer.learning_rate=1e-3", f"output_dir={tmp_path / 'c'}", "reward.score_samples=0")
    assert main(arguments(tiny_folders["tiny"], *more)) == 0
    curves = [[line.get("reward") for line in lines(run / "metrics.jsonl")] for run in (runs / "a", tmp_path / "c")]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["report"], "name a run folder"),
        (["report", "nowhere"], "nowhere: no run there"),
        (["report", "nowhere", "--out", "x.html"], "for comparing several runs"),
        (["eval"], "adapter=… is needed"),
        (["eval", "adapter=nowhere"], "adapter=nowhere: no such folder"),
    ],
)
def test_mistakes_are_told(command, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert said in capsys.readouterr().err
