"""Checkpoints of the trainers as drop-ins for TRL's, without the command line around them."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig

from slothrl import GRPOTrainer
from slothrl.checkpoint import checkpoints, files_of, step_of
from slothrl.flat_adamw import FlatAdamW8bit
from tests.helpers import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = tiny_tokenizer()
ROWS = Dataset.from_list([{"prompt": f"{i} + {i}"} for i in range(8)])


def letters(completions, **_):
    return [len(set(text)) / 10 for text in completions]


def trained_adapter():
    """A PEFT model whose adapter has been trained: TRL keeps a second one, "ref", of how it was at the start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(len(TOKENIZER), hidden=32), LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


MODELS = {"whole model": lambda: tiny_model(len(TOKENIZER), hidden=32), "trained adapter": trained_adapter}


def trainer(model, folder, **more) -> GRPOTrainer:
    settings = {"max_steps": 4, "save_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4}
    settings["beta"] = 0.1 if hasattr(model, "peft_config") else 0.0  # a whole reference model would be loaded by name
    settings |= {"max_completion_length": 6, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none", **more}
    args = GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, disable_tqdm=True, **settings)
    return GRPOTrainer(model, letters, args, train_dataset=ROWS, processing_class=TOKENIZER)


def weights(made: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


@pytest.mark.parametrize("kind, optim", [*((kind, "adamw_torch") for kind in MODELS), ("wide model", "adamw_8bit")])
def test_resume_is_exact(kind, optim, tmp_path, capsys):
    model = tiny_model(len(TOKENIZER), hidden=64) if kind == "wide model" else MODELS[kind]()
    first = trainer(copy.deepcopy(model), tmp_path, optim=optim)
    first.train()
    wanted = weights(first)
    if optim == "adamw_8bit":
        assert type(first.optimizer.optimizer) is FlatAdamW8bit
        assert any(state["state1"].dtype == torch.uint8 for state in first.optimizer.state.values())
    assert all(path.suffix in (".json", ".safetensors") for path in files_of(checkpoints(tmp_path)[0]))
    if kind == "trained adapter":
        assert "ref" in first.model.peft_config
        assert (tmp_path / "checkpoint-2" / "ref" / "adapter_model.safetensors").exists()
    for path in checkpoints(tmp_path)[:2]:  # 4 and 3: neither can be used
        (path / "manifest.json").unlink()
    second = trainer(copy.deepcopy(model), tmp_path, optim=optim)
    second.train(resume_from_checkpoint=True)
    assert "skipped checkpoint-4: it has no manifest.json" in capsys.readouterr().out
    found = weights(second)
    assert second.state.global_step == 4
    assert found.keys() == wanted.keys()
    for name in found:
        assert torch.equal(found[name], wanted[name]), name
    before = dict(model.named_parameters())
    assert any(not torch.equal(found[name], before[name]) for name in found if name in before)  # it trained


def test_save_total_limit_and_an_earlier_run_in_the_folder(tmp_path):
    trainer(MODELS["whole model"](), tmp_path, max_steps=6, save_steps=6).train()
    trainer(MODELS["whole model"](), tmp_path, max_steps=3, save_total_limit=2).train()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 2]


def test_a_checkpoint_with_the_model_only(tmp_path):
    trainer(MODELS["whole model"](), tmp_path, save_only_model=True, max_steps=1).train()
    names = {path.name for path in files_of(tmp_path / "checkpoint-1")}
    assert "model.safetensors" in names
    assert "optimizer.json" not in names
    with pytest.raises(ValueError, match="no checkpoint that can be used"):
        trainer(MODELS["whole model"](), tmp_path).train(resume_from_checkpoint=True)
