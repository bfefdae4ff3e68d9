"""Fused layers and models on a GPU: against float64 at real widths, against the unfused model, and in memory."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slothrl_kernels import Projection, QKNorm, lora_linear, lora_linear_reference, lora_mlp, lora_mlp_reference
from slothrl_kernels.decoder_layer import decoder_layer
from slothrl_kernels.layer_parts import LayerParts, Norm
from slothrl_kernels.layer_reference import decoder_layer_reference

from slothrl.fuse import fuse, unfuse

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))
from random_models import LINEARS, SHAPES, random_linear, random_model, randomize_adapter  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = 1024
SHAPES["8b, 2 layers"] = {**SHAPES["8b"], "num_hidden_layers": 2, "vocab_size": 8192}
SHAPES["0.6b, 4 layers"] = {**SHAPES["0.6b"], "num_hidden_layers": 4, "vocab_size": 8192}


def projection(outputs, inputs, seed, rank=16):
    from slothrl.fuse_layers import LinearReader

    generator = torch.Generator("cuda").manual_seed(seed)
    layer = random_linear(inputs, outputs, generator)
    x = torch.zeros(1, inputs, device="cuda", dtype=torch.bfloat16)
    reading = LinearReader(layer).read(x)
    assert reading is not None
    a = torch.randn(rank, inputs, device="cuda", generator=generator) * 0.02
    b = torch.randn(outputs, rank, device="cuda", generator=generator) * 0.02
    return Projection(reading.projection.weight, None, a.bfloat16(), b.bfloat16(), 2.0)


def results(function, x, group, dtype):
    """Outputs and gradients of x, A and B, in float64."""
    leaves = [x.to(dtype, copy=True).requires_grad_()]
    made = []
    for p in group:
        a, b = (t.to(dtype, copy=True).requires_grad_() for t in (p.a, p.b))
        leaves += [a, b]
        made.append(Projection(p.weight, None, a, b, p.scaling))
    outputs = function(leaves[0], made)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    generator = torch.Generator("cuda").manual_seed(99)
    upstream = [torch.randn(y.shape, device="cuda", generator=generator).to(dtype) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    return [t.detach().double() for t in (*outputs, *(leaf.grad for leaf in leaves))]


def assert_no_worse(function, reference, group, tokens=TOKENS):
    """Each result's mean error against float64 is at most the reference's in bf16, and a tenth."""
    x = torch.randn(tokens, group[0].weight.shape[1], device="cuda", generator=torch.Generator("cuda").manual_seed(7))
    x = x.bfloat16()
    truth = results(reference, x, group, torch.float64)
    plain, ours = (results(f, x, group, torch.bfloat16) for f in (reference, function))
    for i, (exact, theirs, mine) in enumerate(zip(truth, plain, ours, strict=True)):
        allowed = 1.1 * (theirs - exact).abs().mean() + 1e-6 * exact.abs().mean()
        assert mine.isfinite().all() and (mine - exact).abs().mean() <= allowed, i


@pytest.mark.parametrize("layout", ["narrow", "wide", "auto"])
@pytest.mark.parametrize("widths", [(4096, 1024, 1024), (14336, 14336)], ids=["q, k, v", "gate, up"])
def test_groups_against_float64(widths, layout):
    group = [projection(n, 4096, i) for i, n in enumerate(widths)]
    assert_no_worse(lambda x, g: lora_linear(x, g, layout=layout), lora_linear_reference, group)


@pytest.mark.parametrize("layout", ["narrow", "wide", "tall"])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 14336)], ids=["o", "down"])
def test_singles_against_float64(shape, layout):
    group = [projection(*shape, 1)]
    assert_no_worse(lambda x, g: lora_linear(x, g, layout=layout), lora_linear_reference, group)


@pytest.mark.parametrize("recompute", [False, True])
def test_mlp_against_float64(recompute):
    group = [projection(14336, 4096, 0), projection(14336, 4096, 1), projection(4096, 14336, 2)]
    ours = lambda x, g: lora_mlp(x, g[:2], g[2], recompute=recompute)  # noqa: E731
    assert_no_worse(ours, lambda x, g: lora_mlp_reference(x, g[:2], g[2]), group)


LAYERS = {  # h, F, heads of 128, q and k normed
    "8b": (4096, 14336, 32, 8, False),
    "0.6b": (1024, 3072, 16, 8, True),
    "four norms": (1152, 6912, 8, 4, True),
}


def layer_of(shape, keep):
    """(a layer as a function of x and its projections, which are q, k, v, o, gate, up, down; the projections)."""
    width, inner, heads, kv_heads, normed = LAYERS[shape]
    q, kv = heads * 128, kv_heads * 128
    sizes = [(q, width), (kv, width), (kv, width), (width, q), (inner, width), (inner, width), (width, inner)]
    group = [projection(*size, seed) for seed, size in enumerate(sizes)]
    generator = torch.Generator("cuda").manual_seed(3)
    counts = (width, width, 128, 128, width, width)
    weights = [1 + 0.1 * torch.randn(n, device="cuda", generator=generator) for n in counts]
    angle = torch.arange(TOKENS, device="cuda")[:, None] * 10000 ** (-torch.arange(64, device="cuda") / 64)
    angle = torch.cat([angle, angle], 1)[None]

    def attend(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    def layer(function, x, group):
        first, second, norm_q, norm_k, *last = (w.bfloat16().to(x.dtype) for w in weights)
        after = tuple(Norm(w, 1e-6, 0.0, False) for w in last) if "four" in shape else None
        tables = (angle.cos().bfloat16().to(x.dtype), angle.sin().bfloat16().to(x.dtype))
        qkv, o, inner, down = tuple(group[:3]), group[3], tuple(group[4:6]), group[6]
        parts = LayerParts(
            Norm(first, 1e-6, 0.0, True), qkv, heads, kv_heads, 128, tables, (norm_q, norm_k) if normed else None,
            QKNorm(), attend, o, Norm(second, 1e-6, 0.0, True), inner, down, "silu", keep, "auto", after,
        )  # fmt: skip
        return function(x.view(-1, TOKENS, width), parts).view(-1, width)

    return layer, group


@pytest.mark.parametrize("rows", [1, 4], ids=["weights unpacked anew", "weights held"])
@pytest.mark.parametrize("keep", ["input", "attention", "all"])
@pytest.mark.parametrize("shape", LAYERS)
def test_layer_against_float64(shape, keep, rows):
    """Values and all gradients of a whole layer; from 4 rows on 0.6b's tokens are four times its width."""
    if shape == "8b" and rows > 1:
        pytest.skip("float64 takes too much memory")
    layer, group = layer_of(shape, keep)
    ours = lambda x, g: layer(decoder_layer, x, g)  # noqa: E731
    assert_no_worse(ours, lambda x, g: layer(decoder_layer_reference, x, g), group, rows * TOKENS)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_mlp_keeps(recompute):
    """x and, unless recomputed, gate and up: nothing else of the size of an activation outlives the forward."""
    group = [projection(14336, 4096, 0), projection(14336, 4096, 1), projection(4096, 14336, 2)]
    x = torch.randn(4096, 4096, device="cuda").bfloat16().requires_grad_()
    for p in group:
        p.a.requires_grad_(), p.b.requires_grad_()  # pyright: ignore
    lora_mlp(x, group[:2], group[2], recompute=recompute)  # compiles, and fills caches
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = lora_mlp(x, group[:2], group[2], recompute=recompute)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept <= (0 if recompute else 2 * 4096 * 14336 * 2) + (1 << 20)


def adapted(shape):
    base = random_model(shape, "cuda", 2048)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))
    randomize_adapter(model)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def step(model, ids, autocast=True):
    """(loss, gradients by name, peak bytes beyond the model)."""
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, peak


def exactly(model):
    """The same model in float32: bitsandbytes then computes in float32 with its bf16 weights."""
    exact = copy.deepcopy(model)
    for module in exact.modules():
        if hasattr(module, "compute_type_is_set"):  # bitsandbytes' 4-bit layer
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    for parameter in exact.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return exact


def distance(gradients, exact):
    """Mean over the parameters of the relative distance of their gradients."""
    return sum(((gradients[n] - g).norm() / g.norm()).item() for n, g in exact.items()) / len(exact)


@pytest.mark.parametrize("shape", ["8b, 2 layers", "0.6b, 4 layers"])
def test_a_fused_model_trains_what_the_plain_one_does(shape):
    """Loss and gradients are no further from float32 than the plain model in bf16 is, within a half; less memory."""
    model = adapted(shape)
    ids = torch.randint(0, 8192, (2, 1000), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    step(model, ids)
    plain = step(model, ids)
    exact = step(exactly(model), ids, autocast=False)
    report = fuse(model)
    layers = SHAPES[shape]["num_hidden_layers"]
    rope = "QK-norm + RoPE" if SHAPES[shape]["model_type"] == "qwen3" else "RoPE"
    assert report.fused["gated MLP"] == report.fused["q_proj + k_proj + v_proj"] == report.fused[rope] == layers
    assert report.fused["whole layer"] == layers
    assert not report.kept and not report.notes and report.difference is not None
    step(model, ids)
    fused = step(model, ids)
    assert fused[0] == pytest.approx(exact[0], rel=2e-3)
    assert fused[1].keys() == plain[1].keys() == exact[1].keys() and len(plain[1]) == layers * 14
    assert all(gradient.norm() > 0 for gradient in fused[1].values())
    ours, theirs = distance(fused[1], exact[1]), distance(plain[1], exact[1])
    assert ours <= 1.5 * theirs < 0.3, (ours, theirs)
    assert fused[2] <= 1.02 * plain[2]
    unfuse(model)
    after = step(model, ids)
    assert after[0] == pytest.approx(plain[0], rel=1e-5)


def test_generates_the_same_tokens():
    """Few rows run the 4-bit GEMM; a cache, and no gradients."""
    model = adapted("8b, 2 layers").eval()
    model.get_base_model().gradient_checkpointing_disable()
    ids = torch.randint(0, 8192, (2, 40), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():
        exact = exactly(model)(input_ids=ids).logits
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        plain = model(input_ids=ids).logits.float()
        fuse(model)
        fused = model(input_ids=ids).logits.float()
        cached = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert (fused - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()
    assert (fused - exact).abs().mean() <= 0.05 * exact.abs().mean()
    assert cached.shape == (2, 44)


def test_llm_int8_rounds_its_inputs_and_stays():
    """Dequantising would be nearer to the truth, and another computation than bitsandbytes does."""
    from bitsandbytes.nn import Linear8bitLt

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            plain = [torch.nn.Linear(512, 512, bias=False) for _ in range(2)]
            self.one, self.two = (Linear8bitLt(512, 512, bias=False, has_fp16_weights=False) for _ in range(2))
            for layer, source in zip((self.one, self.two), plain, strict=True):
                layer.load_state_dict(source.state_dict())

        def forward(self, x):
            return self.one(x) + self.two(x)

    module = Two().cuda()
    module.is_loaded_in_8bit = True  # pyright: ignore
    model = get_peft_model(module, LoraConfig(r=8, target_modules=["one", "two"]))  # pyright: ignore
    x = torch.randn(4, 512, device="cuda").half()
    with torch.autocast("cuda", torch.float16):
        before = model(x)
        report = fuse(model, inputs={"x": x.clone().requires_grad_()})
        assert torch.equal(model(x), before)
    assert not report.fused and {what for what, _ in report.kept} == {"one", "two"}
