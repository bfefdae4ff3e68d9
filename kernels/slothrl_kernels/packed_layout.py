"""How sequences lie in a pack: one after the other, no padding, some going on where a shared prefix ends."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """A pack of T tokens as S consecutive segments; make it with `PackedLayout.build`.

    A segment is a sequence of its own (a root) or continues an earlier root, its parent: the prompt of a group is one
    root and its completions are the children. The children of a root follow it directly, so that their queries are one
    stretch of memory.

    Attributes:
        lengths: (S,) tokens a segment, each at least 1.
        parents: (S,) -1 for a root, else the index of the segment it continues.
        cu_seqlens: (S + 1,) int32, where each segment starts, and T.
        position_ids: (T,) int64, counted from 0 in a root and from the parent's length in a child.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    cu_seqlens: Tensor
    position_ids: Tensor
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls, lengths: Sequence[int], parents: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> PackedLayout:
        """A layout with its tensors on `device`.

        Args:
            lengths: tokens a segment, in the order of the pack.
            parents: -1 or the index of an earlier segment, for each; None: nobody has a parent.
            device: where the pack's tokens live.

        Raises:
            ValueError: no segments, an empty segment, or parents that are no roots directly before their children.
        """
        lengths = tuple(int(n) for n in lengths)
        parents = (-1,) * len(lengths) if parents is None else tuple(int(p) for p in parents)
        _check(lengths, parents)
        starts = torch.tensor([0, *accumulate(lengths)])
        first = torch.tensor([lengths[p] if p >= 0 else 0 for p in parents])  # position of each segment's first token
        shift = (first - starts[:-1]).repeat_interleave(torch.tensor(lengths))
        positions = torch.arange(int(starts[-1])) + shift
        return cls(lengths, parents, starts.to(device, torch.int32), positions.to(device))

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """(S + 1,) the values of cu_seqlens, without asking the device."""
        return (0, *accumulate(self.lengths))

    @property
    def tokens(self) -> int:
        """T."""
        return self.starts[-1]

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    @cached_property
    def max_position(self) -> int:
        """The largest position id."""
        return max(n + (self.lengths[p] if p >= 0 else 0) for n, p in zip(self.lengths, self.parents, strict=True)) - 1

    @cached_property
    def has_parents(self) -> bool:
        return any(p >= 0 for p in self.parents)

    @cached_property
    def families(self) -> tuple[tuple[int, int, int], ...]:
        """Of each root with children: where it starts, where its children start, where they end, in tokens."""
        spans: dict[int, tuple[int, int, int]] = {}
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                spans[parent] = (self.starts[parent], self.starts[parent + 1], self.starts[i + 1])
        return tuple(spans.values())

    @cached_property
    def prefix_tokens(self) -> Tensor:
        """int64, the places of all tokens that children share, family by family."""
        places = [torch.arange(first, last) for first, last, _ in self.families]
        return (torch.cat(places) if places else torch.arange(0)).to(self.device)

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), once for each key: what a backend works out of the layout serves all layers of a model."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


def _check(lengths: tuple[int, ...], parents: tuple[int, ...]) -> None:
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a pack needs segments of at least one token, not lengths {lengths}")
    if len(parents) != len(lengths):
        raise ValueError(f"{len(parents)} parents for {len(lengths)} segments")
    root = -1  # the last root before segment i: the only one that it may continue
    for i, parent in enumerate(parents):
        if parent == -1:
            root = i
        elif parent != root or root < 0:
            raise ValueError(
                f"segment {i} names {parent} as its parent: a parent is the nearest segment before it without a parent"
            )
