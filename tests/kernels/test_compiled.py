"""The kernels compiled for GPUs that are not here: what Triton makes of them needs a compiler, not a device."""

import os
import re
import subprocess

import pytest
from slothrl_kernels import HAS_TRITON
from slothrl_kernels.nf4_config import DEFAULTS, Nf4Config

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="no Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
CONSUMER_SHARED_MEMORY = 99 << 10


def compile_kernel(kernel, pointers, integers, constants, capability, **options):
    """pointers: name -> type; integers: int32 arguments. All are multiples of 16 but M, splits, turns and counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**pointers, **dict.fromkeys(integers, "i32")}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    even = [name for name in types if name not in ("M", "splits", "ahead", "turns")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def instructions(compiled, pattern: str) -> int:
    return len(re.findall(pattern, compiled.asm["ptx"]))


@pytest.mark.parametrize("inner", [0, 256], ids=["expanded", "nested"])
def test_dequantisation_is_words_in_and_vectors_out(inner):
    """One word a thread, one 16-byte store for its 8 weights, and nothing through shared memory."""
    from slothrl_kernels.nf4_dequantize import _nf4_dequantize_kernel

    pointers = dict.fromkeys(("code", "inner_code", "inner_absmax", "offset"), "*fp32")
    pointers |= {"packed": "*i32", "absmax": "*u8" if inner else "*fp32", "out": "*bf16"}
    constants = {"BLOCKSIZE": 64, "INNER_BLOCKSIZE": inner, "BY_WORD": True, "ROWS_APART": False}
    constants |= {"WORDS": 256, "REPEAT": 4}
    integers = ("count", "columns", "row_stride")
    compiled = compile_kernel(
        _nf4_dequantize_kernel, pointers, integers, constants, 90, num_warps=8, enable_fp_fusion=False
    )
    assert instructions(compiled, r"st\.global\.v4\.b32") == 4
    assert instructions(compiled, r"st\.global") == 4 and compiled.metadata.shared == 0
    assert instructions(compiled, r"fma\.") == 0  # code * absmax + offset is two roundings


def compile_gemm(config, capability, **constants):
    """With a LoRA, bias and splits; nested absmax unless constants say otherwise."""
    import triton.language as tl
    from slothrl_kernels.nf4_matmul_kernels import nf4_gemm_kernel

    pointers = dict.fromkeys(("code", "inner_code", "inner_absmax", "offset", "partials"), "*fp32")
    pointers |= {"absmax": "*u8", "arrived": "*i32", "packed": "*i16", "ends": "*i32"}
    pointers |= dict.fromkeys(("x", "bias", "y", "xa", "lora_b"), "*bf16")
    known = {"DTYPE": tl.bfloat16, "CHUNKS_A_BLOCK": 1, "INNER_BLOCKSIZE": 256, "HAS_BIAS": True, "PTX": True}
    known |= {"RANK": 16, "SLICES": 3, "BLOCK_N": config.block_n, "SPLIT": True, "CHUNKS": config.chunks}
    known |= {"INTERPRETED": False, "BLOCK_M": config.block_m, "PARTS": config.parts}
    known |= {"EARLY": capability >= 90, "SHARES": config.slots > 0, "FRAGMENTS": True} | constants
    if not known["INNER_BLOCKSIZE"]:
        pointers["absmax"] = "*fp32"
    integers = ["M", "N", "K", "row_chunks", "splits", "row_units", "ahead", "turns"]
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.registers:
        options["maxnreg"] = config.registers
    return compile_kernel(nf4_gemm_kernel, pointers, integers, known, capability, **options)


def ptxas(compiled, capability: int, folder) -> str:
    """What the assembler says of registers and spills."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    name = "sm_90a" if capability == 90 else f"sm_{capability}"
    command = [get_ptxas(capability).path, "-v", "--gpu-name", name, str(source), "-o", str(folder / "cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("right", [0, 48])
def test_a_group_is_unpacked_as_one_is(right, capability):
    """16-byte stores only, 4 a weight and 2 beside it; two branches are merged (Triton 3.6) or all; nothing spilled."""
    from slothrl_kernels.nf4_group import ROWS, unpack_group_kernel

    names = [name for name in unpack_group_kernel.arg_names if not name.isupper()]
    memory = ("packed", "absmax", "code", "inner", "offset", "b_", "out")
    pointers = {n: "*bf16" if n.startswith(("b_", "out")) else "*fp32" for n in names if n.startswith(memory)}
    integers = [n for n in names if n not in pointers]
    pointers |= dict.fromkeys((f"packed_{i}" for i in range(3)), "*i32")
    pointers |= dict.fromkeys((f"absmax_{i}" for i in range(3)), "*u8")
    constants = {"BLOCKSIZE": 64, "INNER_BLOCKSIZE": 256, "WORDS": 256, "REPEAT": 4, "ROWS": ROWS}
    constants["RIGHT"] = 64 if right else 0
    compiled = compile_kernel(
        unpack_group_kernel, pointers, integers, constants, capability, num_warps=8, enable_fp_fusion=False
    )
    vectors = instructions(compiled, r"st\.global\.v4\.b32")
    each = 6 if right else 4
    assert vectors == instructions(compiled, r"st\.global") and vectors in (each, 2 * each, 3 * each)
    assert instructions(compiled, r"fma\.") == instructions(compiled, r"\.local") == compiled.metadata.shared == 0


@pytest.mark.parametrize("capability", [80, 90])
def test_a_pass_over_gradients(capability, tmp_path):
    """On tensor cores, nothing spilled; the small tile within a consumer card's shared memory, the large one not."""
    from slothrl_kernels.lora_pass import LARGE, SMALL
    from slothrl_kernels.lora_pass_kernels import strips_kernel

    pointers = {**dict.fromkeys(("to_y", "xa", "b"), "*bf16"), **dict.fromkeys(("through_b", "to_b"), "*fp32")}
    integers = ["tokens", "outputs", "rank", "to_y_stride", "xa_stride", "first_end", "second_end", "turns"]
    for tile in (SMALL, LARGE) if capability == 90 else (SMALL,):
        constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "RANK": 16}
        compiled = compile_kernel(strips_kernel, pointers, integers, constants, capability, num_warps=tile.warps)
        assert (compiled.metadata.shared <= CONSUMER_SHARED_MEMORY) == (tile == SMALL)
        assert instructions(compiled, r"wgmma\.mma_async" if capability == 90 else r"mma\.sync") > 0
        assert "0 bytes spill stores" in ptxas(compiled, capability, tmp_path)


@pytest.mark.parametrize("cast", ["bf16", "fp16"])
def test_adapters_are_cast_by_vectors(cast):
    from slothrl_kernels.adapter_cast import SIZE, _cast_kernel

    pointers = {"table": "*i64", "factors": "*fp32", "like": "*fp32", "out": f"*{cast}"}
    compiled = compile_kernel(_cast_kernel, pointers, [], {"SIZE": SIZE}, 90, num_warps=4)
    assert instructions(compiled, r"ld\.global\.v4\.b32") == 4 and instructions(compiled, r"st\.global\.v4\.b32") == 2
    assert instructions(compiled, r"st\.global") == 2


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [16, 64, 128])
def test_default_gemms_fit_a_consumer_card(rows, capability):
    """Shared memory within 99 KiB with everything on; codes by byte permutes; W only ever in registers."""
    config = DEFAULTS[rows]
    compiled = compile_gemm(config, capability)
    assert compiled.metadata.shared <= CONSUMER_SHARED_MEMORY
    assert instructions(compiled, r"lop3\.b32 high, over, under, mask") > 0
    hopper = capability == 90 and config.warps >= 4 and config.block_n >= 64
    assert instructions(compiled, r"wgmma\.mma_async" if hopper else r"mma\.sync") > 0
    # Hopper's GEMM starts early: W is asked for, then the inputs are waited for, and nothing is read before.
    text = compiled.asm["ptx"]
    assert ("griddepcontrol.wait" in text) == ("cp.async.bulk.prefetch.L2" in text) == (capability == 90)
    if capability == 90:
        places = [text.index(name) for name in ("cp.async.bulk.prefetch.L2", "griddepcontrol.wait", "cp.async.c")]
        assert places == sorted(places)
        assert not re.search(r"(ld|st|atom|red)\.[a-z.]*global", text[: places[1]])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_multiplications_are_under_way_together(parts, tmp_path):
    """ptxas makes Hopper's multiplications wait for each other, one by one, where sums run on into the next turn."""
    said = ptxas(compile_gemm(Nf4Config(64, 64, 2, 4, 3, parts=parts), 90, INNER_BLOCKSIZE=0), 90, tmp_path)
    assert "serialized" not in said and "0 bytes spill stores" in said


@pytest.mark.parametrize("tile, spilled", [((128, 128, 2, 8, 2, 0, 128, 4), 64), ((64, 128, 2, 8, 3, 0, 128, 1), 16)])
def test_equal_shares_take_no_more_registers(tile, spilled, tmp_path):
    """Two programs fit a multiprocessor as without shares, and what little is spilled is outside of the inner loop."""
    config = Nf4Config(*tile, slots=2)
    compiled = compile_gemm(config, 90, INNER_BLOCKSIZE=0, SLICES=1, HAS_BIAS=False, SPLIT=False)
    said = ptxas(compiled, 90, tmp_path)
    assert "serialized" not in said and compiled.metadata.shared <= 113 << 10
    assert int(re.findall(r"(\d+) bytes spill stores", said)[0]) <= spilled
    assert int(re.findall(r"Used (\d+) registers", said)[0]) <= 128


@pytest.mark.parametrize(
    "capability, tile", [(80, (64, 64, 2, 4, 3)), (90, (16, 64, 4, 4, 3)), (90, (32, 32, 2, 2, 3))]
)
def test_shared_sums_move_as_they_lie(capability, tile, tmp_path):
    """Four at a time from a tensor core's own layout, on both generations of multiplications; W is asked for before."""
    compiled = compile_gemm(Nf4Config(*tile, slots=2), capability)
    block_m, block_n, _, warps, _ = tile
    vectors = block_m * block_n // (32 * warps * 4)
    assert instructions(compiled, r"st\.global\.cg\.v4\.f32") == vectors
    assert instructions(compiled, r"ld\.global\.cg\.v4\.f32") == vectors
    moved = [line for line in compiled.asm["ttgir"].splitlines() if "global.cg.v4.f32" in line]
    assert len(moved) == 2 and all(re.search(rf"tensor<{block_n}x{block_m}xf32, #mma\d*>", line) for line in moved)
    versions = re.findall(r"#mma\d* = #ttg.nvidia_mma<{versionMajor = (\d)", compiled.asm["ttgir"])
    assert set(versions) <= {"2", "3"}
    text = compiled.asm["ptx"]
    assert ("griddepcontrol.wait" in text) == (capability == 90)
    if capability == 90:
        assert not re.search(r"(ld|st|atom|red)\.[a-z.]*global", text[: text.index("griddepcontrol.wait")])
    assert "serialized" not in ptxas(compiled, capability, tmp_path)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("block_n", "has_a"), [(16, True), (32, True), (16, False)])
def test_inputs_of_the_gemm_wait_before_memory(block_n, has_a, capability):
    """On Hopper: the GEMM may start, A is asked for, the last kernel is waited for, and only then memory is touched."""
    from slothrl_kernels.nf4_inputs import nf4_inputs_kernel

    pointers = dict.fromkeys(("x", "ordered", "a", "xa"), "*bf16") | {"partials": "*fp32", "arrived": "*i32"}
    constants = {"INTERPRETED": False, "BLOCK_M": 16, "BLOCK_N": block_n, "GROUP": 256, "SPLIT": True, "HAS_A": has_a}
    constants |= dict.fromkeys(("EARLY", "FOLLOWS"), capability >= 90)
    options = {"num_warps": 4, "num_stages": 2}
    compiled = compile_kernel(nf4_inputs_kernel, pointers, ("M", "N", "K", "splits"), constants, capability, **options)
    assert compiled.metadata.shared <= CONSUMER_SHARED_MEMORY
    text = compiled.asm["ptx"]
    assert ("griddepcontrol.wait" in text) == ("griddepcontrol.launch_dependents" in text) == (capability == 90)
    assert ("cp.async.bulk.prefetch.L2" in text) == (has_a and capability == 90)
    touches = [found.start() for found in re.finditer(r"(ld|st|atom|red|cp\.async(?!\.bulk))\.[a-z0-9:.]*global", text)]
    assert touches
    if capability == 90:
        order = ["launch_dependents", *(["prefetch.L2"] if has_a else []), "griddepcontrol.wait"]
        places = [text.index(name) for name in order]
        assert places == sorted(places) and places[-1] < min(touches)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("softcap, top1", [(False, False), (True, False), (True, True)])
def test_log_softmax_with_and_without_a_softcap(softcap, top1, capability):
    """The cap and who is likeliest cost no memory: the same vectors in and out, nothing spilled."""
    from slothrl_kernels.selective_log_softmax import _selective_log_softmax_kernel

    pointers = {"logits": "*bf16", "labels": "*i64", "out": "*fp32", "probs": "*bf16", "inner": "fp32", "outer": "fp32"}
    pointers |= {"top1": "*i8" if top1 else "*fp32"}
    constants = {"SOFTCAP": softcap, "IGNORE": -100, "WRITE_PROBS": True, "WRITE_TOP1": top1, "BLOCK": 4096}
    integers = ("logits_stride", "probs_stride", "rows", "vocab")
    kernel = _selective_log_softmax_kernel
    compiled = compile_kernel(kernel, pointers, integers, constants, capability, num_warps=8)
    assert instructions(compiled, r"st\.global\.v4\.b32") == 2 and instructions(compiled, r"\.local") == 0
    assert instructions(compiled, r"ld\.global\.v4\.b32") == 4


@pytest.mark.parametrize("activation", [0, 1, 2], ids=["silu", "gelu", "gelu_tanh"])
def test_gradients_of_a_glu_with_its_value_again(activation):
    """Three loads, three stores of vectors, and nothing spilled."""
    from slothrl_kernels.glu import BLOCK, _backward_kernel

    pointers = dict.fromkeys(("gate", "up", "to_y", "to_gate", "to_up", "y"), "*bf16")
    integers = [f"{name}_stride" for name in pointers] + ["width", "blocks"]
    constants = {"ACTIVATION": activation, "BLOCK": BLOCK, "WRITE_Y": True}
    compiled = compile_kernel(_backward_kernel, pointers, integers, constants, 90, num_warps=8)
    assert instructions(compiled, r"ld\.global\.v4\.b32") == instructions(compiled, r"st\.global\.v4\.b32") == 3
    assert instructions(compiled, r"\.local") == 0


def compile_qk(backward: bool, capability: int):
    """Llama's order of casts, 16 or more heads of 128, bf16; strides are multiples of 16."""
    from slothrl_kernels import qk_norm_rope_kernels as kernels

    kernel = kernels.qk_backward_kernel if backward else kernels.qk_forward_kernel
    names = [name for name in kernel.arg_names if not name.isupper()]
    strides = [name for name in names if name.endswith(("_batch", "_head", "_token"))]
    integers = strides + [n for n in ("length", "q_heads", "k_heads", "half", "rest", "count", "turns") if n in names]
    pointers = {n: "*bf16" for n in names if n not in integers} | {"eps": "fp32", "shift": "fp32"}
    constants = {"CAST_FIRST": True, "HEADS": 16, "HALF": 64, "REST": 0} | ({"WANTS_WEIGHT": False} if backward else {})
    return compile_kernel(kernel, pointers, integers, constants, capability, num_warps=4)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("backward", [False, True])
def test_qk_norm_rope_is_vectors_and_no_shared_memory(backward, capability):
    """Heads are summed within a warp; two halves of q and k (and of their gradients), the weights and the angles."""
    compiled = compile_qk(backward, capability)
    assert compiled.metadata.shared == 0 and instructions(compiled, r"\.local") == 0
    assert instructions(compiled, r"st\.global\.v4\.b32") == instructions(compiled, r"st\.global") == 4
    assert instructions(compiled, r"ld\.global\.v4\.b32") == instructions(compiled, r"ld\.global") > 0


@pytest.mark.parametrize("heads", [32, 16])
def test_rope_asks_for_all_before_it_stores(heads):
    """q and k of one token, 8 heads of k, and its angles, in vectors; loops beyond these heads come behind."""
    from slothrl_kernels.rope_kernels import rope_kernel

    names = [name for name in rope_kernel.arg_names if not name.isupper()]
    strides = [name for name in names if name.endswith(("_batch", "_head", "_token"))]
    integers = [*strides, "length", "q_heads", "k_heads", "half", "rest"]
    pointers = {n: "*bf16" for n in names if n not in integers}
    constants = {"BACKWARD": False, "Q_HEADS": heads, "K_HEADS": 8, "HALF": 64, "REST": 1}
    compiled = compile_kernel(rope_kernel, pointers, integers, constants, 90, num_warps=4)
    accesses = re.findall(r"(ld|st)\.global\.(v\d|b16)", compiled.asm["ptx"])
    first = next(i for i, (what, _) in enumerate(accesses) if what == "st")
    # Two of each half of q for 16 heads, k's, and the angles for each of them.
    assert first == heads // 8 + 2 + 8 and {vector for _, vector in accesses[:first]} == {"v4", "v2"}
    assert compiled.metadata.shared == 0 and instructions(compiled, r"\.local") == 0


@pytest.mark.parametrize("backward", [False, True])
def test_rms_norm_is_vectors(backward):
    """Rows of 4096, 16 entries a thread: 16-byte loads and stores, one 4-byte one for r."""
    from slothrl_kernels import rms_norm_kernels as kernels

    kernel = kernels.backward_kernel if backward else kernels.forward_kernel
    names = [name for name in kernel.arg_names if not name.isupper()]
    integers = [n for n in names if n.endswith("_stride") or n in ("count", "width", "turns")]
    pointers = {n: "*bf16" for n in names if n not in integers} | {"scale": "*fp32", "shift": "fp32"}
    pointers |= {"partials": "*fp32"} if backward else {"eps": "fp32"}
    constants = {"HAS_WEIGHT": True, "CAST_FIRST": True, "ROWS": 1, "COLUMNS": 4096}
    constants |= {"HAS_SUM": True, "WANTS_WEIGHT": False} if backward else {"HAS_RESIDUAL": True}
    compiled = compile_kernel(kernel, pointers, integers, constants, 90, num_warps=8)
    reads, writes = (8, 2) if backward else (6, 4)
    assert instructions(compiled, r"ld\.global\.v4\.b32") == reads and instructions(compiled, r"\.local") == 0
    assert instructions(compiled, r"st\.global\.v4\.b32") == writes
