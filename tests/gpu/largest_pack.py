"""The largest packed update that fits: forward and backward of one pack of ever more tokens, until memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model

from slothrl.fuse import fuse
from slothrl.packed_batch import build_pack, pack_logprobs
from slothrl.packed_model import packed_mode
from slothrl.packing import Block, MicroBatch, Row
from tests.gpu.fit_steps import lora


def pack_of(tokens: int, prompt: int, completion: int, group: int) -> MicroBatch:
    """A pack of exactly `tokens`: whole groups with one prompt each, the last one cut to what is left.

    Raises:
        ValueError: not even a prompt and two tokens.
    """
    if tokens < prompt + 2:
        raise ValueError(f"{tokens} tokens hold no prompt of {prompt} and a completion")
    blocks, index, left = [], 0, tokens
    while left >= prompt + 2:
        rows: list[Row] = []
        left -= prompt
        while left and len(rows) < group:
            read = min(completion - 1, left)
            rows.append(Row(index, len(blocks), prompt, read + 1))
            index, left = index + 1, left - read
        blocks.append(Block(tuple(rows)))
    if left:  # less than a prompt: the last completion is that much longer
        *others, last = blocks[-1].rows
        blocks[-1] = Block((*others, Row(last.index, last.group, prompt, last.completion + left)))
    return MicroBatch(tuple(blocks))


class PackedUpdate:
    """A model with LoRA, gradients and AdamW's state, as they are in the middle of a run.

    Args:
        model: a base on its device; PEFT's layers are put into it.
        fused: with our layers, as a run has them.
    """

    def __init__(self, model: Any, fused: bool = True):
        self.model = get_peft_model(model, lora()).train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.enable_input_require_grads()
        if fused:
            report = fuse(self.model)
            assert report.fused, report.rows()
        self.device = next(self.model.parameters()).device
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.optimizer.step()

    def run(self, batch: MicroBatch) -> float:
        """Forward and backward; the gradient's norm."""
        rows, vocabulary = batch.rows, self.model.config.vocab_size
        prompt, longest = rows[0].prompt, max(row.completion for row in rows)
        ids = torch.randint(3, vocabulary, (len(rows), prompt + longest), device=self.device)
        lengths = torch.tensor([row.completion for row in rows], device=self.device)
        counted = torch.arange(longest, device=self.device) < lengths[:, None]
        self.optimizer.zero_grad(set_to_none=False)
        with packed_mode(self.model):
            pack = build_pack(batch, ids, counted)
            with torch.autocast(self.device.type, torch.bfloat16):
                logprobs, _ = pack_logprobs(self.model, pack)
            (-logprobs.sum() / counted.sum()).backward()
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        return torch.stack(norms).norm().item()

    def fits(self, tokens: int, prompt: int, completion: int, group: int) -> bool:
        """Whether memory holds two such updates, one after the other: holes of the first are there in the second.

        Raises:
            AssertionError: an update without a gradient, which would not be one.
        """
        try:
            for _ in range(2):
                norm = self.run(pack_of(tokens, prompt, completion, group))
                assert 0 < norm < float("inf"), norm
            held = True
        except torch.OutOfMemoryError:
            held = False
        # Only here is the exception gone, and with it the frames that hold the pack's tensors.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return held


def largest_step(holds: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` for which `holds`, by bisection; 0: not even one."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle * step) else (low, middle - 1)
    return low * step
