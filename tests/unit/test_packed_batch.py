"""A planned micro-batch as tensors: what is read, what predicts what, and the way back; by hand and on random rows."""

import pytest
import torch

from slothrl.packed_batch import build_pack, rows_to_pack
from slothrl.packing import Row, plan_micro_batches

# Two rows of one prompt [7, 8] and one of [5, 6, 9]; the second completion has one token.
IDS = torch.tensor([[0, 7, 8, 11, 12, 13], [0, 7, 8, 21, 0, 0], [5, 6, 9, 31, 32, 0]])
PROMPT_MASK = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1]])
COUNTED = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()


def pack_of(counted, shared, rows=None):
    found = rows_to_pack(IDS[:, :3], PROMPT_MASK, counted)
    (plan,) = plan_micro_batches(found if rows is None else rows, 100, shared)
    return build_pack(plan, IDS, counted)


def test_rows_are_grouped_by_prompt():
    assert rows_to_pack(IDS[:, :3], PROMPT_MASK, COUNTED) == [Row(0, 0, 2, 3), Row(1, 0, 2, 1), Row(2, 1, 3, 2)]


def test_rows_without_a_counted_token_and_tails_are_left_out():
    counted = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    assert rows_to_pack(IDS[:, :3], PROMPT_MASK, counted) == [Row(0, 0, 2, 2), Row(2, 1, 3, 2)]


def test_separate_rows_by_hand():
    pack = pack_of(COUNTED, "never")
    assert pack.input_ids.tolist() == [7, 8, 11, 12, 5, 6, 9, 31, 7, 8]
    assert (pack.layout.lengths, pack.layout.parents) == ((4, 4, 2), (-1, -1, -1))
    assert pack.rows.tolist() == [0, 1, 2]
    assert pack.labels.tolist() == [11, 12, 13, 21, 31, 32]
    assert pack.sources.tolist() == [1, 2, 3, 9, 6, 7]


def test_a_shared_prompt_by_hand():
    pack = pack_of(COUNTED, "always")
    # A completion of one token is predicted by the prompt's last state and has no segment.
    assert pack.input_ids.tolist() == [7, 8, 11, 12, 5, 6, 9, 31]
    assert (pack.layout.lengths, pack.layout.parents) == ((2, 2, 4), (-1, 0, -1))
    assert pack.layout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert pack.labels.tolist() == [11, 12, 13, 21, 31, 32]
    assert pack.sources.tolist() == [1, 2, 3, 1, 6, 7]  # state 1 predicts 11 and 21
    assert pack.spread(torch.arange(1.0, 7.0)).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]


def test_tokens_of_a_tool_are_read_and_not_predicted():
    counted = COUNTED.clone()
    counted[0, 1] = False
    pack = pack_of(counted, "never")
    assert pack.input_ids.tolist() == [7, 8, 11, 12, 5, 6, 9, 31, 7, 8]
    assert pack.labels.tolist() == [11, 13, 21, 31, 32]
    assert pack.sources.tolist() == [1, 3, 9, 6, 7]


@pytest.mark.parametrize("shared", ["always", "never"])
@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_what_predicts_a_token_is_the_token_before_it(shared, budget):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([3, 3, 5, 5, 5, 1])
    lengths = torch.tensor([4, 1, 6, 2, 7, 3])
    ids = torch.randint(1, 10_000, (6, 12), generator=generator)  # all different, or nearly
    ids[1, :5], ids[3, :5], ids[4, :5] = ids[0, :5], ids[2, :5], ids[2, :5]
    prompt_mask = torch.arange(5) >= 5 - prompts[:, None]
    counted = (torch.arange(7) < lengths[:, None]) & (torch.rand(6, 7, generator=generator) < 0.8)
    rows = rows_to_pack(ids[:, :5], prompt_mask, counted)
    seen = torch.zeros(6, 7, dtype=torch.long)
    for micro_batch in plan_micro_batches(rows, budget, shared):
        pack = build_pack(micro_batch, ids, counted)
        assert len(pack.input_ids) == micro_batch.tokens == pack.layout.tokens
        seen[pack.rows] += pack.spread(torch.ones(len(pack.labels))).long()
        places, columns = pack.counted.nonzero(as_tuple=True)
        assert torch.equal(pack.labels, ids[pack.rows[places], 5 + columns])
        assert torch.equal(pack.input_ids[pack.sources], ids[pack.rows[places], 4 + columns])
        expected = prompts[pack.rows[places]] - 1 + columns
        assert torch.equal(pack.layout.position_ids[pack.sources], expected)
    assert torch.equal(seen, counted.long())
