"""Memory that grows: the tensors alive between two steps are the same many steps later, and after going on."""

import gc
import json

import pytest
import torch
from transformers import TrainerCallback

from slothrl.train import main

pytestmark = pytest.mark.usefixtures("one_thread")
REWARD = "def letters(completions, **_):\n    return [len(set(str(text))) / 10 for text in completions]\n"
STEPS = 16


def alive() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Watch(TrainerCallback):
    """What is alive after each step."""

    seen: dict[int, int] = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 8 == 0:
            self.seen[state.global_step] = alive()


@pytest.fixture
def watched(monkeypatch) -> dict[int, int]:
    """`Watch.seen` of the next run: the trainer's callbacks are added where the run adds its own."""
    import slothrl.training as training

    attach, Watch.seen = training._attach, {}

    def attached(trainer, *arguments):
        attach(trainer, *arguments)
        trainer.add_callback(Watch())

    monkeypatch.setattr(training, "_attach", attached)
    return Watch.seen


def test_nothing_creeps_and_going_on_takes_no_more(watched, tmp_path, tiny_folders):
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    run = tmp_path / "run"
    arguments = [
        "gpu=cpu", "model=hub", f"model.name={tiny_folders['tiny']}", "rollout=transformers", "reward=custom",
        f"reward.functions=[{tmp_path}/mine.py:letters]", "data.max_prompt_length=100", "data.train_size=16",
        "data.eval_size=4", "trainer.per_device_train_batch_size=8", "trainer.num_generations=4",
        "trainer.max_completion_length=8", f"trainer.max_steps={STEPS}", "trainer.save_steps=8",
        "trainer.save_total_limit=5", "trainer.learning_rate=0.001", "logger.progress=false", "logger.samples=0",
    ]  # fmt: skip
    empty = alive()
    assert main([*arguments, f"output_dir={run}"]) == 0
    first, last = watched[8], watched[STEPS]
    # Completions differ in length by a few tokens, and TRL keeps the last batch of its logs: kilobytes.
    assert last < first + 20_000, dict(watched)
    watched.clear()
    before = alive()
    assert before < empty + 20_000  # nothing of a run is left in memory when it is over
    (run / "summary.json").unlink()
    assert main([f"resume={run / 'checkpoint-8'}"]) == 0
    assert set(watched) == {STEPS}
    assert max(watched.values()) - before < last + 20_000
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
