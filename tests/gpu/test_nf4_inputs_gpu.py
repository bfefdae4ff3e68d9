"""X put in order by a launch that starts early, whatever came before it: the bits of plain launches, also in graphs."""

import ctypes
from functools import cache

import pytest
import torch
from slothrl_kernels import HAS_TRITON
from slothrl_kernels.early_launch import let_next_start, starts_early
from slothrl_kernels.nf4_inputs import CANDIDATES, nf4_inputs
from slothrl_kernels.nf4_launches import choose_config
from slothrl_kernels.nf4_matmul import AHEAD, launch
from slothrl_kernels.switch import jit

from tests.kernels.test_nf4_lora import lora_case

if HAS_TRITON:
    import triton.language as tl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH, LAYERS = 4096, 4


@jit
def slow_copy(source, target, SIZE: tl.constexpr):
    """Lets the next kernel start at once and writes 50 us later: one that does not wait reads what was there before."""
    let_next_start()
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(source + place)
    value = tl.inline_asm_elementwise(
        "nanosleep.u32 50000; mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.store(target + place, value)


def by_kernel(source, target):
    torch.add(source, 0, out=target)


def by_early_kernel(source, target):
    slow_copy[(source.numel() // 256,)](source.view(torch.int32), target.view(torch.int32), SIZE=128, num_warps=4)


def by_copy(source, target):
    target.copy_(source)


def by_memset(source, target):
    """A copy, and the second half of the bytes set to 0x3c: 0.0115 in bfloat16."""
    torch.add(source, 0, out=target)
    half, stream = target.nbytes // 2, torch.cuda.current_stream().cuda_stream
    place, value = ctypes.c_uint64(target.data_ptr() + half), ctypes.c_ubyte(0x3C)
    code = ctypes.CDLL("libcuda.so.1").cuMemsetD8Async(place, value, ctypes.c_size_t(half), ctypes.c_void_p(stream))
    assert code == 0


@cache
def side_stream():
    return torch.cuda.Stream()


def by_other_stream(source, target):
    side, here = side_stream(), torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        target.copy_(source)
    here.wait_stream(side)


WAYS = [by_kernel, by_early_kernel, by_copy, by_memset, by_other_stream]


@pytest.fixture
def hopper():
    if not starts_early(torch.device("cuda", 0)):
        pytest.skip("kernels start early from compute capability 9.0 on")


def values(rows, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn((rows, WIDTH), generator=generator, device="cuda").to(torch.bfloat16)


class Chain:
    """Layers one after the other: inputs in order, GEMM, something elementwise, and again."""

    def __init__(self, rows, with_lora=True):
        _, self.weight, lora, self.bias = lora_case(rows, (WIDTH,), WIDTH, 16, torch.bfloat16, "cuda")
        self.lora = lora if with_lora else None
        self.config = choose_config(rows, WIDTH, WIDTH, torch.device("cuda", 0))

    def __call__(self, x, ahead):
        for _ in range(LAYERS):
            x = torch.tanh(launch(x, self.weight, self.bias, self.config, self.lora, ahead) * 0.1)
        return x


chain_of = cache(Chain)


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 64, 256])
@pytest.mark.parametrize("way", WAYS)
def test_after_anything_eagerly(hopper, way, rows, with_lora):
    chain, target = chain_of(rows, with_lora), torch.zeros(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    for seed in range(10):
        source = values(rows, seed)
        torch.cuda.synchronize()
        way(source, target)
        early = chain(target, AHEAD)
        assert torch.equal(early, chain(target, 0))
    assert chain.lora is None or (chain.lora.arrived is not None and not chain.lora.arrived.any())


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("way", WAYS)
def test_after_anything_in_a_graph(hopper, way, rows):
    """50 replays, each on other values; the reference runs plainly, on what the same way wrote."""
    chain, source = chain_of(rows), values(rows, 0)
    target, plain = torch.zeros_like(source), torch.zeros_like(source)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    way(source, target)
    chain(target, AHEAD)  # compiled before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        way(source, target)
        y = chain(target, AHEAD)
    for seed in range(50):
        source.copy_(values(rows, seed))
        graph.replay()
        torch.cuda.synchronize()
        way(source, plain)
        assert torch.equal(y, chain(plain, 0)), seed


@pytest.mark.parametrize("rows", [1, 64])
def test_an_adapter_written_just_before(hopper, rows):
    """A is written by the launch right before, as when a LoRA is pushed and a prefill follows."""
    chain, x = Chain(rows), values(rows, 0)
    assert chain.lora is not None
    new = torch.empty_like(chain.lora.a)
    for seed in range(20):
        new.copy_(torch.randn(new.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)) / 64)
        torch.cuda.synchronize()
        for push in (by_kernel, by_early_kernel):
            chain.lora.a.zero_()
            torch.cuda.synchronize()
            push(new, chain.lora.a)
            assert torch.equal(chain(x, AHEAD), chain(x, 0))


def compiled_steps(chain, **options):
    """Layers whose norms and sums are inductor's kernels, between our launches."""
    weight, lora = chain.weight, chain.lora
    arguments = (weight.packed, weight.absmax, weight.code, list(weight.shape), weight.blocksize)
    arguments = (*arguments, lora.a, lora.b, lora.ends, list(lora.sizes), lora.arrived, chain.bias, "auto")

    def steps(x):
        for _ in range(LAYERS):
            normed = torch.nn.functional.rms_norm(x.float(), (WIDTH,)).to(x.dtype)
            x = x + torch.tanh(torch.ops.slothrl_kernels.nf4_lora_matmul(normed, *arguments))
        return x

    return torch.compile(steps, fullgraph=True, dynamic=False, options=options)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 64])
def test_between_early_kernels_of_inductor(hopper, rows):
    """As vLLM runs with `VLLMOptions.early_launch`: kernels that trigger early before ours, and wait for ours after.

    Not the plain ones' bits: inductor times its launches each time it compiles. What was not waited for is far off.
    """
    chain, x = chain_of(rows), values(rows, 0)
    early, plain = compiled_steps(chain, **{"triton.enable_pdl": True}), compiled_steps(chain)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    early(x)  # compiled before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = early(x)
    for seed in range(50):
        x.copy_(values(rows, seed))
        graph.replay()
        first, exact = y.clone(), plain(x).float()
        assert (first.float() - exact).norm() <= 1e-2 * exact.norm(), seed
        graph.replay()
        assert torch.equal(y, first), seed


@pytest.mark.parametrize("rank", [16, 32, 48])
@pytest.mark.parametrize("rows", [1, 33, 128])
@pytest.mark.parametrize("config", CANDIDATES)
def test_candidates(config, rows, rank):
    """Every launch worth timing is right, and the same bits twice; K that programs do not divide evenly."""
    inputs = 14336
    generator = torch.Generator("cuda").manual_seed(rank)
    x, a = (torch.randn(n, inputs, device="cuda", generator=generator).to(torch.bfloat16) for n in (rows, rank))
    ordered, xa = nf4_inputs(x, 4, a, config=config)
    assert xa is not None
    assert torch.equal(ordered, x.view(rows, -1, 64, 4).transpose(2, 3).reshape(rows, inputs))
    exact = x.double() @ a.double().t()
    assert (xa.double() - exact).norm() <= 4e-3 * exact.norm()
    assert torch.equal(xa, nf4_inputs(x, 4, a, config=config)[1])
