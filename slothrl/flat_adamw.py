"""bitsandbytes' 8-bit AdamW over many small tensors at once, where bitsandbytes itself launches once a tensor.

A LoRA on every projection of an 8B model is 448 tensors: 448 launches and as many waits for the device in every step.
Here tensors of one kind are gathered side by side, updated by one call of bitsandbytes' own kernel, and written back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import optimizer_update_8bit_blockwise, optimizer_update_32bit
from bitsandbytes.optim import AdamW, AdamW8bit
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

BLOCK = 256  # values that share a scale: every tensor begins a new one, as it does alone
MOST = 2**24  # values of a bucket: two copies of them, 128 MiB in float32, are there during a step
STATES, SCALES = {"state1": "qmap1", "state2": "qmap2"}, ("absmax1", "absmax2")


@dataclass
class Bucket:
    """Tensors that are updated together, and their state, of which the optimizer's own entries are views.

    members: (place in their group, parameter). fillers: zeros after each up to a whole block, or None where it has one.
    states: two flat tensors. scales: two of float32, one value a block; none where the states are float32.
    """

    members: list[tuple[int, Tensor]]
    fillers: list[Tensor | None]
    states: list[Tensor]
    scales: list[Tensor]

    @property
    def ready(self) -> bool | None:
        """Whether all tensors have a gradient; None: some have."""
        having = sum(p.grad is not None for _, p in self.members)
        return None if 0 < having < len(self.members) else having > 0


class FlatAdamW8bit(AdamW):
    """Bit for bit `bitsandbytes.optim.AdamW8bit`, its state and state_dict too, in one launch for 2^24 values.

    Parameters stay where they are: whoever holds their addresses sees the update. Tensors are updated together that
    are in one group, of one dtype and device, with states of the same bits and as many steps behind them; whatever
    has no company, is not contiguous or is treated specially by bitsandbytes' manager is updated by bitsandbytes
    alone. A parameter without a gradient is passed over. There is no wait for the device unless the current stream
    is not the default one, on which bitsandbytes' kernels run.

    Args: those of `bitsandbytes.optim.AdamW8bit`, but amsgrad, optim_bits and is_paged.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, args=None, min_8bit_size=4096
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, False, 8, args, min_8bit_size)
        self._buckets: dict[int, list[Bucket]] = {}
        self._normed = getattr(self.args, "max_unorm", 0.0) > 0  # of each tensor's own norm

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # other tensors: what was loaded
        self._buckets = {}

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        with _on_the_default_stream():
            for place, group in enumerate(self.param_groups):
                self._step_group(place, group)
        return loss

    def _step_group(self, place: int, group: dict[str, Any]) -> None:
        found = [(bucket, bucket.ready) for bucket in self._buckets.get(place, [])]
        buckets = [bucket for bucket, ready in found if ready is not None]
        inside = {id(p) for bucket in buckets for _, p in bucket.members}
        loose = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None and id(p) not in inside]
        made, alone = self._gathered(place, group, loose)
        self._buckets[place] = buckets + made
        for bucket in [bucket for bucket, ready in found if ready] + made:
            self._update(bucket, place, group)
        for i, p in alone:
            self.update_step(group, p, place, i)

    def _gathered(self, place: int, group: dict[str, Any], loose: list) -> tuple[list[Bucket], list]:
        """New buckets of these parameters, and those that are best left alone."""
        alike: dict[tuple, list[tuple[int, Tensor]]] = defaultdict(list)
        alone = []
        for i, p in loose:
            state = self.state[p]
            if not state:
                self.init_state(group, p, place, i)
            special = (place, i) in self.mng.index2config or id(p) in self.mng.pid2config or self._normed
            if special or not p.is_contiguous() or p.grad.layout != torch.strided or p.numel() > MOST:
                alone.append((i, p))
            else:
                alike[p.dtype, p.device, state["state1"].dtype, state["step"]].append((i, p))
        made = []
        for members in (part for whole in alike.values() for part in _parts(whole)):
            if len(members) > 1:
                made.append(self._bucket(members))
            else:
                alone += members
        return made, alone

    def _bucket(self, members: list[tuple[int, Tensor]]) -> Bucket:
        """The members' states side by side, and views in their place."""
        parameters = [p for _, p in members]
        fillers = [p.new_zeros(-p.numel() % BLOCK) if p.numel() % BLOCK else None for p in parameters]
        pieces = _filled(parameters, fillers)
        count, states = sum(piece.numel() for piece in pieces), [self.state[p] for p in parameters]
        flat, scales = [], []
        for name, qmap in STATES.items():
            old = [state[name] for state in states]
            # What fills up holds the code of 0.0, not the code 0, which is -1 times the block's scale.
            zero = int((states[0][qmap] == 0).nonzero()[0]) if qmap in states[0] else 0
            flat.append(old[0].new_full((count,), zero))
            views = _members(_unflatten_dense_tensors(flat[-1], pieces), fillers)
            torch._foreach_copy_(views, old)
            for state, view in zip(states, views, strict=True):
                state[name] = view
        for name in SCALES if "qmap1" in states[0] else ():
            old = [state[name] for state in states]
            scales.append(_flatten_dense_tensors(old))
            for state, view in zip(states, _unflatten_dense_tensors(scales[-1], old), strict=True):
                state[name] = view
        return Bucket(members, fillers, flat, scales)

    def _update(self, bucket: Bucket, place: int, group: dict[str, Any]) -> None:
        """One step of a bucket: its parameters and gradients gathered, updated and the parameters written back."""
        parameters = [p for _, p in bucket.members]
        for p in parameters:
            self.state[p]["step"] += 1
        state, config = self.state[parameters[0]], self.get_config(place, bucket.members[0][0], group)
        pieces = _filled(parameters, bucket.fillers)
        values = _flatten_dense_tensors(pieces)
        gradients = _flatten_dense_tensors(_filled([p.grad for p in parameters if p.grad is not None], bucket.fillers))
        (beta1, beta2, *_), rate, decay = config["betas"], config["lr"], config["weight_decay"]
        one, two = bucket.states
        skip = config["skip_zeros"]
        if bucket.scales:
            numbers = (beta1, beta2, 0.0, 0.0, config["eps"], state["step"], rate)
            rest = (state["qmap1"], state["qmap2"], bucket.scales[0], bucket.scales[1], decay)
            optimizer_update_8bit_blockwise("adam", gradients, values, one, two, *numbers, *rest, skip_zeros=skip)
        else:
            numbers = (beta1, config["eps"], state["step"], rate, two, beta2)
            optimizer_update_32bit("adam", gradients, values, one, *numbers, weight_decay=decay, skip_zeros=skip)
        torch._foreach_copy_(parameters, _members(_unflatten_dense_tensors(values, pieces), bucket.fillers))


def in_few_launches(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A `FlatAdamW8bit` in place of bitsandbytes' 8-bit AdamW before its first step; any other `optimizer` itself."""
    if type(optimizer) not in (AdamW, AdamW8bit) or optimizer.state or optimizer.is_paged:  # pyright: ignore
        return optimizer
    if optimizer.args.optim_bits != 8:  # pyright: ignore
        return optimizer
    return FlatAdamW8bit(optimizer.param_groups, args=optimizer.args, **_defaults(optimizer))  # pyright: ignore


def _defaults(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}


def _parts(members: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """In their order, at most MOST values each."""
    part, count = [], 0
    for i, p in members:
        if part and count + p.numel() > MOST:
            yield part
            part, count = [], 0
        part.append((i, p))
        count += p.numel()
    yield part


def _filled(tensors: Sequence[Tensor], fillers: Sequence[Tensor | None]) -> list[Tensor]:
    """Each tensor and what fills it up."""
    pairs = zip(tensors, fillers, strict=True)
    return [t for pair in pairs for t in pair if t is not None]


def _members(pieces: Sequence[Tensor], fillers: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors without what fills them up: the reverse of `_filled`."""
    rest = iter(pieces)
    return [(next(rest), filler is None or next(rest))[0] for filler in fillers]


@contextmanager
def _on_the_default_stream() -> Iterator[None]:
    """Order with bitsandbytes' kernels, which run on the default stream whatever the current one is."""
    elsewhere = torch.cuda.is_initialized() and torch.cuda.current_stream() != torch.cuda.default_stream()
    if elsewhere:
        torch.cuda.synchronize()
    yield
    if elsewhere:
        torch.cuda.synchronize()
