"""The parts of the GPU's memory benchmarks that need no GPU: packs of a given size, bisection, an update's gradient."""

import pytest
import torch

from slothrl.packing import Row, plan_micro_batches
from tests.gpu.device_use import used_by_others
from tests.gpu.fit_models import TINY, config_of, random_nf4
from tests.gpu.largest_pack import PackedUpdate, largest_step, pack_of


@pytest.mark.parametrize("tokens", [10, 11, 23, 24, 25, 38, 39, 40, 41, 100])
def test_a_pack_has_exactly_the_tokens(tokens):
    batch = pack_of(tokens, prompt=8, completion=16, group=2)
    assert batch.tokens == tokens
    assert [row.index for row in batch.rows] == list(range(len(batch.rows)))
    assert all(len(block.rows) <= 2 and block.rows[0].prompt == 8 for block in batch.blocks)


def test_whole_groups_are_the_planners():
    rows = [Row(index, index // 2, 8, 16) for index in range(4)]
    (planned,) = plan_micro_batches(rows, budget=76, shared_prefix="always")
    assert pack_of(planned.tokens, prompt=8, completion=16, group=2) == planned
    with pytest.raises(ValueError, match="9 tokens hold no prompt of 8"):
        pack_of(9, prompt=8, completion=16, group=2)


def test_the_largest_step():
    for answer in range(0, 100, 7):
        asked = []
        found = largest_step(lambda n, answer=answer, asked=asked: asked.append(n) or n <= answer, 8, 96)
        assert found == answer // 8 * 8
        assert len(asked) <= 4


def test_an_update_has_gradients():
    update = PackedUpdate(random_nf4(config_of("Qwen2.5-0.5B", **TINY), "cpu"))
    assert update.fits(60, prompt=8, completion=16, group=2)
    norms = [update.run(pack_of(tokens, 8, 16, 2)) for tokens in (30, 60)]
    assert all(0 < norm < 100 for norm in norms)
    states = [state["exp_avg"].shape for state in update.optimizer.state.values()]
    assert len(states) == 2 * 7 * 2  # A and B of 7 matrices in 2 layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device may be anybody's")
def test_without_a_device_nobody_uses_it():
    assert used_by_others() is None
