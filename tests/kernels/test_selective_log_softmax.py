"""The selective log-softmax kernel under an error budget against float64, and its reference against torch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from slothrl_kernels import HAS_TRITON, selective_log_softmax, selective_log_softmax_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 2e-6  # relative to the largest value; the reference's own error is allowed on top


def case(rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """logits (N, V) with a wide spread, labels (N,) on both edges and in between, some left out."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[:3] = torch.tensor([0, vocab - 1, -100])
    logits[-1, labels[-1]] = 40.0  # a label that is all but certain
    return logits.to(dtype).to(device), labels.to(device)


def check_budget(logits: torch.Tensor, labels: torch.Tensor, inv_temperature: float, **knobs: float) -> None:
    """Each output's error against float64 is at most the same-dtype reference's plus a tolerance."""
    exact_probs, reference_probs, probs = (
        torch.full_like(logits, float("nan"), dtype=dtype) for dtype in (torch.float64, logits.dtype, logits.dtype)
    )
    exact = selective_log_softmax_reference(logits.double(), labels, inv_temperature, exact_probs, **knobs)
    reference = selective_log_softmax_reference(logits, labels, inv_temperature, reference_probs, **knobs)
    kernel = selective_log_softmax(logits, labels, inv_temperature, probs, **knobs)
    for name, truth, plain, ours in zip(
        ("logprob", "entropy", "lse", "probs"),
        (*exact, exact_probs),
        (*reference, reference_probs),
        (*kernel, probs),
        strict=True,
    ):
        assert ours.isfinite().all(), name
        tolerance = TOLERANCE * max(1.0, truth.abs().max().item())
        if ours.dtype == torch.bfloat16 and not ours.is_cuda:
            # Triton 3.9's interpreter truncates to bfloat16, where a GPU rounds to nearest: one step, not half of one.
            tolerance += torch.finfo(torch.bfloat16).eps * truth.abs().max().item()
        allowed = (plain.double() - truth).abs().max() + tolerance
        assert (ours.double() - truth).abs().max() <= allowed, name


@pytest.mark.parametrize("vocab", [1, 2, 63, 100, 2000, 4096, 4097, 49152])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inv_temperature", [1.0, 1 / 0.7])
def test_error_budget(kernel_device, vocab, dtype, inv_temperature):
    check_budget(*case(5, vocab, dtype, kernel_device), inv_temperature)


@pytest.mark.parametrize("vocab", [1, 63, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [3.0, 30.0])
def test_error_budget_under_a_softcap(kernel_device, vocab, dtype, softcap):
    """Both nearly flat and nearly straight, on the logits' scale; nothing of what lies beyond the vocabulary counts."""
    check_budget(*case(5, vocab, dtype, kernel_device), 1 / 0.7, softcap=softcap, scale=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probs_may_overwrite_the_logits(kernel_device, dtype):
    logits, labels = case(5, 4099, dtype, kernel_device)
    separate = torch.full_like(logits, float("nan"))
    expected = selective_log_softmax(logits, labels, 0.9, separate)
    result = selective_log_softmax(logits, labels, 0.9, logits)
    for ours, theirs in zip((*result, logits), (*expected, separate), strict=True):
        assert torch.equal(ours, theirs)
    assert (logits[2] == 0).all()


def test_rows_of_a_wider_buffer(kernel_device):
    wide = torch.full((4, 150), float("nan"), device=kernel_device)
    logits, labels = case(4, 100, torch.float32, kernel_device)
    wide[:, :100] = logits
    selective_log_softmax(wide[:, :100], labels, 1.0, wide[:, :100])
    expected = torch.empty_like(logits)
    selective_log_softmax_reference(logits, labels, 1.0, expected)
    torch.testing.assert_close(wide[:, :100], expected, atol=1e-6, rtol=1e-5)
    assert wide[:, 100:].isnan().all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 63, 4099])
def test_whether_the_label_is_likeliest(kernel_device, dtype, softcap, vocab):
    """As torch.argmax has it, the first of equals; with and without the probabilities over the logits."""
    logits, labels = case(9, vocab, dtype, kernel_device)
    logits = logits.round()  # many equals
    labels[3:7] = logits[3:7].argmax(-1)
    logits[5, labels[5] // 2] = logits[5].max()  # an equal before the label, where there is room
    logits[6, (labels[6] + vocab) // 2] = logits[6].max()  # and one after it
    wanted = logits.argmax(-1) == labels
    for write in (False, True):
        found = torch.zeros(11, dtype=torch.bool, device=kernel_device)
        into = logits.clone()
        selective_log_softmax(into, labels, 1 / 0.7, into if write else None, softcap, 0.5, found[1:-1])
        plain = torch.empty_like(wanted)
        selective_log_softmax_reference(logits, labels, 1 / 0.7, None, softcap, 0.5, plain)
        assert torch.equal(plain, wanted) and torch.equal(found[1:-1], wanted) and not (found[0] or found[-1])
    assert wanted[3] and wanted[6] and not wanted[2]
    assert wanted[5] == (vocab == 1)
    with pytest.raises(ValueError, match="top1_out must be"):
        selective_log_softmax(logits, labels, top1_out=torch.empty(9, device=kernel_device))


def test_extreme_logits(kernel_device):
    logits = torch.full((4, 5000), -1e4, device=kernel_device)
    logits[0, 4500] = 1e4  # the peak comes in the second block
    logits[1] = 3e4  # all alike
    logits[2, 1:] = -float("inf")  # one entry left of a masked vocabulary
    logits[3, :4200] = -float("inf")  # a first block with nothing in it
    labels = torch.tensor([4500, 17, 0, 4999], device=kernel_device)
    kernel = selective_log_softmax(logits, labels)
    reference = selective_log_softmax_reference(logits.double(), labels)
    for ours, theirs in zip(kernel, reference, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-6)


def test_label_outside_of_the_vocabulary_is_nan(kernel_device):
    logits, _ = case(4, 10, torch.float32, kernel_device)
    logprob, entropy, _ = selective_log_softmax(logits, torch.tensor([0, 10, -1, 4096], device=kernel_device))
    assert logprob.isnan().tolist() == [False, True, True, True]
    assert entropy.isfinite().all()


def test_ignored_row_may_hold_nan(kernel_device):
    logits, labels = case(4, 10, torch.float32, kernel_device)
    logits[2] = float("nan")
    for values in (*selective_log_softmax(logits, labels, 1.0, logits), logits):
        assert values.isfinite().all()


def test_no_rows(kernel_device):
    logits = torch.zeros(0, 7, device=kernel_device)
    labels = torch.zeros(0, dtype=torch.long, device=kernel_device)
    assert [x.shape for x in selective_log_softmax(logits, labels, 1.0, logits)] == [(0,)] * 3


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_selective_logprobs_by_kernel(kernel_device, softcap):
    """The frozen-head route with impl="triton" equals impl="torch", gradient included."""
    from slothrl.logprobs import HeadSpec, selective_logprobs

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(101, 16, generator=generator).to(kernel_device)
    labels = torch.randint(101, (9,), generator=generator).to(kernel_device)
    labels[4] = -100
    head = HeadSpec(weight, scale=0.5, softcap=softcap)
    results = []
    for impl in ("triton", "torch"):
        hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).to(kernel_device).requires_grad_()
        logprobs, entropy = selective_logprobs(hidden, labels, head, 0.8, 4, impl=impl)
        (logprobs * torch.arange(9.0, device=kernel_device)).sum().backward()
        results.append((logprobs, entropy, hidden.grad))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_reference_is_torch(dtype):
    logits, labels = case(6, 100, dtype)
    probs = torch.full_like(logits, float("nan"))
    logprob, entropy, lse = selective_log_softmax_reference(logits, labels, 0.8, probs)
    x = (logits.double() if dtype == torch.float64 else logits.float()) * 0.8
    log_probs = F.log_softmax(x, dim=-1)
    kept = labels != -100
    torch.testing.assert_close(logprob[kept], log_probs[kept].gather(1, labels[kept, None]).squeeze(1))
    torch.testing.assert_close(entropy[kept], torch.distributions.Categorical(logits=x[kept]).entropy())
    torch.testing.assert_close(lse[kept], x[kept].logsumexp(-1))
    torch.testing.assert_close(probs[kept], x[kept].softmax(-1).to(dtype))
    for ignored in (logprob, entropy, lse, probs):
        assert (ignored[~kept] == 0).all()


def test_reference_is_differentiable():
    logits, labels = case(4, 7, torch.float64)
    logits[-1] /= 10  # the certain row is flat to the limit of finite differences

    def outputs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return selective_log_softmax_reference(x, labels, 0.7)

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(),))


@pytest.mark.parametrize("function", [selective_log_softmax, selective_log_softmax_reference])
def test_refuses(function):
    if not HAS_TRITON and function is selective_log_softmax:
        pytest.skip("no Triton")
    logits, labels = case(4, 10, torch.float32)
    wrong = [
        (logits[0], labels[:1]),
        (logits.long(), labels),
        (logits, labels[:2]),
        (logits, labels.int()),
        (logits, labels, 1.0, logits.bfloat16()),
        (logits, labels, 1.0, logits[:, :5]),
        (logits.t().contiguous().t(), labels),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError):
            function(*arguments)
    hits = torch.ones(8, dtype=torch.bool)
    for top1 in (hits[::2], hits[:3], hits[:4].int(), hits[:4].to("meta")):  # a kernel would write past what it is
        with pytest.raises(ValueError, match="top1_out"):
            function(logits, labels, top1_out=top1)
    assert hits.all()


def test_package_imports_without_triton():
    program = (
        "import sys; sys.path[:] = " + repr(sys.path) + "\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, slothrl_kernels as k\n"
        "assert not k.HAS_TRITON\n"
        "x, y = torch.zeros(2, 3), torch.tensor([0, -100])\n"
        "assert k.selective_log_softmax_reference(x, y)[0][1] == 0\n"
        "try: k.selective_log_softmax(x, y)\n"
        "except RuntimeError as e: print(e)\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.returncode == 0 and "needs Triton" in child.stdout, child.stderr
