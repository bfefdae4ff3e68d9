"""Log-probs, entropies and hits of a batch's own next tokens, over the frozen head of `slothrl.logprobs`: for SFT.

B: sequences, S: positions, h: hidden size, V: vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from slothrl.logprobs import IGNORE_LABEL, _base_model, _scatter, head_spec, selective_logprobs


@dataclass(frozen=True)
class LabelScores:
    """(B, S - 1), of each position's next token; 0 and False where its label is -100. TRL's names.

    Attributes:
        log_probs: float32, nats; differentiable.
        entropy: float32, nats, of the distribution the token is drawn from; a constant.
        is_top1: bool, whether the token is the likeliest one, the first of equals.
        label_mask: bool, whether the token counts.
    """

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor
    label_mask: Tensor


def label_scores(model: nn.Module, labels: Tensor, inputs: dict[str, Any]) -> LabelScores:
    """One forward of the decoder, and its head over the positions that count, a chunk of logits at a time.

    The decoder is called directly: adapters apply, a wrapper around `model.forward` (accelerate's autocast) does not,
    so the caller enters autocast where it is wanted.

    Args:
        model: one that `why_no_label_scores` has nothing against.
        labels: (B, S) int64; -100 where the token counts in no loss.
        inputs: what the model's own forward takes, labels aside: input ids or embeddings, mask, positions.
    """
    hidden = _base_model(model).base_model(**inputs).last_hidden_state[:, :-1]  # (B, S - 1, h)
    head = head_spec(model)
    labels = labels[:, 1:].to(head.weight.device)
    kept = labels != IGNORE_LABEL
    chosen = labels[kept]  # (N,)
    hits = torch.empty(chosen.shape, dtype=torch.bool, device=chosen.device)
    logprobs, entropy = selective_logprobs(hidden[kept.to(hidden.device)], chosen, head, top1_out=hits)
    assert entropy is not None
    return LabelScores(_scatter(logprobs, kept), _scatter(entropy, kept), _scatter(hits, kept), kept)


def why_no_label_scores(model: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """Why `label_scores` is not for this model, in words, or None.

    Args:
        dtype: autocast's, in which the head is to multiply; None without autocast.
    """
    if isinstance(model, PeftModel):
        config: Any = model.active_peft_config
        if config.peft_type != PeftType.LORA or getattr(config, "alora_invocation_tokens", None):
            return f"adapters of the kind {config.peft_type.value} may be applied by PEFT's own forward"
    try:
        head = head_spec(model)
    except (ValueError, AttributeError) as error:  # a head that PEFT wraps has no weight of its own
        return str(error)
    if head.trainable:
        return "the output head is trained"
    module = _base_model(model).get_output_embeddings()
    if not isinstance(module, nn.Linear):  # whose weight may not be all that it computes
        return f"the output head is a {type(module).__name__}, and no plain linear layer"
    if dtype not in (None, head.weight.dtype):
        return f"the output head is {str(head.weight.dtype)[6:]}, and {str(dtype)[6:]} is computed in"
    return None
