"""Packed attention natively: every backend against float32 truth at real sizes, bits, choice, CUDA graphs, a model."""

from functools import partial

import pytest
import torch
from slothrl_kernels import PackedLayout, packed_attention, packed_attention_reference
from slothrl_kernels.attention_choice import CANDIDATES, CHOICES, refusal, said
from slothrl_kernels.attention_rule import Rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tree(families, prefix, children):
    """families times (a prefix, its children), all lengths as given."""
    lengths, parents = [], []
    for _ in range(families):
        root = len(lengths)
        lengths += [prefix, *children]
        parents += [-1, *[root] * len(children)]
    return lengths, parents


LAYOUTS = {
    "rows": ([1, 700, 64, 1333, 128, 2, 900], None),
    "batch": ([1024] * 4, None),
    "tree": tree(8, 129, [50, 200, 128, 1, 97, 256, 33, 180]),
    "wide tree": tree(1, 2048, [512] * 8),
    "roots between": ([300, 77, 500, 1, 64, 1000, 40], [-1, 0, 0, -1, 3, -1, -1]),
    "long": ([16384], None),
}
CASES = [  # layout, query heads, key heads, head size, window, softcap
    ("rows", 8, 2, 128, None, None),
    ("batch", 8, 8, 128, None, None),
    ("batch", 14, 2, 64, None, None),
    ("tree", 14, 2, 64, None, None),
    ("tree", 8, 8, 128, None, None),
    ("wide tree", 8, 2, 128, None, None),
    ("roots between", 4, 1, 256, None, None),
    ("roots between", 4, 4, 80, None, None),
    ("rows", 3, 1, 96, None, None),
    ("rows", 8, 2, 128, 200, None),
    ("tree", 8, 2, 128, 100, None),
    ("tree", 8, 4, 256, 128, 50.0),
    ("long", 2, 1, 128, None, None),
    ("long", 2, 1, 64, 4096, None),
]
FLEX = [("tree", 8, 2, 128, 100, None), ("rows", 8, 2, 128, None, 50.0)]  # each kind compiles for many seconds


def inputs_of(layout, heads, keys, head_size, dtype=torch.bfloat16):
    """q, k, v as a model gives them, heads transposed in from (1, H, T, d), and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = [
        torch.randn(n, layout.tokens, head_size, generator=generator, device="cuda") for n in (heads, keys, keys, heads)
    ]
    return [x.to(dtype).transpose(0, 1) for x in made]


def run(function, inputs, gradient):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def assert_close_to_truth(impl, case, dtype=torch.bfloat16):
    """Each result's error is at most the same-dtype reference's and two steps of its largest value."""
    name, heads, keys, head_size, window, softcap = case
    layout = PackedLayout.build(*LAYOUTS[name], device="cuda")
    *inputs, gradient = inputs_of(layout, heads, keys, head_size, dtype)
    options = {"layout": layout, "window": window, "softcap": softcap}
    reference = partial(packed_attention_reference, **options)
    ours = run(partial(packed_attention, impl=impl, **options), inputs, gradient)
    truth = run(reference, [x.float() for x in inputs], gradient.float())
    plain = run(reference, inputs, gradient)
    for what, exact, theirs, mine in zip(("out", "dq", "dk", "dv"), truth, plain, ours, strict=True):
        assert (mine.dtype, mine.shape) == (dtype, exact.shape) and mine.isfinite().all(), what
        error, allowed = ((x.float() - exact).abs().max().item() for x in (mine, theirs))
        allowed += 2 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert error <= allowed, f"{what}: {error} > {allowed}"
        mean, allowed = ((x.float() - exact).abs().mean().item() for x in (mine, theirs))
        assert mean <= 1.5 * allowed + 1e-6, f"{what}, on average: {mean} > {allowed}"


def serves(impl, case, dtype=torch.bfloat16):
    name, heads, _, head_size, window, softcap = case
    layout = PackedLayout.build(*LAYOUTS[name])
    shape = torch.empty(1, heads, head_size, dtype=dtype, device="cuda" if torch.cuda.is_available() else "meta")
    return refusal(impl, shape, layout, Rule(1.0, window, softcap)) is None


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", CANDIDATES)
def test_close_to_truth(impl, case):
    if not serves(impl, case):
        pytest.skip(f"{impl} refuses it")
    assert_close_to_truth(impl, case)


@pytest.mark.parametrize("case", FLEX, ids=str)
def test_flex_close_to_truth(case):
    assert_close_to_truth("flex", case)


@pytest.mark.parametrize("impl", ["flash", "triton"])
def test_half(impl):
    assert_close_to_truth(impl, ("tree", 8, 2, 128, None, None), torch.float16)


def test_float32_of_triton():
    layout = PackedLayout.build(*LAYOUTS["roots between"], device="cuda")
    *inputs, gradient = inputs_of(layout, 4, 2, 80, torch.float32)
    ours = run(partial(packed_attention, layout=layout, impl="triton"), inputs, gradient)
    truth = run(partial(packed_attention_reference, layout=layout), [x.double() for x in inputs], gradient.double())
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_triton_has_the_same_bits_every_time():
    """And leaves nothing unwritten: uninitialized memory is NaN here."""
    layout = PackedLayout.build(*LAYOUTS["tree"], device="cuda")
    *inputs, gradient = inputs_of(layout, 14, 2, 64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (
            run(partial(packed_attention, layout=layout, impl="triton"), inputs, gradient) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["flash", "triton"])
def test_a_sibling_changes_nothing_else(impl):
    layout = PackedLayout.build(*tree(2, 100, [60, 130, 70]), device="cuda")
    *inputs, gradient = inputs_of(layout, 8, 2, 128)
    attention = partial(packed_attention, layout=layout, impl=impl)
    before = run(attention, inputs, gradient)
    for x in inputs:
        x[160:290] += 1
    after = run(attention, inputs, gradient)
    others = torch.cat([torch.arange(100, 160), torch.arange(290, layout.tokens)])  # not the prefix: its dk, dv change
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=2e-2)
        assert not torch.equal(a[160:290], b[160:290])
    assert torch.equal(before[0][others], after[0][others])


def test_auto_measures_once_and_takes_the_fastest(tmp_path, monkeypatch):
    """In this process, and in the next, which takes over what is kept in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layout = PackedLayout.build(*LAYOUTS["batch"], device="cuda")
    *inputs, gradient = inputs_of(layout, 8, 2, 128)
    CHOICES.clear()
    run(partial(packed_attention, layout=layout), inputs, gradient)
    (choice,) = CHOICES.values()
    assert set(choice.measured) == {impl for impl in CANDIDATES if serves(impl, ("batch", 8, 2, 128, None, None))}
    assert set(choice.measured) >= {"flash", "triton", "sdpa"} and "kept" not in said()[0]
    assert all(isinstance(taken, float) for taken in choice.measured.values()), choice
    assert choice.impl == min(choice.measured, key=choice.measured.__getitem__)
    other = PackedLayout.build([1000] * 4, device="cuda")  # of the same kind
    run(partial(packed_attention, layout=other), [x[:4000] for x in inputs], gradient[:4000])
    assert list(CHOICES.values()) == [choice]
    CHOICES.clear()  # as the next process has it
    monkeypatch.setattr("slothrl_kernels.attention_choice._milliseconds", None)
    again = PackedLayout.build(*LAYOUTS["batch"], device="cuda")
    run(partial(packed_attention, layout=again), inputs, gradient)
    (kept,) = CHOICES.values()
    assert kept.kept and (kept.impl, kept.measured) == (choice.impl, choice.measured)
    assert f"kept from an earlier run in {tmp_path}" in said()[0]


@pytest.mark.parametrize("impl", ["flash", "triton"])
def test_forward_in_a_cuda_graph(impl):
    layout = PackedLayout.build(*LAYOUTS["tree"], device="cuda")
    *inputs, _ = inputs_of(layout, 8, 2, 64)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        packed_attention(*inputs, layout, impl=impl)  # compiles, and works the tables out
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = packed_attention(*inputs, layout, impl=impl)
        inputs[0].mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, packed_attention(*inputs, layout, impl=impl))


@pytest.mark.parametrize("impl", ["auto", "flash", "triton"])
def test_a_model_over_a_pack(impl):
    """Hidden states in bfloat16 beside float32's, under checkpointing, and gradients that are finite and not zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from slothrl.packed_model import packed_forward, packed_mode, supports_packing

    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    assert supports_packing(model) is None
    layout = PackedLayout.build(*tree(2, 70, [40, 90, 33]), device="cuda")
    ids = torch.randint(3, 512, (layout.tokens,), device="cuda")
    model.gradient_checkpointing_enable()
    model.train()
    with packed_mode(model):
        hidden = packed_forward(model, ids, layout, impl=impl)
        hidden.float().square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "q_proj" in n or "k_proj" in n]
    assert len(grads) == 8 and all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    plain = LlamaForCausalLM(config).to("cuda")
    plain.load_state_dict(model.float().state_dict())
    with torch.no_grad(), packed_mode(plain):
        truth = packed_forward(plain, ids, layout, impl="torch")
    assert (hidden.float() - truth).norm() / truth.norm() < 3e-2
