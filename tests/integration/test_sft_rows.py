"""Rows of SFT before a model is loaded: their length as TRL tokenizes them, and loss on what the assistant says."""

import json

import pytest
from datasets import Dataset
from test_equality_sft import DATA, MARKED, made

from slothrl.__main__ import main
from slothrl.compose import compose_config
from slothrl.fit_config import settings_of
from slothrl.prompts import longest_example
from slothrl.trainers.sft import SFTTrainer
from tests.helpers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("data", DATA)
def test_the_longest(data, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    trainer = made(SFTTrainer, data, tmp_path)
    wanted = max(len(row["input_ids"]) for row in trainer.train_dataset)  # pyright: ignore
    assert longest_example(Dataset.from_dict(DATA[data]), tokenizer) == wanted


def test_memory_is_for_the_longest():
    """At most max_length, and that where TRL packs."""
    for expected, longest, overrides in ((40, 40, []), (1024, 5000, []), (1024, 40, ["trainer.packing=true"])):
        config = compose_config(["algo=sft", "gpu=cpu", *overrides], anywhere=True)
        assert settings_of(config, "none", 4, None, longest, None).completion == expected


def test_assistant_only_loss(tmp_path, tiny_folders, monkeypatch, capsys):
    """A template without marks, and text: told before the weights, with what to do."""
    monkeypatch.chdir(tmp_path)
    common = ["algo=sft", "model=hub", f"model.name={tiny_folders['tiny']}", "reward.functions=[]", "data=file"]
    common += ["data.path=rows.jsonl", "trainer.assistant_only_loss=true", "data.eval_size=0", "trainer.max_steps=1"]
    common += ["gpu=cpu", "logger.progress=false", "data.system=null"]
    talks = [{"messages": talk} for talk in DATA["messages"]["messages"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    assert main([*common, "output_dir=a"]) == 2
    said = capsys.readouterr().err
    assert "error: trainer.assistant_only_loss=true: the model's chat template does not mark" in said
    assert "trainer.chat_template_path=" in said
    (tmp_path / "marked.jinja").write_text(MARKED, encoding="utf-8")
    assert main([*common, "trainer.chat_template_path=marked.jinja", "output_dir=b"]) == 0
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b"}), encoding="utf-8")
    assert main([*common, "output_dir=c"]) == 2
    assert "trainer.assistant_only_loss=true needs messages, and the data has text" in capsys.readouterr().err
