"""How an epoch is shuffled, kept for the run that goes on in the middle of it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from slothrl.random_state import random_state, set_random_state


class EpochStart(TrainerCallback):
    """Notes how each epoch is shuffled, and shuffles the first one of a resumed run as it was.

    TRL's sampler draws every epoch's order from one generator, and skipping batches hides accelerate's sampler from
    transformers' set_epoch: without this a run resumed in its second epoch sees the first one's order again.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        trainer = self.trainer
        if trainer.resumed_shuffling:
            _shuffle_as(train_dataloader, trainer.resumed_shuffling, int(state.epoch or 0))
            trainer.resumed_shuffling = None
        trainer.epoch_shuffling = shuffling(train_dataloader)


def _sampler(dataloader: Any) -> Any:
    found: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(found, "batch_sampler"):
        found = found.batch_sampler
    return getattr(found, "sampler", None)


def shuffling(dataloader: Any) -> dict[str, Any]:
    """The random states from which the next pass over `dataloader` takes its order, as a tree."""
    sampler = _sampler(dataloader)
    # accelerate's sampler seeds its generator by the epoch, and has none before its first pass.
    generator = None if hasattr(sampler, "set_epoch") else getattr(sampler, "generator", None)
    return {"random": random_state(), "sampler": generator.get_state() if generator is not None else None}


def _shuffle_as(dataloader: Any, saved: dict[str, Any], epoch: int) -> None:
    sampler = _sampler(dataloader)
    generator = getattr(sampler, "generator", None)
    if generator is not None and saved["sampler"] is not None:
        generator.set_state(saved["sampler"])
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    set_random_state(saved["random"])
