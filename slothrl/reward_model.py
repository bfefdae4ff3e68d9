"""A reward model of transformers as a reward function: reward=reward_model reward.params.reward_model.model=…

It shares the device with the trainer, so it stays in the trainer's process; torch is imported at the first call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from slothrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def reward_model(
    prompts: list[Any],
    completions: list[Any],
    model: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    max_length: int | None = None,
    label: int = 0,
    sigmoid: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """Score completions with a sequence-classification model (`AutoModelForSequenceClassification`).

    Prompt and completion become one conversation under the model's own chat template; without a template, their texts
    are joined by a line break. What is too long loses its beginning, so that the end of the completion stays. The model
    is loaded at the first call and kept; of two that take turns both are kept.

    Args:
        prompts: strings or chat messages.
        completions: strings or chat messages.
        model: hub name or folder; safetensors only, and no code from the hub.
        revision: of a hub model.
        device: "auto" (cuda where there is one), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float32 on a CPU), or one of float32, bfloat16, float16.
        batch_size: sequences a forward pass.
        max_length: tokens; default: the model's context.
        label: which logit is the reward, for models with several.
        sigmoid: squash the logit into (0, 1).

    Returns:
        One logit each, any real number; in (0, 1) with `sigmoid`. None where the model gives NaN or infinity.

    Raises:
        UserError: no `model`, it cannot be loaded, has no such label, or a parameter makes no sense.
    """
    if not model:
        raise UserError("reward_model has no model: give one with reward.params.reward_model.model=owner/name")
    if dtype not in _DTYPES or batch_size < 1 or (max_length is not None and max_length < 1):
        raise UserError(f"reward_model needs dtype as one of {', '.join(_DTYPES)}, batch_size and max_length >= 1")
    network, tokenizer = _load(str(model), revision, str(device), str(dtype))
    if not 0 <= label < int(network.config.num_labels or 0):
        raise UserError(f"reward_model: label={label}, but {model} has {network.config.num_labels}")
    texts = [_text(tokenizer, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    scores: list[float | None] = []
    for start in range(0, len(texts), batch_size):
        scores += _logits(network, tokenizer, texts[start : start + batch_size], max_length, label, sigmoid)
    return scores


# Read by slothrl's reward workers: a worker process has no GPU.
setattr(reward_model, "needs_main_process", True)  # noqa: B010 - plain assignment is a type error


@lru_cache(maxsize=2)
def _load(name: str, revision: str | None, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        network, report = AutoModelForSequenceClassification.from_pretrained(
            name, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
        network = network.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"reward.params.reward_model.model={name} cannot be loaded: {reason}") from error
    if missing := [key for key in report["missing_keys"] if key.startswith(("score.", "classifier."))]:
        # A language model without a head loads too, with a random one.
        raise UserError(f"reward.params.reward_model.model={name} is no reward model: it has no {', '.join(missing)}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The head reads the last token that is no padding, and knows it by this id.
    network.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"
    return network.requires_grad_(False), tokenizer


def _text(tokenizer: Any, prompt: Any, completion: Any) -> str:
    if not tokenizer.chat_template:
        return "\n".join((_plain(prompt), _plain(completion)))
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return tokenizer.apply_chat_template([*before, *after], tokenize=False)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(str(message.get("content") or "") for message in value)


def _logits(
    network: Any, tokenizer: Any, texts: list[str], max_length: int | None, label: int, sigmoid: bool
) -> list[float | None]:
    import torch

    limit = max_length or getattr(network.config, "max_position_embeddings", None)
    # A chat template writes its own special tokens.
    options = {"add_special_tokens": not tokenizer.chat_template, "truncation": limit is not None}
    batch = tokenizer(texts, padding=True, padding_side="right", max_length=limit, return_tensors="pt", **options)
    with torch.inference_mode():
        logits = network(**batch.to(network.device)).logits[:, label].float()  # [batch]
    logits = torch.sigmoid(logits) if sigmoid else logits
    return [value if ok else None for value, ok in zip(logits.tolist(), torch.isfinite(logits).tolist(), strict=True)]
