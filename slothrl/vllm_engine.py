"""vLLM inside this process, generating with the trainer's LoRA."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slothrl.engine import Engine, Rollout, Sampling, TokenIds, end_token_ids
from slothrl.errors import UserError
from slothrl.vllm_compat import ADAPTER_ID, LoraSlot, import_vllm, lora_layers, max_lora_rank


@dataclass(frozen=True)
class VLLMOptions:
    """What vLLM is started with.

    Attributes:
        path: folder or hub name of the base model's checkpoint.
        max_model_len: tokens of prompt and completion together.
        max_num_seqs: completions generated side by side.
        quantization: "bitsandbytes" (nf4, quantised while loading) or None.
        dtype: "bfloat16", "float16" or "float32".
        gpu_memory_utilization: share of the GPU for weights and KV cache together.
        kv_cache_gb: KV cache in GiB; None: what `gpu_memory_utilization` leaves, 1 on a CPU.
    """

    path: str
    max_model_len: int
    max_num_seqs: int
    quantization: str | None = None
    dtype: str = "bfloat16"
    gpu_memory_utilization: float = 0.35
    kv_cache_gb: float | None = None
    enforce_eager: bool = False
    seed: int = 0
    revision: str | None = None


class VLLMEngine(Engine):
    """`vllm.LLM` with one adapter that mirrors the trained model's LoRA.

    Args:
        model: the PEFT model being trained; its base must come from the checkpoint that `options.path` names.
        tokenizer: gives the end tokens.
    Raises:
        UserError: vLLM cannot serve this model or this adapter.
    """

    name = "vllm"

    def __init__(self, model, tokenizer, options: VLLMOptions):
        vllm = import_vllm()
        from vllm.lora.request import LoRARequest

        self.eos_token_ids = end_token_ids(model, tokenizer)
        try:
            self.llm = vllm.LLM(**self._arguments(model, options))
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            raise UserError(f"vLLM could not load {options.path}: {_first_line(error)}") from error
        self.slot = LoraSlot(self.llm, model)
        # The adapter sits in vLLM's memory already, so this path is never read.
        self.request = LoRARequest("slothrl", ADAPTER_ID, "/in-memory")
        # vLLM may leave this thread on a stream of its own; bitsandbytes works on the default one.
        _synchronize()

    @staticmethod
    def _arguments(model, options: VLLMOptions) -> dict[str, Any]:
        rank = model.peft_config["default"].r
        targets = sorted({name.rsplit(".", 1)[-1] for name in lora_layers(model)})
        arguments: dict[str, Any] = {
            "model": options.path,
            "revision": options.revision,
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "enforce_eager": options.enforce_eager,
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": max_lora_rank(rank),
            "lora_target_modules": targets,
            "enable_prefix_caching": True,
            # Log-probs of the distribution that was sampled from: after temperature and the logit processors.
            "logprobs_mode": "processed_logprobs",
            "seed": options.seed,
            "disable_log_stats": True,
        }
        if options.quantization:
            arguments["quantization"] = options.quantization
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        if options.kv_cache_gb is not None or not on_gpu:
            arguments["kv_cache_memory_bytes"] = int((options.kv_cache_gb or 1.0) * 2**30)
        return arguments

    def generate(self, prompt_ids: Sequence[TokenIds], sampling: Sampling) -> Rollout:
        from vllm import SamplingParams

        parameters = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "logprobs": 0,  # the sampled token's only
            "detokenize": False,
            "stop_token_ids": self.eos_token_ids,
            **(sampling.extra or {}),
        }
        outputs = [output.outputs[0] for output in self._run(prompt_ids, SamplingParams(**parameters))]
        logprobs = [
            [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)] for out in outputs
        ]
        return Rollout([list(out.token_ids) for out in outputs], logprobs)

    def _run(self, prompt_ids: Sequence[TokenIds], parameters) -> list[Any]:
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        return self.llm.generate(prompts, parameters, use_tqdm=False, lora_request=self.request)

    def push_lora(self) -> None:
        """Write the trainer's LoRA into vLLM's buffers and drop the prefix cache, whose keys do not know of it."""
        _synchronize()
        self.slot.push()
        _synchronize()
        # A stale prefix would answer for the old policy: measured 0.94 nat of error.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a LoRA push (are requests still running?)")

    def logprobs(self, token_ids: Sequence[TokenIds]) -> list[torch.Tensor]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        outputs = self._run(token_ids, parameters)
        return [
            torch.tensor([output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])
            for ids, output in zip(token_ids, outputs, strict=True)
        ]

    def close(self) -> None:
        del self.slot
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
