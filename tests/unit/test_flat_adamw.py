"""Many tensors in one update: bit for bit what bitsandbytes does one by one."""

import copy

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, GlobalOptimManager, PagedAdamW8bit
from torch import nn

import slothrl.flat_adamw as flat_adamw
from slothrl.flat_adamw import FlatAdamW8bit, in_few_launches

SHAPES = [(16, 320), (4097,), (16, 300), (8, 640), (40, 130), (3, 5), (), (100,)]  # the last three in 32 bits
STATE = {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}


@pytest.fixture(autouse=True)
def no_overrides():
    """bitsandbytes remembers, for all optimizers of a process, places and addresses that an earlier test asked for."""
    GlobalOptimManager.get_instance().initialize()
    yield
    GlobalOptimManager.get_instance().initialize()


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def grouped(found: list[nn.Parameter]) -> list[dict]:
    return [{"params": found[::2], "weight_decay": 0.1}, {"params": found[1::2], "weight_decay": 0.0, "lr": 3e-3}]


def with_gradients(found: list[nn.Parameter], turn: int, missing=()) -> None:
    generator = torch.Generator().manual_seed(turn + 1)
    for i, p in enumerate(found):
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in missing else gradient * 10.0 ** (i - 4)


def same_state(ours: dict, theirs: dict) -> bool:
    """Equal in every tensor and number of a state_dict."""
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same_state(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same_state, ours, theirs))
    return ours == theirs


def run(make, dtype=torch.float32, missing=(), turns=4):
    """Parameters after `turns` steps under a schedule; in turn t those of missing[t] have no gradient."""
    found = parameters(dtype)
    optimizer = make(grouped(found), lr=1e-2, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for turn in range(turns):
        with_gradients(found, turn, missing[turn] if turn < len(missing) else ())
        optimizer.step()
        schedule.step()
    return found, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [(), ((), (0, 1), range(8), (1, 2)), ((2,), (2,), (), (0,))])
def test_every_bit(dtype, missing):
    ours, flat = run(FlatAdamW8bit, dtype, missing)
    theirs, single = run(AdamW8bit, dtype, missing)
    assert all(map(torch.equal, ours, theirs))
    assert same_state(flat.state_dict(), single.state_dict())


def test_one_call_a_bucket(monkeypatch):
    """Both groups' tensors of 8 bits in one call each, and those of 32; smaller buckets give the same bits."""
    calls = []
    plain = flat_adamw.optimizer_update_8bit_blockwise
    monkeypatch.setattr(
        flat_adamw, "optimizer_update_8bit_blockwise", lambda *a, **k: (calls.append(a[2].numel()), plain(*a, **k))
    )
    wide, _ = run(FlatAdamW8bit, turns=2)
    assert calls == [5120 + 4864 + 5376, 4352 + 5120] * 2  # 4,800, 5,200 and 4,097 values up to whole blocks
    calls.clear()
    monkeypatch.setattr(flat_adamw, "MOST", 10_000)
    narrow, _ = run(FlatAdamW8bit, turns=2)
    assert calls == [5120 + 4864, 4352 + 5120] * 2  # what is left of the first group has no company
    assert all(map(torch.equal, wide, narrow))


@pytest.mark.parametrize("source, target", [(AdamW8bit, FlatAdamW8bit), (FlatAdamW8bit, AdamW8bit)])
def test_states_are_exchanged(source, target):
    """What one saved the other goes on from, to the bits of an undisturbed run."""
    whole, _ = run(AdamW8bit, missing=((), (0,)), turns=5)
    half, optimizer = run(source, missing=((), (0,)), turns=3)
    state = copy.deepcopy(optimizer.state_dict())
    found = [nn.Parameter(p.detach().clone()) for p in half]
    resumed = target(grouped(found))
    resumed.load_state_dict(state)
    for turn in (3, 4):
        with_gradients(found, turn)
        for group, rate in zip(resumed.param_groups, (1e-2, 3e-3), strict=True):
            group["lr"] = rate
            for _ in range(turn):
                group["lr"] *= 0.7
        resumed.step()
    assert all(map(torch.equal, found, whole))


def test_parameters_stay_where_they_are():
    found = parameters()
    places, views = [p.data_ptr() for p in found], [p.detach()[:2] for p in found if p.dim()]
    optimizer = FlatAdamW8bit(found)
    with_gradients(found, 0)
    before = [view.clone() for view in views]
    optimizer.step()
    assert [p.data_ptr() for p in found] == places
    assert not any(map(torch.equal, before, views))
    assert set(optimizer.state[found[0]]) == STATE and optimizer.state[found[0]]["state1"].shape == (16, 320)


def test_what_takes_its_place():
    found = [nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(5000))]
    theirs = AdamW8bit([{"params": found, "weight_decay": 0.3}], lr=0.5, betas=(0.1, 0.2), min_8bit_size=6000)
    ours = in_few_launches(theirs)
    assert type(ours) is FlatAdamW8bit and ours.args.min_8bit_size == 6000
    assert ours.param_groups == theirs.param_groups and ours.defaults == theirs.defaults
    with_gradients(found, 0)
    ours.step()
    assert ours.state[found[0]]["state1"].dtype == torch.float32
    for other in (ours, torch.optim.AdamW(found), PagedAdamW8bit(found)):
        assert in_few_launches(other) is other


def test_what_the_manager_overrides_goes_alone():
    """As transformers asks for trained embeddings: 32 bits whatever their size."""
    manager = GlobalOptimManager.get_instance()
    results = []
    for make in (AdamW8bit, FlatAdamW8bit):
        module = nn.ParameterList(parameters()[:3])
        manager.register_module_override(module, "0", {"optim_bits": 32})
        optimizer = make(module.parameters())
        for turn in range(2):
            with_gradients(list(module), turn)
            optimizer.step()
        assert optimizer.state[module[0]]["state1"].dtype == torch.float32
        assert optimizer.state[module[2]]["state1"].dtype == torch.uint8
        results.append(list(module))
        manager.initialize()
    assert all(map(torch.equal, *results))
