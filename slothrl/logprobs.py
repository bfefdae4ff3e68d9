"""Log-probabilities and entropies from hidden states, in chunks: logits of [tokens, vocabulary] never exist at once.

N: tokens, h: hidden size, V: vocabulary, B: sequences, S: prompt + completion positions, T: completion positions.

With a frozen head (LoRA's usual case) the gradient needs no logits either. For one token with label y and p the softmax
of its logits, d logprob / d hidden = (scale / temperature) * (W[y] - p @ W): a vector of size h, made in the forward
while the chunk's probabilities are at hand, and kept in place of them. Under a softcap each row of W comes with the
slope of its logit's cap, 1 - tanh^2. The backward is then one multiplication, and the
head costs 4hV FLOPs a token in all (logits, and p @ W) instead of the 6hV of recomputing the logits in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import slothrl_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from slothrl.token_bytes import logit_rows

Impl = Literal["auto", "triton", "torch"]
IGNORE_LABEL = kernels.IGNORE_LABEL


@dataclass(frozen=True)
class HeadSpec:
    """How a model turns hidden states into logits: softcap * tanh(scale * (h @ W.T + bias) / softcap).

    Args:
        weight: (V, h) float.
        bias: (V,) float, or None.
        scale: the model's own factor on the logits, before softcap and temperature.
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118, section 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def trainable(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


# Each architecture has its own name for the same thing: text-config fields that multiply the logits, and that cap them.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_spec(model: nn.Module) -> HeadSpec:
    """The output head of a transformers causal language model, PEFT-wrapped or not. The weight is not copied.

    Raises:
        ValueError: no head, one that an adapter wraps (its weight alone is not the head), or packed weights.
    """
    base = _base_model(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings: it is no causal language model")
    if hasattr(head, "base_layer"):
        raise ValueError("the output head is wrapped by an adapter: leave lm_head out of target_modules")
    if not head.weight.is_floating_point():
        raise ValueError(f"the output head holds packed {head.weight.dtype} weights: leave lm_head unquantized")
    config = base.config.get_text_config()
    softcaps = [cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None]
    return HeadSpec(head.weight, getattr(head, "bias", None), _logit_scale(config), softcaps[0] if softcaps else None)


def _logit_scale(config: Any) -> float:
    for name in _MULTIPLIERS:  # Cohere, Muse Glimmer, Falcon-H1
        # None is how a config says "not scaled" (MPT).
        if (scale := getattr(config, name, None)) is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # One name, two meanings: Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling


def selective_logprobs(
    hidden: Tensor,
    labels: Tensor,
    head: HeadSpec,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = True,
    entropy_grad: bool = False,
    impl: Impl = "auto",
    top1_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(label | hidden) for each token, and the entropy of its distribution, `chunk_size` tokens at a time.

    A frozen head takes the route described at the top of this file. With a trainable head or `entropy_grad` the chunks
    are checkpointed and autograd runs through plain torch: 8hV FLOPs a token or more.

    Args:
        hidden: (N, h) float; the matmul runs in the head's dtype and everything after it in float32.
        labels: (N,) int64; -100 gives logprob 0, entropy 0 and no gradient.
        head: as `head_spec` reads it off a model.
        temperature: divides the logits; entropy and logprob are of the distribution so sharpened or flattened.
        chunk_size: tokens whose logits exist at once; changes memory and speed, and results by rounding only. None: 512
            to 1,024, by the vocabulary (`slothrl.token_bytes.logit_rows`).
        with_entropy: return entropies too.
        entropy_grad: let gradients flow through the entropies; without it they are constants.
        impl: "triton" or "torch" for the softmax over a chunk; "auto": triton where the tensors are on CUDA and Triton
            is installed. The checkpointed route is always torch.
        top1_out: (N,) bool on the head's device, receives whether a label is the likeliest token, the first one of
            equals; False where it is -100. From the chunks at hand, on the frozen route alone.

    Returns:
        logprobs (N,), entropy (N,) or None: float32, in nats (float64 for a float64 head).

    Raises:
        ValueError: temperature or chunk_size not positive, an unknown impl, or impl="triton" or a `top1_out` on the
            other route.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    if chunk_size is None:
        chunk_size = logit_rows(head.weight.size(0), head.weight.element_size())
    if temperature <= 0 or chunk_size < 1:
        raise ValueError(f"temperature ({temperature}) and chunk_size ({chunk_size}) must be positive")
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl {impl!r} is not one of auto, triton, torch")
    hidden, labels = hidden.to(head.weight.device), labels.to(head.weight.device)
    # Autocast would redo the choice of dtype that the docstring promises.
    with torch.autocast(hidden.device.type, enabled=False):
        if head.trainable or entropy_grad:
            if impl == "triton" or top1_out is not None:
                raise ValueError("impl='triton' and top1_out need a frozen head and no entropy_grad")
            logprobs, entropy = _checkpointed(hidden, labels, head, temperature, chunk_size)
            entropy = entropy if entropy_grad else entropy.detach()
        else:
            softmax = _softmax_over_chunk(hidden, impl)
            logprobs, entropy = _FrozenHead.apply(  # pyright: ignore[reportGeneralTypeIssues]
                hidden, labels, head, 1 / temperature, chunk_size, softmax, torch.is_grad_enabled(), top1_out
            )
    return logprobs, entropy if with_entropy else None


def _softmax_over_chunk(hidden: Tensor, impl: Impl) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if impl == "triton" or (impl == "auto" and hidden.is_cuda and kernels.HAS_TRITON):
        return kernels.selective_log_softmax
    return kernels.selective_log_softmax_reference


class _FrozenHead(torch.autograd.Function):
    """(N, h) hidden -> (N,) logprobs, (N,) entropy without gradient; saves d logprob / d hidden and nothing else."""

    @staticmethod
    def forward(ctx, hidden, labels, head, inv_temperature, chunk_size, softmax, grad_enabled, top1):
        slope = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None  # (N, h)
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        logprobs, entropy = hidden.new_empty(2, hidden.size(0), dtype=dtype).unbind()
        for start in range(0, hidden.size(0), chunk_size):
            rows = slice(start, start + chunk_size)
            logits = F.linear(hidden[rows].to(head.weight.dtype), head.weight, head.bias)  # (C, V)
            # The probabilities replace the logits in their own memory.
            into = None if slope is None else logits
            hits = None if top1 is None else top1[rows]
            logprobs[rows], entropy[rows], lse = softmax(
                logits, labels[rows], inv_temperature, into, head.softcap, head.scale, hits
            )
            if slope is not None:
                slope[rows] = _slope(logits, labels[rows], logprobs[rows], lse, head, inv_temperature)
            del logits, into  # before the next ones are made: a chunk of 128K entries is a quarter of a GiB
        ctx.save_for_backward(slope)
        # clone: two outputs that share a buffer could not be changed in place.
        entropy = entropy.clone()
        ctx.mark_non_differentiable(entropy)
        return logprobs.clone(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, _):
        (slope,) = ctx.saved_tensors
        # out=: the product is rounded to the hidden dtype once, without a float32 copy of (N, h).
        grad = torch.mul(slope, grad_logprobs[:, None], out=torch.empty_like(slope))
        return grad, None, None, None, None, None, None, None


def _slope(
    probs: Tensor, labels: Tensor, logprobs: Tensor, lse: Tensor, head: HeadSpec, inv_temperature: float
) -> Tensor:
    """(C, h): d logprob / d hidden = scale * inv_temperature * ((onehot - p) * (1 - tanh^2)) @ W, the tanh under a
    softcap alone. Overwrites the (C, V) probs, which have that factor already."""
    column = labels.clamp_min(0)[:, None]
    # p - 1 at the label, by expm1 and before rounding: 1 - p in bfloat16 would be 0 or 0.004 for any confident token.
    # The rows left out hold zeros, and keep them.
    chosen = logprobs.expm1()
    if head.softcap is not None:
        bent = (logprobs + lse) / (head.softcap * inv_temperature)  # the label's logit over its bound
        chosen = chosen * (1 - bent.square())
    probs.scatter_(1, column, chosen.to(probs.dtype)[:, None])
    # alpha inside the product: one rounding, from the float32 accumulator.
    return torch.addmm(probs.new_zeros(()), probs, head.weight, beta=0, alpha=-head.scale * inv_temperature)


def _checkpointed(
    hidden: Tensor, labels: Tensor, head: HeadSpec, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """(N,) logprobs, (N,) entropy; both with gradient to hidden, weight and bias."""
    chunks = []
    for start in range(0, max(hidden.size(0), 1), chunk_size):  # one empty chunk for no tokens
        rows = slice(start, start + chunk_size)
        arguments = (hidden[rows], head.weight, head.bias, labels[rows], head.scale, head.softcap, temperature)
        chunks.append(checkpoint(_plain_chunk, *arguments, use_reentrant=False))
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _plain_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden.to(weight.dtype), weight, bias)  # (C, V)
    capped = {"softcap": softcap, "scale": scale}
    logprobs, entropy, _ = kernels.selective_log_softmax_reference(logits, labels, 1.0 / temperature, **capped)
    return logprobs, entropy


def completion_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_len: int,
    temperature: float = 1.0,
    with_entropy: bool = True,
    entropy_grad: bool = False,
    chunk_size: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies of the last `completion_len` tokens under a causal language model.

    The decoder is called directly, so a wrapper around `model.forward` (accelerate's autocast) does not apply; the
    caller enters autocast where it is wanted. Adapters apply; `disable_adapter()` around the call turns them off.

    Args:
        model: a transformers causal LM, or one that PEFT wraps (injected adapters; no prompt learning).
        input_ids: (B, S) int64, prompt and completion.
        attention_mask: (B, S), 1 on real tokens; padding may be on either side.
        completion_len: T, under S.
        temperature, with_entropy, entropy_grad, chunk_size, impl: as in `selective_logprobs`.

    Returns:
        logprobs (B, T), entropy (B, T) or None: float32, nats; 0 where the token is padding.

    Raises:
        ValueError: completion_len not in 1..S-1, or a head that `head_spec` refuses, or PEFT prompt learning.
    """
    length = input_ids.size(1)
    if not 0 < completion_len < length:
        raise ValueError(f"completion_len {completion_len} leaves no prompt or no completion of {length} tokens")
    base, head = _base_model(model), head_spec(model)
    backbone = getattr(base, base.base_model_prefix)
    output = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    # Position t - 1 predicts token t: (B, S, h) -> (B, T, h).
    states = output.last_hidden_state[:, length - completion_len - 1 : length - 1]
    kept = attention_mask[:, length - completion_len :] == 1  # (B, T)
    labels = input_ids[:, length - completion_len :][kept]  # (N,)
    logprobs, entropy = selective_logprobs(
        states[kept.to(states.device)], labels, head, temperature, chunk_size, with_entropy, entropy_grad, impl
    )
    return _scatter(logprobs, kept), None if entropy is None else _scatter(entropy, kept)


def _scatter(values: Tensor, kept: Tensor) -> Tensor:
    """(N,) values -> (B, T), 0 elsewhere; connected to the model even when N is 0, so that backward() still runs."""
    return values.new_zeros(kept.shape).masked_scatter(kept.to(values.device), values)


def _base_model(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper; adapters live in its layers and stay active."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("PEFT prompt learning adds virtual tokens in its own forward, which is not called here")
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
