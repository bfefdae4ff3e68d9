"""A planned micro-batch as tensors: what the model reads, which hidden state predicts which token, and the way back.

B: rows of the batch, S: prompt + completion positions, T: completion positions, N: predicted tokens of a micro-batch.
With a shared prompt one hidden state, its last, predicts the first token of every completion: it is gathered once for
each, and autograd adds the gradients up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from slothrl_kernels.packed_layout import PackedLayout
from torch import Tensor, nn

from slothrl.logprobs import head_spec, selective_logprobs
from slothrl.packed_model import packed_forward
from slothrl.packing import Block, MicroBatch, Row


@dataclass(frozen=True, eq=False)
class Pack:
    """One micro-batch, on the device of the batch.

    Attributes:
        input_ids: (tokens,) int64, the segments one after the other.
        layout: where each segment lies and which prompt it continues.
        sources: (N,) int64, the position in the pack whose hidden state predicts a token.
        labels: (N,) int64, that token.
        rows: (R,) int64, the batch's rows that are in here, ascending.
        counted: (R, T) bool, the places of the N tokens, row by row.
    """

    input_ids: Tensor
    layout: PackedLayout
    sources: Tensor
    labels: Tensor
    rows: Tensor
    counted: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """(N,) values of the predicted tokens -> (R, T), 0 elsewhere."""
        return values.new_zeros(self.counted.shape).masked_scatter(self.counted, values)


def rows_to_pack(prompt_ids: Tensor, prompt_mask: Tensor, counted: Tensor) -> list[Row]:
    """The rows of a batch that have a token to predict, grouped by equal prompts.

    Args:
        prompt_ids: (B, P) int, padded on the left.
        prompt_mask: (B, P), 1 on real tokens.
        counted: (B, T) bool, the completion tokens to predict.
    """
    prompts, lengths = prompt_ids.cpu(), prompt_mask.sum(-1).tolist()
    ends = (counted * torch.arange(1, counted.size(1) + 1, device=counted.device)).amax(-1).tolist()
    groups: dict[bytes, int] = {}
    rows = []
    for index, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        if end:
            tokens = prompts[index, prompts.size(1) - length :].numpy().tobytes()
            rows.append(Row(index, groups.setdefault(tokens, len(groups)), int(length), int(end)))
    return rows


def build_pack(batch: MicroBatch, ids: Tensor, counted: Tensor) -> Pack:
    """The tensors of a planned micro-batch.

    Args:
        batch: of rows that `rows_to_pack` made.
        ids: (B, S) int64, prompts padded on the left, completions on the right.
        counted: (B, T) bool as for `rows_to_pack`, on the same device.
    """
    width = ids.size(1) - counted.size(1)  # of the prompts
    segments = _Segments()
    for block in batch.blocks:
        segments.add_block(block, width)
    rows = sorted(segments.before)
    places = torch.tensor(rows, device=ids.device)
    mine = counted[places]  # (R, T)
    reads = [torch.arange(first, last) + row * ids.size(1) for row, first, last in segments.reads]
    return Pack(
        input_ids=ids.flatten()[torch.cat(reads).to(ids.device)],
        layout=PackedLayout.build([len(read) for read in reads], segments.parents, ids.device),
        sources=_sources([segments.before[row] for row in rows], mine),
        labels=ids[places, width:][mine],
        rows=places,
        counted=mine,
    )


@dataclass
class _Segments:
    """The segments of a pack as they are added.

    Attributes:
        reads: (row, first column, last column + 1) of each, in the padded batch.
        parents: as in `PackedLayout`.
        before: for each row the positions in the pack of its prompt's last token and of its completion's first one.
    """

    reads: list[tuple[int, int, int]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    before: dict[int, tuple[int, int]] = field(default_factory=dict)
    tokens: int = 0

    def add_block(self, block: Block, width: int) -> None:
        root = block.rows[0]
        prompt_end = self.tokens + root.prompt - 1
        if not block.shared:
            self.before[root.index] = (prompt_end, prompt_end + 1)
            self._add(root.index, width - root.prompt, width + root.read, -1)
            return
        self._add(root.index, width - root.prompt, width, -1)
        parent = len(self.parents) - 1
        for row in block.rows:
            self.before[row.index] = (prompt_end, self.tokens)
            if row.read:  # a completion of one token is predicted by the prompt alone
                self._add(row.index, width, width + row.read, parent)

    def _add(self, row: int, first: int, last: int, parent: int) -> None:
        self.reads.append((row, first, last))
        self.parents.append(parent)
        self.tokens += last - first


def _sources(before: Sequence[tuple[int, int]], counted: Tensor) -> Tensor:
    """(N,) the position that predicts each counted token.

    Args:
        before: per row, the position of the prompt's last token and that of the completion's first one.
        counted: (R, T) bool.
    """
    ends, starts = torch.tensor(before, device=counted.device).T[:, :, None]  # (R, 1) each
    columns = torch.arange(counted.size(1), device=counted.device)
    return torch.where(columns == 0, ends, starts + columns - 1)[counted]


def pack_logprobs(
    model: nn.Module,
    pack: Pack,
    temperature: float = 1.0,
    with_entropy: bool = True,
    entropy_grad: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies of a pack's predicted tokens; the caller enters autocast where it is wanted.

    Args:
        model: a transformers causal LM, PEFT-wrapped or not, in `slothrl.packed_model.packed_mode`.
        temperature, with_entropy, entropy_grad, chunk_size: as in `slothrl.logprobs.selective_logprobs`.

    Returns:
        logprobs (R, T), entropies (R, T) or None: float32, nats, 0 where nothing is predicted.
    """
    head = head_spec(model)
    hidden = packed_forward(model, pack.input_ids, pack.layout)  # (tokens, h)
    states = hidden.index_select(0, pack.sources)  # (N, h)
    logprobs, entropy = selective_logprobs(
        states, pack.labels, head, temperature, chunk_size, with_entropy, entropy_grad
    )
    return pack.spread(logprobs), None if entropy is None else pack.spread(entropy)
