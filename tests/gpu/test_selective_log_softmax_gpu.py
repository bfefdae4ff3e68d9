"""The native kernel at real sizes: error budget against float64, and `selective_logprobs` on CUDA against float32."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 2e-6  # relative to the largest value; the reference's own error is allowed on top


def cuda_case(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = 4 * torch.randn(rows, vocab, generator=generator, device="cuda")
    labels = torch.randint(vocab, (rows,), generator=generator, device="cuda")
    labels[:3] = torch.tensor([0, vocab - 1, -100])
    return logits.to(dtype), labels


@pytest.mark.parametrize("vocab", [63, 100, 2000, 49152, 151936, 151937])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_error_budget(vocab, dtype, in_place, softcap):
    from slothrl_kernels import selective_log_softmax, selective_log_softmax_reference

    logits, labels = cuda_case(64, vocab, dtype)
    exact_probs = torch.full_like(logits, float("nan"), dtype=torch.float64)
    plain_probs = torch.full_like(logits, float("nan"))
    exact = selective_log_softmax_reference(logits.double(), labels, 1 / 0.9, exact_probs, softcap)
    plain = selective_log_softmax_reference(logits, labels, 1 / 0.9, plain_probs, softcap)
    probs = logits if in_place else torch.full_like(logits, float("nan"))
    ours = selective_log_softmax(logits, labels, 1 / 0.9, probs, softcap)
    for truth, reference, kernel in zip((*exact, exact_probs), (*plain, plain_probs), (*ours, probs), strict=True):
        assert kernel.isfinite().all()
        allowed = (reference.double() - truth).abs().max() + TOLERANCE * max(1.0, truth.abs().max().item())
        assert (kernel.double() - truth).abs().max() <= allowed


def test_offsets_beyond_32_bits():
    from slothrl_kernels import selective_log_softmax, selective_log_softmax_reference

    rows, vocab = 14200, 151936  # 2.16e9 entries, 4.3 GB in bfloat16
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-8:] = torch.randn(8, vocab, dtype=torch.bfloat16, device="cuda")
    labels = torch.arange(rows, device="cuda")
    expected = selective_log_softmax_reference(logits[-8:], labels[-8:])
    result = selective_log_softmax(logits, labels, 1.0, logits)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours[-8:], theirs, atol=1e-4, rtol=1e-5)
    sums = logits[-8:].float().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-2, rtol=0)


def logprobs_and_gradient(hidden, labels, weight, impl):
    from slothrl.logprobs import HeadSpec, selective_logprobs

    hidden = hidden.clone().requires_grad_()
    logprobs, entropy = selective_logprobs(hidden, labels, HeadSpec(weight), 0.9, chunk_size=200, impl=impl)
    (gradient,) = torch.autograd.grad((logprobs * torch.linspace(-1, 1, len(labels), device="cuda")).sum(), hidden)
    return logprobs, entropy, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [49152, 151937])
def test_selective_logprobs_against_float32(dtype, vocab):
    """impl="auto" takes the kernel here; its error is at most the torch route's in the same dtype, plus a little."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(500, 256, generator=generator, device="cuda").to(dtype)
    weight = (torch.randn(vocab, 256, generator=generator, device="cuda") / 8).to(dtype)
    labels = torch.randint(vocab, (500,), generator=generator, device="cuda")
    labels[::50] = -100
    truth = logprobs_and_gradient(hidden.double(), labels, weight.double(), "torch")
    plain = logprobs_and_gradient(hidden, labels, weight, "torch")
    kernel = logprobs_and_gradient(hidden, labels, weight, "auto")
    for exact, reference, ours in zip(truth, plain, kernel, strict=True):
        allowed = 1.1 * (reference.double() - exact).abs().max() + 1e-5
        assert (ours.double() - exact).abs().max() <= allowed


def test_gradient_memory_is_one_chunk_of_logits():
    """The peak stays under two chunks of logits where whole logits would take ten."""
    from slothrl.logprobs import HeadSpec, selective_logprobs

    vocab, tokens, chunk = 100000, 2560, 256
    hidden = torch.randn(tokens, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(vocab, 64, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(vocab, (tokens,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    selective_logprobs(hidden, labels, HeadSpec(weight), chunk_size=chunk)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * chunk * vocab * 2 + (8 << 20)


@pytest.mark.parametrize("vocab", [100, 49152, 151937])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_whether_the_label_is_likeliest(vocab, dtype, softcap):
    """As torch.argmax has it on the CPU, the first of equals, with the probabilities written over the logits."""
    from slothrl_kernels import selective_log_softmax

    logits, labels = cuda_case(64, vocab, dtype)
    logits = logits.round()  # many equals at the top
    first = logits.cpu().float().argmax(-1).to("cuda")
    labels[10:40] = first[10:40]
    labels[20:30] = torch.where(logits[20:30] == logits[20:30].amax(-1, keepdim=True), 1.0, 0.0).cumsum(-1).argmax(-1)
    found = torch.zeros(64, dtype=torch.bool, device="cuda")
    separate = selective_log_softmax(logits.clone(), labels, 1 / 0.9, None, softcap)
    into = logits.clone()
    ours = selective_log_softmax(into, labels, 1 / 0.9, into, softcap, 1.0, found)
    assert torch.equal(found, first == labels) and found[10:20].all() and not found[2]
    for mine, theirs in zip(ours, separate, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-6)
