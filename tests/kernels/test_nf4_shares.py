"""The nf4 GEMM with its work in equal shares: who does what, the same bits whoever comes last, and the error budget."""

from dataclasses import replace
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import torch
from slothrl_kernels import HAS_TRITON, LoraDelta, nf4_lora_matmul_reference, nf4_matmul_reference
from slothrl_kernels.arrivals import arrival_counters
from slothrl_kernels.nf4_config import ROW_BUCKETS, Nf4Config, candidates, complete
from slothrl_kernels.nf4_matmul import launch
from slothrl_kernels.nf4_shares import collect, share_begin, share_owner
from slothrl_kernels.switch import jit

from tests.kernels.test_nf4_lora import lora_case
from tests.kernels.test_nf4_matmul import TOLERANCE, case

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl


@jit
def _owners_kernel(begins, owners, programs, units):
    for program in range(programs + 1):
        tl.store(begins + program, share_begin(program, programs, units))
    for unit in range(units):
        tl.store(owners + unit, share_owner(unit, programs, units))


@pytest.mark.parametrize("programs, units", [(1, 1), (4, 4), (4, 7), (5, 64), (7, 62), (12, 13)])
def test_shares_are_equal(kernel_device, programs, units):
    begins, owners = (torch.empty(n, dtype=torch.int32, device=kernel_device) for n in (programs + 1, units))
    _owners_kernel[(1,)](begins, owners, programs, units)
    sizes = begins.diff()
    assert begins[0] == 0 and begins[-1] == units and sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
    assert torch.equal(owners.cpu(), torch.repeat_interleave(torch.arange(programs), sizes.cpu()).int())


@jit
def _parts_kernel(order, units_sums, out, writes, partials, arrived, steps, programs, units, ROWS: tl.constexpr):
    """Sums of given tiles, by programs that come in the given order; those of a share's units are added up first."""
    program = tl.load(order + tl.program_id(0))
    unit, end = share_begin(program, programs, units), share_begin(program + 1, programs, units)
    place = tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for tile in range(unit // steps, (end - 1) // steps + 1):
        begin = tl.maximum(unit - tile * steps, 0)
        count = tl.minimum(end - tile * steps, steps) - begin
        total = tl.load(units_sums + (tile * steps + begin) * ROWS * 8 + place)
        for i in range(1, count):
            total += tl.load(units_sums + (tile * steps + begin + i) * ROWS * 8 + place)
        whole = (count == steps).to(tl.int32)
        if whole == 0:
            total, whole = collect(total, partials, arrived, tile, begin, steps, program, programs, units, False)
        if whole == 1:
            tl.store(out + tile * ROWS * 8 + place, total)
            tl.atomic_add(writes + tile, 1)


def in_order(sums, steps, programs):
    """(tiles, rows, tokens): each program's units added up, then these by program; `sums`: (units, rows, tokens)."""
    units = len(sums)
    begins = [p * (units // programs) + min(p, units % programs) for p in range(programs + 1)]
    tiles = []
    for tile in range(units // steps):
        cuts = [tile * steps, *[b for b in begins if tile * steps < b < (tile + 1) * steps], (tile + 1) * steps]
        parts = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            part = sums[start].clone()
            for unit in range(start + 1, end):
                part += sums[unit]
            parts.append(part)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        tiles.append(total)
    return torch.stack(tiles)


@pytest.mark.parametrize("steps, tiles, programs", [(5, 1, 3), (2, 3, 3), (3, 3, 4), (7, 2, 3), (4, 1, 4)])
def test_the_same_bits_whoever_comes_last(kernel_device, steps, tiles, programs):
    """All orders in which programs may come, on memory that nothing has touched; the interpreter runs one by one."""
    units = steps * tiles
    sums = torch.randn(units, 16, 8, generator=torch.Generator().manual_seed(units))
    sums[:, 3] = -0.0
    wanted = in_order(sums, steps, programs).view(torch.int32)
    sums = sums.to(kernel_device)
    arrived = torch.zeros(tiles, dtype=torch.int32, device=kernel_device)
    for order in permutations(range(programs)):
        out, partials = (torch.empty(n, 16, 8, device=kernel_device) for n in (tiles, 2 * programs))
        writes = torch.zeros_like(arrived)
        queue = torch.tensor(order, dtype=torch.int32, device=kernel_device)
        _parts_kernel[(programs,)](queue, sums, out, writes, partials, arrived, steps, programs, units, 16)
        assert torch.equal(out.cpu().view(torch.int32), wanted)
        assert (writes == 1).all() and not arrived.any()


def check_shares(x, weight, config, bias=None, lora=None):
    """Under the error budget, the same bits again, and zeros left behind."""
    config = complete(config, len(x), *weight.shape, 4)
    assert config.slots and (config.splits, config.apart) == (1, 0)

    def reference(dtype):
        to_bias = None if bias is None else bias.to(dtype)
        if lora is None:
            return nf4_matmul_reference(x.to(dtype), weight, to_bias).double()
        wide = LoraDelta(lora.a.to(dtype), lora.b.to(dtype), lora.ends, lora.sizes)
        return nf4_lora_matmul_reference(x.to(dtype), weight, wide, to_bias).double()

    exact, plain = reference(torch.float64), reference(x.dtype)
    ours = launch(x, weight, bias, config, lora)
    truncated = x.dtype == torch.bfloat16 and not x.is_cuda  # by the interpreter
    tolerance = 2**-7 if truncated else TOLERANCE[x.dtype]
    assert ours.isfinite().all() and ours.dtype == x.dtype and ours.shape == exact.shape
    assert (ours.double() - exact).abs().max() <= (plain - exact).abs().max() + tolerance * exact.abs().max()
    assert torch.equal(ours, launch(x, weight, bias, config, lora))
    assert not arrival_counters(x.device, 1, lora.arrived if lora else None).any()


@pytest.mark.parametrize("dtype, slots", [(torch.bfloat16, 1), (torch.float16, 3)])
@pytest.mark.parametrize(
    "rows, outputs, inputs, config",
    [
        (1, 37, 256, Nf4Config(16, 32, 2, slots=1)),
        (5, 20, 64, Nf4Config(16, 32, 4, parts=1, splits=3, apart=1, slots=1)),  # one step for 4 or 12 programs
        (19, 70, 320, Nf4Config(16, 16, 1, parts=2, slots=1)),  # 10 tiles of 5 steps, some of them whole
        (35, 16, 320, Nf4Config(32, 16, 1, slots=1)),  # tokens beyond the end of a tile
    ],
)
def test_error_budget(kernel_device, rows, outputs, inputs, config, dtype, slots):
    x, weight, bias = case(rows, outputs, inputs, dtype, kernel_device, nested=slots > 1)
    check_shares(x, weight, replace(config, slots=slots), bias if slots > 1 else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, sizes, inputs", [(3, (33, 7, 9), 320), (19, (40, 8), 192)])
def test_with_a_lora(kernel_device, rows, sizes, inputs, dtype):
    x, weight, lora, bias = lora_case(rows, sizes, inputs, 3, dtype, kernel_device)
    check_shares(x, weight, Nf4Config(16, 16, 1, parts=1, slots=2), bias, lora)
    without = nf4_lora_matmul_reference(x, weight, LoraDelta.zeros(16, inputs, sizes, x), bias)
    ours = launch(x, weight, bias, Nf4Config(16, 16, 1, parts=1, splits=1, slots=2), lora)
    begin = 0
    for size in sizes:  # the delta, which is no smaller than the base's part, is there in every slice
        part = slice(begin, begin + size)
        assert (ours - without)[:, part].norm() > 0.2 * ours[:, part].norm()
        begin += size


def test_shares_of_whole_tiles_are_the_plain_grids_bits(kernel_device):
    """Four tiles for four programs: nothing is shared, and nothing summed in another order."""
    x, weight, bias = case(5, 64, 192, torch.float16, kernel_device)
    plain = Nf4Config(16, 16, 1, splits=1)
    shares = Nf4Config(16, 16, 1, splits=1, slots=1)
    if x.is_cuda:
        pytest.skip("as many programs as multiprocessors")
    assert torch.equal(launch(x, weight, bias, plain), launch(x, weight, bias, shares))


def test_tuning_tries_shares():
    """For every number of rows; what was kept before there were shares is a launch of the plain grid."""
    for rows in ROW_BUCKETS:
        shares = [config for config in candidates(rows) if config.slots]
        assert shares and all(Nf4Config(*config.fields()) == config for config in shares)
        for config in shares:
            done = complete(replace(config, splits=7, apart=1), rows, 9728, 896, 132)
            assert done == replace(config, chunks=2, splits=1, apart=0)
    assert Nf4Config(*[16, 64, 4, 4, 3, 5, 0, 1, 1]).slots == 0
