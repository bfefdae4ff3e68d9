"""What torch's varlen FlashAttention computes, in plain torch of any dtype: a CPU has no such op."""

import torch


def _sequences(part):
    a, b = part.cu_q.tolist(), part.cu_k.tolist()
    return [x for x in zip(a[:-1], a[1:], b[:-1], b[1:], strict=True) if x[2] < x[3]]


def _probabilities(q, k, part, lse=None):
    """P (H, n, m) and lse (H, n); with an lse given, exp(S - lse)."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) * part.scale
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    if part.causal:
        scores = scores.masked_fill(behind < 0, -torch.inf)
    if part.window is not None:
        scores = scores.masked_fill(behind >= part.window, -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse[:, :, None]).exp(), lse


def varlen_forward(q, k, v, part):
    out, lse = torch.zeros_like(q), q.new_full((q.size(1), q.size(0)), torch.inf)
    group = q.size(1) // k.size(1)
    for a, b, c, d in _sequences(part):
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        weights, lse[:, a:b] = _probabilities(q[a:b], keys, part)
        out[a:b] = torch.einsum("hnm,mhd->nhd", weights, values)
    return out, lse


def varlen_backward(dout, q, k, v, out, lse, part):
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    group, delta = q.size(1) // k.size(1), (dout * out).sum(-1).T
    for a, b, c, d in _sequences(part):
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        weights, _ = _probabilities(q[a:b], keys, part, lse[:, a:b])
        slopes = weights * (torch.einsum("nhd,mhd->hnm", dout[a:b], values) - delta[:, a:b, None]) * part.scale
        dq[a:b] = torch.einsum("hnm,mhd->nhd", slopes, keys)
        dk[c:d] = torch.einsum("hnm,nhd->mhd", slopes, q[a:b]).unflatten(1, (-1, group)).sum(2)
        dv[c:d] = torch.einsum("hnm,nhd->mhd", weights, dout[a:b]).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv
