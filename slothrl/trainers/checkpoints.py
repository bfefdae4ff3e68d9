"""What both trainers put into a checkpoint and take out of it, in place of transformers' pickles."""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState, TrainerState

from slothrl import __version__, checkpoint
from slothrl.phases import CHECKPOINT, Phases
from slothrl.random_state import random_state, set_random_state
from slothrl.resume import log_lengths
from slothrl.tensor_tree import load_tree, save_tree, tree_bytes
from slothrl.trainers.epochs import EpochStart, shuffling

STATE = "trainer_state.json"  # transformers' name for its own JSON
# Attributes of the trainers, as they stand between two steps.
COUNTERS = (
    "_step",
    "_total_train_tokens",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "_current_train_step_time",
    "entropy_coef",
    "_last_world_entropy",
    "nonfinite_in_a_row",
    "chosen_token_budget",
    "watch_state",
)


class ExactCheckpoints(Trainer):
    """A mixin before one of TRL's trainers: atomic checkpoints from which training goes on bit for bit.

    Attributes:
        made_of: goes into each manifest, as `slothrl.fingerprint.fingerprint` makes it; a run's.
        settings: likewise, the trainer fields.
    """

    phases: Phases
    optimizer: Any  # what transformers calls them more broadly
    lr_scheduler: Any

    def __init__(self, *positional, **named):
        self.phases = Phases()
        self.made_of: dict[str, Any] | None = None
        self.settings: dict[str, Any] | None = None
        self.epoch_shuffling: dict[str, Any] = {}
        self.resumed_shuffling: dict[str, Any] | None = None
        super().__init__(*positional, **named)
        self.add_callback(EpochStart(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional, **named):
        """As transformers'; `True` takes the newest checkpoint that verifies, and names those it skips."""
        if resume_from_checkpoint is True:
            search = checkpoint.newest(Path(self.args.output_dir or "."))
            for path, reason in search.skipped:
                print(f"skipped {path.name}: {reason}")
            if search.found is None:
                raise ValueError(f"no checkpoint that can be used in {self.args.output_dir}")
            resume_from_checkpoint = str(search.found)
        return super().train(resume_from_checkpoint, *positional, **named)

    # --- saving -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.world_size > 1:
            raise NotImplementedError("slothrl saves checkpoints of one process; set save_strategy='no'")
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder = Path(self._get_output_dir(trial=trial))
        folder.mkdir(parents=True, exist_ok=True)
        best = self._note_best(folder)
        self._note_callbacks()
        with self.phases.during(CHECKPOINT):
            needed, limit = self._needed_bytes(), self.args.save_total_limit
            checkpoint.make_room(folder, needed, limit, best)
            about = {
                "resumable": not self.args.save_only_model,
                "slothrl": __version__,
                "fingerprint": self.made_of,
                "settings": self.settings,
                "logs": log_lengths(folder),
            }
            path = checkpoint.write(folder, self.state.global_step, self._fill, about, needed)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(path))
            checkpoint.rotate(folder, limit, path, best)

    def _fill(self, folder: Path) -> None:
        self._save_weights(folder)
        for card in folder.rglob("README.md"):  # PEFT's model cards
            card.unlink()
        self.state.save_to_json(str(folder / STATE))
        if self.args.save_only_model:
            return
        save_tree(folder, "optimizer", self.optimizer.state_dict())
        save_tree(folder, "scheduler", self.lr_scheduler.state_dict())
        if getattr(self.accelerator, "scaler", None) is not None:
            save_tree(folder, "scaler", self.accelerator.scaler.state_dict())  # pyright: ignore
        save_tree(folder, "random", {"now": random_state(), "epoch": self._next_epoch_start()})
        save_tree(folder, "progress", self._progress())
        if (rollouts := self._rollouts()) is not None:
            save_tree(folder, "rollouts", rollouts)

    def _save_weights(self, folder: Path) -> None:
        """The adapter, or the whole model where there is none."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(str(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """transformers' own, without training_args.bin, which is a pickle."""
        folder = Path(output_dir or self.args.output_dir or ".")
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, (PreTrainedModel, PeftModel)):
            raise TypeError(f"cannot save a {type(model).__name__} without pickle")
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder), state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))  # pyright: ignore

    def _note_best(self, folder: Path) -> Path | None:
        """Where the best checkpoint is or is about to be, where a metric chooses one."""
        if not self.state.best_global_step:
            return None
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if best.exists() or self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(best)
        return Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None

    def _note_callbacks(self) -> None:
        """The states of callbacks that have one, in trainer_state.json."""
        stateful = [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]
        fresh: dict[str, Any] = {}
        for callback in stateful:
            fresh.setdefault(type(callback).__name__, []).append(callback.state())
        kept: Any = self.state.stateful_callbacks
        for name, states in fresh.items():
            kept[name] = states if isinstance(kept.get(name), list) else states[-1]

    def _needed_bytes(self) -> int:
        """About what the next checkpoint takes: tensors, and a little for the JSON beside them."""
        weights = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)  # pyright: ignore
        if not isinstance(self.model, PeftModel):
            weights = sum(p.nbytes for p in self.model.parameters())  # pyright: ignore
        state = tree_bytes(self.optimizer.state_dict()) if self.optimizer is not None else 0
        history = 600 * (len(self.state.log_history) + 100)
        return weights + state + tree_bytes(self._rollouts()) + history + 2**16

    def _progress(self) -> dict[str, Any]:
        """What the trainers count between two logs and two generations; transformers and TRL lose it."""
        metrics = {mode: dict(values) for mode, values in getattr(self, "_metrics", {}).items()}
        counters = {name: getattr(self, name) for name in COUNTERS if hasattr(self, name)}
        return {"counters": counters, "metrics": metrics, "loss": self._tr_loss}

    def _rollouts(self) -> dict[str, Any] | None:
        """The generation batch where its completions are still to be trained on, else None."""
        buffered = getattr(self, "_buffered_inputs", None)
        if buffered is None:
            return None
        args: Any = self.args
        if self._step % (args.steps_per_generation * self.num_iterations) == 0:  # pyright: ignore - TRL's
            return None
        logs = {name: _plain(values) for name, values in self._logs.items() if name != "images"}  # pyright: ignore
        return {"inputs": buffered, "logs": logs}

    def _next_epoch_start(self) -> dict[str, Any]:
        """Random states from which the epoch that a resumed run begins in was, or will be, shuffled."""
        if self.state.epoch is not None and float(self.state.epoch).is_integer():
            return shuffling(self.callback_handler.train_dataloader)
        return self.epoch_shuffling

    # --- loading ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        path = Path(resume_from_checkpoint)
        if not checkpoint.verify(path).get("resumable", True):
            raise checkpoint.BadCheckpointError(f"{path} holds the model only")
        model = self.model if model is None else model
        if isinstance(model, PeftModel):
            load_adapters(model, path)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self.optimizer.load_state_dict(load_tree(folder, "optimizer"))
        self.lr_scheduler.load_state_dict(load_tree(folder, "scheduler"))
        self.resumed_shuffling = load_tree(folder, "random")["epoch"]
        if (folder / "rollouts.json").exists():
            rollouts = load_tree(folder, "rollouts")
            self._buffered_inputs = _to_device(rollouts["inputs"], self.args.device)
            _refill(self._logs, rollouts["logs"])  # pyright: ignore - TRL's

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / "scaler.json").exists():
            self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint), "scaler"))  # pyright: ignore

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last of transformers' hooks, called when all else is set up: so the counters come back here too."""
        if checkpoint is None:
            return
        progress = load_tree(Path(checkpoint), "progress")
        for name, value in progress["counters"].items():
            setattr(self, name, value)
        self._tr_loss = progress["loss"].to(self.args.device)
        for mode, values in progress["metrics"].items():
            self._metrics[mode] = defaultdict(list, values)  # pyright: ignore - TRL's
        set_random_state(load_tree(Path(checkpoint), "random")["now"])

    def take_over(self, folder: Path) -> None:
        """Be as at the end of training, from the checkpoint of the last step."""
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / STATE))
        self._load_rng_state(str(folder))


def load_adapters(model: PeftModel, folder: Path) -> None:
    """Write saved adapters into those of `model`, in place: the default one, and others from folders of their names.

    transformers' own code leaves the default adapter as it was where there is a second one, such as TRL's "ref".

    Raises:
        BadCheckpointError: an adapter of the model is not there, or has other tensors.
    """
    for name in model.peft_config:
        path = (folder if name == "default" else folder / name) / "adapter_model.safetensors"
        if not path.exists():
            raise checkpoint.BadCheckpointError(f"{folder} holds no adapter {name!r}")
        try:
            result = set_peft_model_state_dict(model, load_file(path), adapter_name=name)
        except RuntimeError as error:  # sizes
            raise checkpoint.BadCheckpointError(f"{path} does not fit the model's LoRA: {error}") from error
        if result.unexpected_keys:
            raise checkpoint.BadCheckpointError(
                f"{path} has tensors that the model has not: {result.unexpected_keys[:3]}"
            )


def _plain(values: Any) -> Any:
    return {name: list(items) for name, items in values.items()} if isinstance(values, dict) else list(values)


def _refill(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put saved entries back into TRL's bounded queues."""
    for name, values in saved.items():
        if isinstance(values, dict):
            for key, items in values.items():
                logs[name][key].extend(items)
        else:
            assert isinstance(logs[name], deque)
            logs[name].extend(values)


def _to_device(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _to_device(value, device) for key, value in tree.items()}
    return [_to_device(value, device) for value in tree] if isinstance(tree, list) else tree
