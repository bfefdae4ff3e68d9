"""vLLM inside this process, generating with the trainer's LoRA."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from slothrl import vllm_compat, vllm_linear
from slothrl.engine import Engine, Rollout, Sampling, TokenIds, end_token_ids
from slothrl.errors import UserError
from slothrl.lora_slot import LoraShape, LoraSlot
from slothrl.streams import OwnStream
from slothrl.vllm_compilation import compilation, graph_sizes
from slothrl.vllm_described import described
from slothrl.vllm_linear import NF4, PLAIN
from slothrl.vllm_requests import Completed, complete, serve
from slothrl.vllm_scheduler import SHORT


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
        sleep: whether the KV cache can be freed while the trainer works (GPU only).
        kv_cache_dtype: "auto" (as `dtype`) or "fp8": half the memory and traffic, and approximate: what samples is then
            another policy than the trained one, by some hundredths of a nat, which the importance correction weighs.
        prefix_caching: a prompt's cache serves all completions of its group, and later turns.
        linear: whose linear layers run: "slothrl" (`slothrl.vllm_linear`), "vllm", or "auto": ours for an nf4 base and
            on a CPU, where vLLM's LoRA takes time in proportion to rank times tokens.
        view: with our layers over nf4, generate from a 16-bit view of the base with the LoRA folded in, made when the
            engine wakes and freed when it sleeps: faster for very many sequences, and approximate (one more rounding).
        early_launch: kernels that torch.compile makes start before the last one has ended (`vllm_compilation`).
        short_steps: vLLM's scheduler by way of `vllm_scheduler`: the same steps, planned in half of the host's time.
            Not measured on a GPU yet, so off.
    """

    path: str
    max_model_len: int
    max_num_seqs: int
    quantization: str | None = None
    dtype: str = "bfloat16"
    gpu_memory_utilization: float = 0.35
    kv_cache_gb: float | None = None
    enforce_eager: bool = False
    sleep: bool = True
    seed: int = 0
    revision: str | None = None
    linear: str = "auto"
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    view: bool = False
    early_launch: bool = False
    short_steps: bool = False


class VLLMEngine(Engine):
    """`vllm.LLM` with one adapter that mirrors the trained model's LoRA.

    vLLM starts with the engine and holds the base; `slothrl.shared_model.SharedModel` lays the trainer's model over it.
    `follow` then names the model whose LoRA is mirrored, and must come before anything is generated.

    Args:
        lora: the adapter's shape (`slothrl.lora_slot.lora_shape`).
    Raises:
        UserError: vLLM cannot serve this model or an adapter of this shape.
    """

    name = "vllm"

    def __init__(self, options: VLLMOptions, lora: LoraShape):
        vllm = vllm_compat.import_vllm()
        from vllm.lora.request import LoRARequest

        self.linear = linear_method(options)
        free = _free_bytes()
        self._stream = OwnStream()
        try:
            self.llm = vllm.LLM(**_arguments(options, lora, self.linear))
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            raise UserError(f"vLLM could not load {options.path}: {_first_line(error)}") from error
        finally:
            self._stream.started()
        vllm_compat.remember_config(self.llm)
        self.started_bytes = free - _free_bytes()  # what the driver says vLLM took, all together
        # The adapter will sit in vLLM's memory, so this path is never read. Our own layers need no request for it.
        self.request = None if self.linear else LoRARequest("slothrl", vllm_compat.ADAPTER_ID, "/in-memory")
        self.view, self.kv_cache_dtype = options.view and self.linear == NF4, options.kv_cache_dtype
        self._stale_view = self.view
        self.can_sleep = torch.cuda.is_available() and options.sleep
        self.asleep = False

    def follow(self, model, tokenizer) -> VLLMEngine:
        """Mirror the LoRA of a PEFT model whose base is the checkpoint that vLLM loaded; returns the engine.

        Raises:
            UserError: a projection has no counterpart in vLLM, or the adapter is of an unsupported kind.
        """
        self.eos_token_ids = end_token_ids(model, tokenizer)
        with self._stream():
            self.slot = LoraSlot(self.llm, model)
        self.push_lora()
        return self

    def describe(self) -> str:
        """Whose linear layers generate, and from what, in words."""
        return described(self.vllm_model, self.linear, self.view, self.kv_cache_dtype)

    @property
    def vllm_model(self) -> torch.nn.Module:
        """The module that vLLM runs, in this process: the base's owner."""
        return vllm_compat.model_of(self.llm)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Awake and on vLLM's stream."""
        self.wake()
        with self._stream():
            if self._stale_view:
                vllm_linear.fill_views(self.vllm_model)
                self._stale_view = False
            yield

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
        done: Completed = self._run(complete, prompt_ids, SamplingParams(**parameters))
        return Rollout(done.token_ids, done.logprobs, done.steps, done.preemptions)

    def _run(self, how: Callable[..., Any], prompt_ids: Sequence[TokenIds], parameters) -> Any:
        """how: `complete` or `serve`."""
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        with self._working():
            return how(self.llm, prompts, parameters, self.request)

    def push_lora(self) -> None:
        """Write the trainer's LoRA into vLLM's buffers and drop the prefix cache, whose keys do not know of it."""
        with self._stream():
            self.slot.push()
        self._stale_view = self.view
        # A stale prefix would answer for the old policy: measured 0.94 nat of error. Sleeping has emptied it already.
        if not self.asleep and not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a LoRA push (are requests still running?)")

    def sleep(self) -> None:
        if self.can_sleep and not self.asleep:
            with self._stream():
                vllm_compat.sleep(self.llm)
            # What vLLM cached on its stream is no use to the trainer's.
            torch.cuda.empty_cache()
            self.asleep, self._stale_view = True, self.view

    def wake(self) -> None:
        if self.asleep:
            torch.cuda.empty_cache()
            with self._stream():
                vllm_compat.wake(self.llm)
            self.asleep = False

    def logprobs(self, token_ids: Sequence[TokenIds]) -> list[torch.Tensor]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        outputs = self._run(serve, token_ids, parameters)
        return [
            torch.tensor([output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])
            for ids, output in zip(token_ids, outputs, strict=True)
        ]

    def holdings(self) -> dict[str, int]:
        cache = vllm_compat.kv_cache_bytes(self.llm)
        return {
            "KV cache": 0 if self.asleep else cache,
            "LoRA in vLLM": self._lora_bytes(),
            **({"16-bit view": 0 if self.asleep else vllm_linear.view_bytes(self.vllm_model)} if self.view else {}),
            "CUDA graphs": getattr(vllm_compat.worker_of(self.llm), "graph_bytes", 0),
        }

    def _lora_bytes(self) -> int:
        if not self.linear:
            return vllm_compat.lora_buffer_bytes(self.llm)
        loras = (getattr(module, "slothrl_lora", None) for module in self.vllm_model.modules())
        return sum(lora.a.nbytes + lora.b.nbytes for lora in loras if lora is not None)

    def close(self) -> None:
        self.wake()  # asleep, its memory could not be handed back
        with self._stream():
            vllm_compat.shut_down(self.llm)
        for name in ("slot", "llm"):
            if hasattr(self, name):
                delattr(self, name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def linear_method(options: VLLMOptions) -> str | None:
    """The quantisation method of ours that vLLM is to run with; None for vLLM's own layers."""
    nf4 = options.quantization == "bitsandbytes"
    stored = None if nf4 else checkpoint_quantization(options.path, options.revision)
    if stored is not None:
        nf4 = stored.get("quant_method") == "bitsandbytes" and stored.get("bnb_4bit_quant_type") == "nf4"
        if not nf4:
            return None  # vLLM knows more formats than we do
    if options.linear == "auto":
        return NF4 if nf4 else None if torch.cuda.is_available() else PLAIN
    return {"slothrl": NF4 if nf4 else PLAIN, "vllm": None}[options.linear]


def checkpoint_quantization(path: str, revision: str | None) -> dict[str, Any] | None:
    """What a checkpoint's config says of its quantisation; None where it is not quantised."""
    from transformers import AutoConfig

    stored = getattr(AutoConfig.from_pretrained(path, revision=revision), "quantization_config", None)
    return stored.to_dict() if hasattr(stored, "to_dict") else stored  # pyright: ignore


def _arguments(options: VLLMOptions, lora: LoraShape, linear: str | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    arguments: dict[str, Any] = {
        "model": options.path,
        "revision": options.revision,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": options.prefix_caching,
        "kv_cache_dtype": options.kv_cache_dtype,
        # Log-probs of the distribution that was sampled from: after temperature and the logit processors.
        "logprobs_mode": "processed_logprobs",
        "seed": options.seed,
        "disable_log_stats": True,
        "scheduler_cls": SHORT if options.short_steps else None,
    }
    if linear:
        vllm_linear.register()
        arguments["quantization"] = linear
        wanted = {"rank": lora.rank, "targets": list(lora.targets), "view": options.view}
        arguments["additional_config"] = {"slothrl": wanted}
        if linear == NF4:
            arguments["load_format"] = "bitsandbytes"
    else:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": vllm_compat.max_lora_rank(lora.rank)}
        arguments["lora_target_modules"] = list(lora.targets)
        if options.quantization:
            arguments["quantization"] = options.quantization
    if options.sleep:
        arguments.update(vllm_compat.sleep_arguments())
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
        if not options.enforce_eager:
            arguments["compilation_config"] = compilation(graph_sizes(options.max_num_seqs), options.early_launch)
    if options.kv_cache_gb is not None or not on_gpu:
        arguments["kv_cache_memory_bytes"] = int((options.kv_cache_gb or 1.0) * 2**30)
    return arguments


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
