"""Linear layers with LoRA in one step each, and those that are given the same tensor in one step together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from slothrl_kernels import Impl, lora_linear
from torch import Tensor, nn

from slothrl.fuse_layers import LinearReader, Reading
from slothrl.fuse_replace import Replacement


class FusedLinear(Replacement):
    """One projection: LoRA and base in one step of autograd."""

    def __init__(self, module: nn.Module, impl: Impl) -> None:
        super().__init__(module)
        self.reader = LinearReader(module)
        self.impl: Impl = impl

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reading = None if args or kwargs else self.reader.read(x)
        return self.original(x, *args, **kwargs) if reading is None else run([reading], x, self.impl)[0]


class FusedGroup:
    """Projections that the model gives one and the same tensor, in this order: the first one computes them all.

    The model's own code still calls each of them, and gets what is its own. A member that is called with another tensor
    than the first one computes alone.
    """

    def __init__(self, modules: Sequence[nn.Module], impl: Impl) -> None:
        self.impl: Impl = impl
        self.readers = [LinearReader(module) for module in modules]
        self.members = [_Member(module, self, i) for i, module in enumerate(modules)]
        self._given: tuple[Any, ...] | None = None  # the tensor, its version, whether autograd watched
        self._waiting: dict[int, Tensor] = {}

    def compute(self, index: int, x: Tensor) -> Tensor | None:
        """What member `index` returns for x; None where its own forward has to."""
        given = (x, x._version, torch.is_grad_enabled())
        if index == 0:
            self._given, self._waiting = None, {}
            readings = [reader.read(x) for reader in self.readers]
            if all(r is not None for r in readings) and _one_dtype(together := [r for r in readings if r]):
                outputs = run(together, x, self.impl)
                self._given, self._waiting = given, dict(enumerate(outputs))
                return self._take(0)
        elif (
            index in self._waiting and self._given is not None and self._given[0] is x and self._given[1:] == given[1:]
        ):
            return self._take(index)
        reading = self.readers[index].read(x)
        return None if reading is None else run([reading], x, self.impl)[0]

    def _take(self, index: int) -> Tensor:
        output = self._waiting.pop(index)
        if not self._waiting:
            self._given = None  # the input is not held longer than the model holds it
        return output


class _Member(Replacement):
    def __init__(self, module: nn.Module, group: FusedGroup, index: int) -> None:
        super().__init__(module)
        self.group, self.index = group, index

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = None if args or kwargs else self.group.compute(self.index, x)
        return self.original(x, *args, **kwargs) if result is None else result


def run(readings: Sequence[Reading], x: Tensor, impl: Impl) -> list[Tensor]:
    """The layers' results for x (..., K), each (..., N) of its own dtype. `readings` agree in their dtypes."""
    dropout = [r.dropout for r in readings] if any(r.dropout for r in readings) else ()
    first = next((r for r in readings if r.projection.a is not None), readings[0])
    group = [r.projection for r in readings]
    outputs = lora_linear(x.to(first.dtype), group, dropout, first.lora_dtype, impl=impl)
    return [y.to(r.out_dtype) for y, r in zip(outputs, readings, strict=True)]


def _one_dtype(readings: Sequence[Reading]) -> bool:
    adapted = {r.lora_dtype for r in readings if r.projection.a is not None}
    return len({r.dtype for r in readings}) == 1 and len(adapted) <= 1
