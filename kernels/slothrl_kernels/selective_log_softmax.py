"""Log-probability of one label a row, entropy and log-normalizer, and the probabilities on request.

With x = logits * scale * inv_temperature, N rows over a vocabulary of V:

    lse = log sum_v exp(x_v)      logprob = x_label - lse      entropy = lse - sum_v p_v x_v,  p = softmax(x)

With a softcap c (Gemma 2, arXiv:2408.00118, section 2) x = c tanh(logits * scale / c) * inv_temperature, and

    d logprob / d (logits * scale * inv_temperature) = (onehot - p) (1 - tanh^2)

whose second part, p (1 - tanh^2), takes the place of the probabilities.

The kernel is one pass over a row (two with probabilities): the online softmax of Milakov and Gimelshein
(arXiv:1805.02867) with a third running sum for the entropy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

IGNORE_LABEL = -100  # torch's ignore_index
MAX_BLOCK = 4096  # vocabulary entries a program holds at once: 16 a thread with 8 warps


def selective_log_softmax_reference(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float = 1.0,
    probs_out: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    top1_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain-torch truth of `selective_log_softmax`; differentiable as long as `probs_out` is not given.

    Args, returns: as `selective_log_softmax`; float64 logits are worked on, and returned, in float64.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: a label outside of the vocabulary (IndexError or a device assert, as torch.gather has it).
    """
    _check(logits, labels, probs_out, softcap, top1_out)
    x = (logits if logits.dtype == torch.float64 else logits.float()) * scale  # (N, V)
    bent = None if softcap is None else torch.tanh(x / softcap)
    x = (x if bent is None or softcap is None else bent * softcap) * inv_temperature
    ignored = labels == IGNORE_LABEL  # (N,)
    lse = x.logsumexp(-1)  # (N,)
    log_probs = x - lse[:, None]  # (N, V)
    probs = log_probs.exp()
    chosen = log_probs.gather(1, labels.masked_fill(ignored, 0)[:, None]).squeeze(1)
    # A logit of -inf has p = 0 and no part in the entropy; unclamped it would be 0 * -inf.
    entropy = -(probs * log_probs.clamp_min(torch.finfo(x.dtype).min)).sum(-1)
    if top1_out is not None:
        top1_out.copy_(x.argmax(-1) == labels)  # the first of equals
    if probs_out is not None:
        probs = probs if bent is None else probs * (1 - bent.square())
        probs_out.copy_(probs.masked_fill(ignored[:, None], 0.0))
    return chosen.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0)


def selective_log_softmax(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float = 1.0,
    probs_out: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    top1_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one Triton kernel; nothing of size (N, V) is allocated, and there is no autograd.

    Args:
        logits: (N, V) float32, bfloat16 or float16, any V, unit stride within a row.
        labels: (N,) int64; -100 leaves a row out.
        inv_temperature: 1 / temperature, positive.
        probs_out: (N, V) of the logits' dtype, receives softmax(x), 0 in the rows left out; may be `logits` itself.
            With a softcap softmax(x) (1 - tanh^2), which the gradient takes.
        softcap: positive bound of the scaled logits, or None.
        scale: the model's own factor on the logits, before the softcap.
        top1_out: (N,) bool, contiguous, receives whether the label's logit is the largest of its row, the first one of
            equals; False in the rows left out.

    Returns:
        logprob (N,), entropy (N,), lse (N,): float32, nats; 0 in the rows left out. A label outside of the vocabulary
        that is not -100 gives a NaN logprob, since a device kernel cannot raise.

    Raises:
        ValueError: shapes, strides or dtypes that do not fit.
        RuntimeError: Triton is not installed.
    """
    if not HAS_TRITON:
        raise RuntimeError("selective_log_softmax needs Triton; selective_log_softmax_reference does not")
    _check(logits, labels, probs_out, softcap, top1_out)
    if logits.dtype == torch.float64:
        raise ValueError("the kernel works in float32: float64 logits need selective_log_softmax_reference")
    rows, vocab = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return out[0], out[1], out[2]
    block = min(triton.next_power_of_2(vocab), MAX_BLOCK)
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not on the tensor's
        _selective_log_softmax_kernel[(rows,)](
            logits,
            labels.contiguous(),
            out,
            logits if probs_out is None else probs_out,
            out if top1_out is None else top1_out.view(torch.int8),
            logits.stride(0),
            logits.stride(0) if probs_out is None else probs_out.stride(0),
            rows,
            vocab,
            float(inv_temperature * scale if softcap is None else scale / softcap),
            float(1.0 if softcap is None else softcap * inv_temperature),
            SOFTCAP=softcap is not None,
            IGNORE=IGNORE_LABEL,
            WRITE_PROBS=probs_out is not None,
            WRITE_TOP1=top1_out is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )
    return out[0], out[1], out[2]


def _check(
    logits: Tensor, labels: Tensor, probs_out: Tensor | None, softcap: float | None, top1_out: Tensor | None
) -> None:
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be (N, V) floats, not {tuple(logits.shape)} {logits.dtype}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or labels.device != logits.device:
        found = f"{tuple(labels.shape)} {labels.dtype} on {labels.device}"
        raise ValueError(f"labels must be ({logits.size(0)},) int64 on {logits.device}, not {found}")
    if probs_out is not None and (probs_out.shape, probs_out.dtype) != (logits.shape, logits.dtype):
        raise ValueError(f"probs_out must match the logits: {tuple(logits.shape)} {logits.dtype}")
    if top1_out is not None:
        found = (top1_out.shape, top1_out.dtype, top1_out.device)
        if found != (labels.shape, torch.bool, logits.device) or not top1_out.is_contiguous():
            raise ValueError(f"top1_out must be ({labels.size(0)},) contiguous bool on {logits.device}, not {found}")
    if any(t.size(0) and t.stride(1) != 1 for t in (logits, probs_out) if t is not None and t.size(1) > 1):
        raise ValueError("logits and probs_out need unit stride within a row")


@jit
def _load_scaled(logits, column, vocab, inner, outer, SOFTCAP: tl.constexpr):
    """x in float32 at these columns of a row; -inf beyond the vocabulary, which adds nothing to any sum."""
    x = tl.load(logits + column, mask=column < vocab, other=-float("inf")).to(tl.float32) * inner
    if SOFTCAP:
        x = tl.where(column < vocab, _tanh(x) * outer, -float("inf"))
    return x


@jit
def _tanh(x):
    small = tl.exp(-2.0 * tl.abs(x))  # no overflow
    bent = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -bent, bent)


@jit
def _write_probs(
    probs, logits, columns, vocab, inner, outer, peak, total, kept, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    for start in range(0, vocab, BLOCK):
        column = start + columns
        x = _load_scaled(logits, column, vocab, inner, outer, SOFTCAP)
        p = tl.exp(x - peak) / total
        if SOFTCAP:
            bent = x / outer
            p = tl.where(column < vocab, p * (1.0 - bent * bent), 0.0)
        tl.store(probs + column, tl.where(kept, p, 0.0).to(probs.dtype.element_ty), mask=column < vocab)


@jit
def _selective_log_softmax_kernel(
    logits,
    labels,
    out,
    probs,
    top1,
    logits_stride,
    probs_stride,
    rows,
    vocab,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    IGNORE: tl.constexpr,
    WRITE_PROBS: tl.constexpr,
    WRITE_TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows * vocab passes 2**31
    logits += row * logits_stride
    probs += row * probs_stride
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)

    peak = tl.full((), -1.0e30, tl.float32)  # finite, so that peak - new_peak is never inf - inf
    total = tl.full((), 0.0, tl.float32)  # sum of exp(x - peak)
    weighted = tl.full((), 0.0, tl.float32)  # sum of exp(x - peak) * (x - peak)
    # Before anything is written: probs may overwrite logits below. One register, where a sum over blocks took sixteen.
    inside = (label >= 0) & (label < vocab)
    chosen = _load_scaled(logits, tl.where(inside, label, 0), vocab, inner, outer, SOFTCAP)  # x at the label's column
    chosen = tl.where(inside, chosen, 0.0)  # and no fused multiply-add with -peak, which is 0 at the peak itself
    ahead = tl.full((BLOCK,), -float("inf"), tl.float32)  # the largest x before the label's column
    for start in range(0, vocab, BLOCK):
        column = start + columns
        x = _load_scaled(logits, column, vocab, inner, outer, SOFTCAP)
        if WRITE_TOP1:
            ahead = tl.maximum(ahead, tl.where(column < label, x, -float("inf")))
        new_peak = tl.maximum(peak, tl.max(x, 0))
        shrink = tl.exp(peak - new_peak)
        shifted = x - new_peak
        weight = tl.exp(shifted)
        # Moving the peak by d turns e * z into shrink * e * (z + d): hence the term in total.
        weighted = shrink * (weighted + (peak - new_peak) * total)
        weighted += tl.sum(tl.where(weight > 0, weight * shifted, 0.0), 0)
        total = shrink * total + tl.sum(weight, 0)
        peak = new_peak

    log_total = tl.log(total)
    kept = label != IGNORE
    logprob = tl.where(inside, chosen - peak - log_total, float("nan"))
    tl.store(out + row, tl.where(kept, logprob, 0.0))
    tl.store(out + rows + row, tl.where(kept, log_total - weighted / total, 0.0))
    tl.store(out + 2 * rows + row, tl.where(kept, peak + log_total, 0.0))

    if WRITE_TOP1:
        first = kept & inside & (chosen >= peak) & (chosen > tl.max(ahead, 0))
        tl.store(top1 + row, first.to(tl.int8))

    if WRITE_PROBS:
        _write_probs(probs, logits, columns, vocab, inner, outer, peak, total, kept, SOFTCAP, BLOCK)
