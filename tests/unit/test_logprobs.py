"""Chunked log-probs against log_softmax over whole logits: values, gradients, kinds of heads, dtypes."""

import pytest
import torch
import torch.nn.functional as F

from slothrl.logprobs import HeadSpec, selective_logprobs
from slothrl.token_bytes import logit_rows

N, H, V = 23, 12, 37
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.5, "softcap": 5.0},
}


def tensors(dtype: torch.dtype = torch.float64, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (N, H) with gradient, labels (N,) of which three are -100, weight (V, H)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (spread * torch.randn(V, H, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(V, (N,), generator=generator)
    labels[[0, 7, N - 1]] = -100
    return hidden, labels, weight


def make_head(weight: torch.Tensor, bias: bool = False, **knobs) -> HeadSpec:
    return HeadSpec(weight, torch.linspace(-1, 1, V, dtype=weight.dtype) if bias else None, **knobs)


def truth(hidden, labels, head: HeadSpec, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, over the whole (N, V) logits."""
    logits = F.linear(hidden, head.weight, head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    kept = labels != -100
    chosen = log_probs.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return chosen * kept, -(log_probs.exp() * log_probs).sum(-1) * kept


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a sum with a different weight on each token, so that no row may stand for another."""
    return torch.autograd.grad((output * torch.linspace(-1, 2, N, dtype=output.dtype)).sum(), inputs)


@pytest.mark.parametrize("knobs", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_whole_logits(knobs, temperature, chunk_size, dtype):
    hidden, labels, weight = tensors(dtype)
    head = make_head(weight, **knobs)
    logprobs, entropy = selective_logprobs(hidden, labels, head, temperature, chunk_size)
    expected, expected_entropy = truth(hidden, labels, head, temperature)
    tolerance = {"atol": 1e-10, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(logprobs, expected, **tolerance)
    torch.testing.assert_close(entropy, expected_entropy, **tolerance)
    assert not entropy.requires_grad
    torch.testing.assert_close(gradients(logprobs, hidden), gradients(expected, hidden), **tolerance)


@pytest.mark.parametrize("knobs", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_trainable_head(knobs, chunk_size):
    hidden, labels, weight = tensors()
    head = make_head(weight.requires_grad_(), **knobs)
    logprobs, entropy = selective_logprobs(hidden, labels, head, 0.9, chunk_size)
    expected, _ = truth(hidden, labels, head, 0.9)
    assert not entropy.requires_grad
    torch.testing.assert_close(gradients(logprobs, hidden, weight), gradients(expected, hidden, weight))


@pytest.mark.parametrize("trainable", [False, True])
def test_entropy_gradient_on_request(trainable):
    hidden, labels, weight = tensors()
    head = make_head(weight.requires_grad_(trainable))
    logprobs, entropy = selective_logprobs(hidden, labels, head, 1.3, 7, entropy_grad=True)
    expected, expected_entropy = truth(hidden, labels, head, 1.3)
    torch.testing.assert_close(gradients(logprobs + entropy, hidden), gradients(expected + expected_entropy, hidden))


@pytest.mark.parametrize("knobs", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("grad", [False, True])
def test_whether_labels_are_the_likeliest_tokens(knobs, grad):
    """From the same chunks; a frozen head's values stay as they are."""
    hidden, labels, weight = tensors()
    head = make_head(weight, **knobs)
    likeliest = F.linear(hidden, weight, head.bias).argmax(-1)
    labels[3:15] = likeliest[3:15]
    labels[7] = -100
    hits = torch.ones(N, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        logprobs, entropy = selective_logprobs(hidden, labels, head, 0.7, 7, top1_out=hits)
        assert torch.equal(hits, likeliest == labels) and hits[3] and not hits[7]
        expected = selective_logprobs(hidden, labels, head, 0.7, 7)
    assert torch.equal(logprobs, expected[0]) and torch.equal(entropy, expected[1])
    with pytest.raises(ValueError, match="top1_out need"):
        selective_logprobs(hidden, labels, make_head(weight.requires_grad_()), top1_out=hits)


def test_ignored_labels_are_zero_and_without_gradient():
    hidden, labels, weight = tensors()
    for head in (make_head(weight), make_head(weight, softcap=4.0)):
        logprobs, entropy = selective_logprobs(hidden, labels, head, chunk_size=5)
        (gradient,) = gradients(logprobs, hidden)
        ignored = labels == -100
        assert (logprobs[ignored] == 0).all() and (entropy[ignored] == 0).all() and (gradient[ignored] == 0).all()
        assert (gradient[~ignored] != 0).any(-1).all()


def test_garbage_in_ignored_rows_stays_there():
    hidden, labels, weight = tensors()
    expected, _ = selective_logprobs(hidden, labels, make_head(weight))
    dirty = hidden.detach().clone()
    dirty[labels == -100] = float("nan")
    logprobs, entropy = selective_logprobs(dirty, labels, make_head(weight))
    torch.testing.assert_close(logprobs, expected, atol=0, rtol=0)
    assert entropy.isfinite().all()


def test_confident_tokens_keep_their_gradient_in_bfloat16():
    # 1 - p is 1e-3 here: a bfloat16 p would round it to 0 or 4e-3, an error of 100%.
    weight = torch.eye(4, dtype=torch.bfloat16)
    hidden = torch.tensor([[8.0, 0, 0, 0]], dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = selective_logprobs(hidden, torch.tensor([0]), HeadSpec(weight))
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    exact = -(hidden.double().softmax(-1) - torch.eye(4, dtype=torch.float64)[:1])
    torch.testing.assert_close(gradient.double(), exact.detach(), atol=0, rtol=1e-2)


def test_bfloat16_error_is_that_of_bfloat16_autograd():
    hidden, labels, weight = tensors(torch.bfloat16, spread=1.0)
    logprobs, _ = selective_logprobs(hidden, labels, HeadSpec(weight))
    (gradient,) = gradients(logprobs, hidden)
    assert logprobs.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    exact = truth(hidden.double(), labels, HeadSpec(weight.double()), 1.0)[0]
    (exact_gradient,) = gradients(exact, hidden)
    log_probs = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    plain = log_probs.gather(1, labels.clamp(min=0)[:, None]).squeeze(1) * (labels != -100)
    (plain_gradient,) = gradients(plain, hidden)

    def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
        return (ours.double() - exact.double()).abs().max().item()

    assert error(logprobs, exact) <= error(plain, exact) + 1e-6
    assert error(gradient, exact_gradient) <= 1.5 * error(plain_gradient, exact_gradient)


def test_head_in_another_dtype_than_hidden():
    hidden, labels, weight = tensors(torch.float32, spread=0.5)
    logprobs, _ = selective_logprobs(hidden, labels, HeadSpec(weight.bfloat16()))
    (gradient,) = gradients(logprobs, hidden)
    assert logprobs.dtype == torch.float32 and gradient.dtype == torch.float32
    torch.testing.assert_close(logprobs, truth(hidden, labels, HeadSpec(weight), 1.0)[0], atol=0.1, rtol=0)


def test_autocast_changes_nothing():
    hidden, labels, weight = tensors(torch.float32)
    expected, _ = selective_logprobs(hidden, labels, HeadSpec(weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = selective_logprobs(hidden, labels, HeadSpec(weight))
    torch.testing.assert_close(logprobs, expected, atol=0, rtol=0)


def test_backward_twice_and_no_grad():
    hidden, labels, weight = tensors()
    logprobs, _ = selective_logprobs(hidden, labels, HeadSpec(weight))
    first = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), hidden), first)
    with torch.no_grad():
        again, entropy = selective_logprobs(hidden, labels, HeadSpec(weight), with_entropy=False)
    assert entropy is None and not again.requires_grad
    torch.testing.assert_close(again, logprobs)


@pytest.mark.parametrize("trainable", [False, True])
def test_no_tokens(trainable):
    hidden = torch.zeros(0, H, requires_grad=True)
    head = HeadSpec(torch.zeros(V, H, requires_grad=trainable))
    logprobs, entropy = selective_logprobs(hidden, torch.zeros(0, dtype=torch.long), head)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.shape == (0, H)


def test_refuses():
    hidden, labels, weight = tensors()
    for wrong in ({"temperature": 0.0}, {"chunk_size": 0}, {"impl": "cuda"}):
        with pytest.raises(ValueError):
            selective_logprobs(hidden, labels, HeadSpec(weight), **wrong)
    with pytest.raises(ValueError, match="entropy_grad"):
        selective_logprobs(hidden, labels, HeadSpec(weight), impl="triton", entropy_grad=True)
    with pytest.raises(ValueError, match="softcap"):
        selective_logprobs(hidden, labels, HeadSpec(weight, softcap=0.0))


def test_a_frozen_head_under_a_softcap_keeps_no_logits():
    """Its gradient is made in the forward, a chunk at a time: autograd keeps (N, h) values and no (N, V)."""
    hidden, labels, weight = tensors()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        logprobs, _ = selective_logprobs(hidden, labels, make_head(weight, softcap=3.0), 0.7, 7)
    assert kept == [hidden.shape]
    expected, _ = truth(hidden, labels, make_head(weight, softcap=3.0), 0.7)
    torch.testing.assert_close(gradients(logprobs, hidden), gradients(expected, hidden), atol=1e-10, rtol=1e-10)


def test_how_many_logits_at_once():
    """224 MiB, or 512 tokens': with 8,192 tokens' slopes below 300 MiB for heads of 128K and 152K."""
    assert [logit_rows(v) for v in (32000, 49152, 128256, 151936, 256000)] == [1024, 1024, 768, 768, 512]
    assert logit_rows(49152, 4) == 1024 and logit_rows(128256, 4) == 512
    for vocabulary in (128256, 151936):  # of width 4,096
        assert 2 * (logit_rows(vocabulary) * vocabulary + 8192 * 4096 + 1024 * 4096) < 300 * 2**20
    head = HeadSpec(torch.randn(70, 8))
    hidden, labels = torch.randn(9, 8), torch.randint(70, (9,))
    chosen, given = (selective_logprobs(hidden, labels, head, chunk_size=size)[0] for size in (None, 1024))
    assert torch.equal(chosen, given)
