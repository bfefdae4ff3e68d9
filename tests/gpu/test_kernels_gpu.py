"""The kernels natively at real sizes: bits, error budgets, CUDA graphs, torch.compile, addresses beyond 32 bits."""

from functools import partial

import pytest
import torch

from tests.kernels.budget import budget_of
from tests.kernels.nf4_cases import bitsandbytes_weight, quantized
from tests.kernels.test_qk_norm_rope import with_angles as with_tables
from tests.kernels.test_rope import angles, with_angles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # relative to the largest value: half a step, for the codes


def values(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


@pytest.fixture(scope="module", params=[False, True], ids=["expanded", "nested"])
def quantised_8b(request):
    """A projection of the 8B shape: (bitsandbytes' bytes, its state, our view)."""
    return quantized((6144, 4096), 64, request.param, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantised_bits(quantised_8b, dtype):
    from slothrl_kernels import nf4_dequantize, nf4_dequantize_reference

    packed, state, weight = quantised_8b
    state.dtype = dtype
    wide = torch.full((6144, 4112), float("nan"), dtype=dtype, device="cuda")
    nf4_dequantize(weight, dtype, wide[:, :4096])
    ours = nf4_dequantize(weight, dtype, torch.full((6144, 4096), float("nan"), dtype=dtype, device="cuda"))
    assert torch.equal(ours, bitsandbytes_weight(packed, state))
    assert torch.equal(ours, nf4_dequantize_reference(weight, dtype))
    assert torch.equal(ours, wide[:, :4096]) and wide[:, 4096:].isnan().all()


@pytest.mark.parametrize("shape, blocksize", [((37, 100), 64), ((3, 7), 32), ((130, 1001), 256), ((11, 1000), 4096)])
def test_dequantised_bits_of_odd_shapes(shape, blocksize):
    from slothrl_kernels import nf4_dequantize

    for nested in (False, True):
        packed, state, weight = quantized(shape, blocksize, nested, "cuda")
        assert torch.equal(nf4_dequantize(weight), bitsandbytes_weight(packed, state))


def huge_weight(outputs, inputs):
    """Random codes with an absmax that grows with the row, so that a wrong address shows."""
    from slothrl_kernels import Nf4Weight
    from slothrl_kernels.nf4_decode import NF4_CODE

    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free memory")
    packed = torch.randint(256, (outputs * inputs // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.arange(outputs * inputs // 64, device="cuda", dtype=torch.float32) * 1e-9 + 0.01
    return Nf4Weight(packed, absmax, torch.tensor(NF4_CODE, device="cuda"), (outputs, inputs))


def last_rows(weight, rows):
    from slothrl_kernels import Nf4Weight

    inputs = weight.shape[1]
    packed, absmax = weight.packed[-rows * inputs // 2 :], weight.absmax[-rows * inputs // 64 :]
    return Nf4Weight(packed, absmax, weight.code, (rows, inputs))


def test_addresses_beyond_32_bits():
    """2.2e9 elements for the dequantisation; 4.6e9, hence 2.3e9 bytes, for the GEMM."""
    from slothrl_kernels import nf4_dequantize, nf4_dequantize_reference, nf4_matmul, nf4_matmul_reference

    weight = huge_weight(33600, 65536)
    assert torch.equal(nf4_dequantize(weight)[-8:], nf4_dequantize_reference(last_rows(weight, 8)))
    del weight
    weight = huge_weight(70000, 65536)
    x = values(3, 65536)
    torch.testing.assert_close(
        nf4_matmul(x, weight)[:, -8:], nf4_matmul_reference(x, last_rows(weight, 8)), atol=0.2, rtol=0.02
    )


def check_matmul(x, weight, bias, config=None):
    from slothrl_kernels import nf4_matmul, nf4_matmul_reference

    exact = nf4_matmul_reference(x.double(), weight, bias.double())
    plain = nf4_matmul_reference(x, weight, bias)
    ours = nf4_matmul(x, weight, bias, config=config)
    allowed = (plain.double() - exact).abs().max() + TOLERANCE[x.dtype] * exact.abs().max()
    assert ours.isfinite().all() and ours.dtype == x.dtype
    assert (ours.double() - exact).abs().max() <= allowed
    return ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 16, 17, 64, 100, 256, 300])
def test_matmul(quantised_8b, rows, dtype):
    x, bias = values(rows, 4096, dtype=dtype), values(6144, dtype=dtype, seed=1)
    check_matmul(x, quantised_8b[2], bias)


@pytest.mark.parametrize(
    "outputs, inputs, blocksize", [(1, 64, 64), (133, 192, 64), (77, 4864, 128), (1000, 320, 4096)]
)
def test_matmul_of_odd_shapes(outputs, inputs, blocksize):
    weight = quantized((outputs, inputs), blocksize, blocksize > 64, "cuda")[2]
    for rows in (1, 3, 33):
        check_matmul(values(rows, inputs), weight, values(outputs, seed=1))


def test_matrix_vector_kernel(quantised_8b):
    from slothrl_kernels.nf4_config import Nf4Config

    for splits in (1, 4):
        check_matmul(values(2, 4096), quantised_8b[2], values(6144, seed=1), Nf4Config(1, 64, 2, 0, 4, 2, splits))


def test_matmul_repeats_its_bits(quantised_8b):
    """The arrival counters are zero again after each launch, and partials are added in order."""
    from slothrl_kernels import nf4_matmul
    from slothrl_kernels.nf4_config import Nf4Config

    x = values(16, 4096)
    for config in (Nf4Config(16, 64, 2, 0, 4, 4, 7), Nf4Config(1, 64, 2, 0, 4, 2, 5)):
        first = nf4_matmul(x, quantised_8b[2], config=config)
        assert all(torch.equal(first, nf4_matmul(x, quantised_8b[2], config=config)) for _ in range(50))


@pytest.mark.parametrize("warm", [True, False], ids=["stream used before", "new stream"])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_matmul_in_a_cuda_graph(quantised_8b, rows, warm):
    from slothrl_kernels import nf4_matmul

    weight, x = quantised_8b[2], values(rows, 4096)
    nf4_matmul(x, weight)  # compiled before the capture
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    if warm:
        with torch.cuda.stream(stream):
            nf4_matmul(x, weight)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = nf4_matmul(x, weight)
    for seed in range(3):
        x.copy_(values(rows, 4096, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, nf4_matmul(x, weight))


@pytest.mark.parametrize("rows", [1, 4, 16, 33, 64, 128, 256, 300])
@pytest.mark.parametrize("sizes, inputs, rank", [((4096, 1024, 1024), 4096, 16), ((4096,), 14336, 8)])
def test_matmul_with_lora(sizes, inputs, rank, rows):
    """Under the error budget, and the same bits again from a CUDA graph."""
    from slothrl_kernels import nf4_lora_matmul

    from tests.kernels.test_nf4_lora import check_lora, lora_case

    x, weight, lora, bias = lora_case(rows, sizes, inputs, rank, torch.bfloat16, "cuda")
    check_lora(x, weight, lora, bias)
    plain = nf4_lora_matmul(x, weight, lora, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nf4_lora_matmul(x, weight, lora, bias)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, plain)
    assert lora.arrived is not None and not lora.arrived.any()


def test_matmul_compiles(quantised_8b):
    from slothrl_kernels import nf4_matmul, nf4_matmul_reference

    weight = quantised_8b[2]
    compiled = torch.compile(lambda t: nf4_matmul(t, weight) * 2, fullgraph=True)
    x, plain = (values(4, 4096).requires_grad_() for _ in range(2))
    torch.testing.assert_close(compiled(x), 2 * nf4_matmul_reference(plain, weight), atol=0.05, rtol=0.02)
    compiled(x).sum().backward()
    (2 * nf4_matmul_reference(plain, weight)).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1000, 4096), (4, 100, 16, 128), (33, 1023), (5, 20000)], ids=str)
def test_rms_norm(shape, dtype):
    from slothrl_kernels import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

    x, residual, gradient, other = (values(*shape, dtype=dtype, seed=seed) for seed in range(4))
    weight = values(shape[-1], dtype=dtype, seed=5)
    budget_of(partial(rms_norm, impl="triton"), rms_norm_reference, [x, weight], [0, 1], [gradient])
    gemma = {"shift": 1.0, "cast_first": False}
    kernel, reference = partial(rms_norm, **gemma, impl="triton"), partial(rms_norm_reference, **gemma)
    budget_of(kernel, reference, [x, weight], [0], [gradient])
    kernel = partial(add_rms_norm, impl="triton")
    budget_of(kernel, add_rms_norm_reference, [x, residual, weight], [0, 1], [gradient, other])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width, turned", [((32, 8), 128, 128), ((16, 8), 128, 128), ((14, 2), 80, 32)])
def test_rope(heads, width, turned, dtype):
    from slothrl_kernels import rope, rope_reference

    q, k = (values(2, 333, n, width, dtype=dtype).transpose(1, 2) for n in heads)
    cos, sin = angles(2, 333, turned, dtype, "cuda")
    kernel, reference = with_angles(rope, cos, sin, impl="triton"), with_angles(rope_reference, cos, sin)
    budget_of(kernel, reference, [q, k], [0, 1], [torch.ones_like(q), q.new_ones(k.shape) * 0.3])
    expected = kernel(q, k)
    assert all(torch.equal(a, b) for a, b in zip(rope(q, k, cos, sin, True), expected, strict=True))
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width, turned", [((32, 8), 128, 128), ((16, 8), 128, 128), ((4, 1), 256, 64)])
def test_qk_norm_rope(heads, width, turned, dtype):
    """As slices of one projection; frozen and trained weights; Llama's and Gemma's norms; NaN where none is written."""
    from slothrl_kernels import QKNorm, qk_norm_rope, qk_norm_rope_reference

    fused = values(2, 301, sum(heads), width, dtype=dtype)
    q, k = (x.transpose(1, 2) for x in fused.split(heads, 2))
    weights = [values(width, dtype=dtype, seed=seed) for seed in (1, 2)]
    tables = angles(2, 301, turned, dtype, "cuda")
    upstream = [values(*x.shape, dtype=torch.float32, seed=3) for x in (q, k)]
    for norm in (QKNorm(), QKNorm(1e-6, 1.0, False)):
        kernel = with_tables(qk_norm_rope, *tables, norm, "triton")
        reference = with_tables(qk_norm_rope_reference, *tables, norm)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
        try:
            for wanted in ([0, 1], [0, 1, 2, 3]):
                budget_of(kernel, reference, [q, k, *weights], wanted, upstream)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_glu(activation, dtype):
    from slothrl_kernels import glu, glu_reference

    kernel, reference = (partial(f, activation=activation) for f in (partial(glu, impl="triton"), glu_reference))
    for shape in ((500, 14336), (7, 4099)):
        gate, up, gradient = (values(*shape, dtype=dtype, seed=seed) for seed in range(3))
        budget_of(kernel, reference, [4 * gate, up], [0, 1], [gradient])


def test_auto_takes_the_kernels():
    """On this device the switch means Triton, and nothing beside the outputs is allocated."""
    from slothrl_kernels import glu, takes_triton

    gate = values(4096, 4096)
    assert takes_triton("auto", gate)
    glu(gate, gate)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = glu(gate, gate)
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 2 + 1024
