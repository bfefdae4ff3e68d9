"""Which tokens go into which micro-batch: a generation batch packed by a budget of tokens, each prompt once a group.

Plain integers in and out; `slothrl.packed_batch` makes tensors of it. A completion of n predicted tokens is read up to
its last but one: the prompt's last token predicts its first, and nothing follows its last.

The rules, which a figure or a test stands behind:

- A prompt is shared by its completions where that saves at least `SHARE_FROM` of the group's tokens: 3.2 tokens of a
  hundred are more than what the second stretch of keys costs in attention.
- A group is split, and its prompt repeated, only where the group does not fit the budget alone: one more micro-batch
  costs a pass over the base's weights, one more prompt costs its tokens, and both are small.
- Micro-batches are filled longest first; the largest goes first, so that what does not fit in memory fails at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHARED_PREFIX = ("auto", "always", "never")
SHARE_FROM = 1 / 32  # of the tokens of a group that is not shared


@dataclass(frozen=True)
class Row:
    """One completion, as the planner sees it.

    Attributes:
        index: its row in the batch.
        group: rows with the same number have the same prompt.
        prompt: tokens of the prompt, at least 1.
        completion: tokens up to the last one that is predicted, at least 1.
    """

    index: int
    group: int
    prompt: int
    completion: int

    @property
    def read(self) -> int:
        """Tokens of the completion that the model reads."""
        return self.completion - 1


@dataclass(frozen=True)
class Block:
    """Rows that stay together: one prompt and what follows it, or one row alone."""

    rows: tuple[Row, ...]

    @property
    def shared(self) -> bool:
        return len(self.rows) > 1

    @property
    def tokens(self) -> int:
        return self.rows[0].prompt + sum(row.read for row in self.rows)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward reads."""

    blocks: tuple[Block, ...]

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block.rows]


def plan_micro_batches(rows: Sequence[Row], budget: int, shared_prefix: str = "auto") -> list[MicroBatch]:
    """Divide rows into micro-batches of at most `budget` tokens; a row that is longer gets one of its own.

    Args:
        rows: in any order; those of a group need not be neighbours.
        budget: tokens read in one forward, prompts counted as often as they are read.
        shared_prefix: "auto" by the rule above, "always" or "never".

    Returns:
        The micro-batches, largest first; the same for the same rows.

    Raises:
        ValueError: a budget below 1, an unknown `shared_prefix`, an empty prompt or completion, or prompts of one group
            that differ in length.
    """
    if budget < 1:
        raise ValueError(f"a micro-batch needs at least one token, not a budget of {budget}")
    if shared_prefix not in SHARED_PREFIX:
        raise ValueError(f"shared_prefix {shared_prefix!r} is not one of {', '.join(SHARED_PREFIX)}")
    blocks = [block for group in _groups(rows) for block in _blocks(group, budget, shared_prefix)]
    bins = _fill([(block.tokens, block) for block in blocks], budget)
    return sorted((MicroBatch(tuple(found)) for found in bins), key=lambda batch: -batch.tokens)


def useful_tokens(rows: Iterable[Row]) -> int:
    """Tokens that no plan could leave unread: each prompt once, each completion up to its last but one."""
    return sum(group[0].prompt + sum(row.read for row in group) for group in _groups(rows))


def sharing_pays(rows: Sequence[Row]) -> bool:
    """Whether one prompt for these rows of a group saves enough of what they would read one by one."""
    alone = sum(row.prompt + row.read for row in rows)
    return len(rows) > 1 and alone - Block(tuple(rows)).tokens >= SHARE_FROM * alone


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by group, in the order in which the groups first come."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row.prompt < 1 or row.completion < 1:
            sizes = f"a prompt of {row.prompt} and a completion of {row.completion} tokens"
            raise ValueError(f"row {row.index}: {sizes}")
        found.setdefault(row.group, []).append(row)
        if found[row.group][0].prompt != row.prompt:
            raise ValueError(f"row {row.index} has another prompt than its group {row.group}")
    return list(found.values())


def _blocks(group: list[Row], budget: int, shared_prefix: str) -> list[Block]:
    share = shared_prefix == "always" or (shared_prefix == "auto" and sharing_pays(group))
    if not share:
        return [Block((row,)) for row in group]
    if Block(tuple(group)).tokens <= budget:
        return [Block(tuple(group))]
    parts = _fill([(row.read, row) for row in group], budget - group[0].prompt)
    return [Block(tuple(part)) for part in parts]


def _fill(sized: Sequence[tuple[int, object]], capacity: int) -> list[list]:
    """Best-fit decreasing: each item, longest first, goes where it leaves the least room; else it opens a new bin."""
    bins: list[list] = []
    room: list[int] = []
    for size, item in sorted(sized, key=lambda pair: -pair[0]):
        fitting = [i for i, left in enumerate(room) if size <= left]
        if fitting:
            place = min(fitting, key=lambda i: room[i])
            bins[place].append(item)
            room[place] -= size
        else:
            bins.append([item])
            room.append(capacity - size)
    return bins
