"""The schema of a run: typed dataclasses, registered with Hydra. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021), handed to `peft.LoraConfig` under PEFT's own names."""

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: Any = "all-linear"  # or a list of module names
    use_rslora: bool = False


@dataclass
class ModelConfig:
    name: str = MISSING  # a hub name, a local folder, or "smollm2" (the embedded default)
    revision: str | None = None
    quantization: str = "auto"  # auto, nf4, int8, none; auto: nf4 on CUDA, none on a CPU
    dtype: str = "auto"  # auto, bfloat16, float16, float32; auto: bfloat16 on CUDA, float32 on a CPU
    attn_implementation: str | None = None
    embeddings: str = "auto"  # where frozen token embeddings lie: auto (host from 256 MiB, not with vLLM), device, host
    fuse: str = "auto"  # fused layers (slothrl/fuse.py): auto (where Triton runs and it is no slower), on, off
    graphs: str = "auto"  # CUDA graphs of whole layers (slothrl/graphs.py): auto (where the GPU waits), on, off
    activations: str = "auto"  # what checkpointed layers keep: auto, layer, attention, all, offload, both
    activation_gib: float | None = None  # GiB that layers which keep everything may take beside that, or at most
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    source: str = MISSING  # arithmetic, countdown, gsm8k, reasoning_gym, file, hub
    path: str | None = (
        None  # source=file: .jsonl/.json/.parquet/.csv; source=gsm8k: folder with train.jsonl, test.jsonl
    )
    eval_path: str | None = None
    name: str | None = None  # source=hub: dataset name; source=reasoning_gym: task name
    subset: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    prompt_column: str = "prompt"
    answer_column: str | None = "answer"
    system: str | None = None  # system message put before every prompt that is a string
    template: str | None = None  # str.format template over the columns, makes the prompt: "{a} + {b}"
    format: str = "auto"  # auto, chat, plain; auto: chat where the tokenizer has a chat template
    train_size: int | None = None  # rows made (generated tasks) or kept at most
    eval_size: int = 64  # held-out rows
    max_prompt_length: int = 512  # tokens
    overlong: str = "drop"  # drop, truncate (from the left), error
    seed: int = 0  # of generated tasks and of the held-out split; not the run's seed
    task: dict[str, Any] = field(default_factory=dict)  # knobs of a generated task


@dataclass
class RewardConfig:
    functions: list[str] = field(default_factory=list)  # entry-point names, pkg.mod:fn, ./file.py:fn
    weights: list[float] | None = None  # one a function; default all 1.0
    params: dict[str, Any] = field(default_factory=dict)  # {function name: {keyword: value}}
    score: str | None = None  # the function that gives the held-out score; default: the first one
    score_samples: int = 0  # sampled completions a held-out prompt, before and after, for pass@k; 0: greedy only
    isolate: bool = True  # each function in worker processes of its own; false: in the trainer's process
    timeout: float = 30.0  # seconds a call may take; a worker that is late is killed
    memory_gb: float = 4.0  # address space of a worker, GiB
    workers: int = 1  # processes a function; its completions are divided among them
    on_failure: str = "mask"  # what a completion gets whose scoring failed: mask (no reward), zero; abort: the run ends
    max_failure_rate: float = 0.2  # of the completions of the last 10 batches; more end the run


@dataclass
class RolloutConfig:
    engine: str = "auto"  # auto, vllm, transformers
    gpu_memory_utilization: float = 0.35  # share of the device that vLLM may take (GPU)
    kv_cache_gb: float | None = None  # KV cache in GiB; default: what gpu_memory_utilization leaves, 1 on a CPU
    max_model_len: int | None = None  # tokens; default: prompt + completion
    enforce_eager: bool = False  # no CUDA graphs
    kv_cache_dtype: str = "auto"  # auto: the compute dtype; fp8: half the memory, approximate (GPU)
    prefix_caching: bool = True  # a prompt is prefilled once for its group
    view: str = "auto"  # nf4: generate from the packed base; bf16: from a 16-bit view of it (approximate); auto
    linear: str = "auto"  # vLLM's linear layers: slothrl (one GEMM from nf4, the LoRA inside), vllm, or auto
    share_base: str = "auto"  # one copy of the base for vLLM and the trainer: auto, always (or refuse), never
    sleep: bool = True  # vLLM gives up its KV cache while the trainer works (GPU)
    dtype: str = "auto"  # vLLM's compute dtype; auto: the trainer's
    timeout: float = 1800.0  # seconds one rollout may take; an engine that hangs ends the run, which can be resumed
    probe: bool = True  # policy-identity probe after each LoRA push
    probe_bound: float | None = None  # nats, mean absolute; default 0.001 in float32, else what the start shows


@dataclass
class GpuConfig:
    name: str = MISSING  # cpu, 8gb, 12gb, 16gb, 24gb, 80gb
    device: str = MISSING  # cpu or cuda
    memory_gb: float | None = None


@dataclass
class LoggerConfig:
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio
    samples: int = 4  # completions in the table of samples; 0: no table
    samples_every: int = 10  # steps between two tables
    progress: bool = True


@dataclass
class AlgoConfig:
    name: str = MISSING
    trainer: str = MISSING  # grpo or sft: which trainer class runs it
    loss: str | None = None  # gspo, gspo_token, rloo, or your own: pkg.mod:fn, ./file.py:fn; default: trainer.loss_type
    advantage: str | None = None  # rloo, reinforce_pp, or your own; default: the group's, as trainer.scale_rewards says
    kl: str = "k3"  # estimator of the KL term that trainer.beta weighs: k1, k2, k3


@dataclass
class PackingConfig:
    """How a step's completions become micro-batches (`slothrl.packing`)."""

    mode: str = "auto"  # auto, on (or refuse), off
    shared_prefix: str = "auto"  # one prompt for its completions: auto (where it pays), always, never
    tokens_per_micro_batch: int = 0  # 0: from free memory on a GPU, 4,096 on a CPU


@dataclass
class DynamicSamplingConfig:
    """Groups whose completions all got one reward are sampled again (DAPO, arXiv:2503.14476, section 3.2)."""

    max_resamples: int = 0  # times a generation batch; 0: never


@dataclass
class DiagnosisConfig:
    """What is said about a step that goes wrong while it trains (`slothrl.step_findings`)."""

    every: int = 25  # steps until the same is said again
    stop_after: int = 0  # bad steps in a row that end the run; 0: never


@dataclass
class Config:
    """One run. `trainer` takes every field of TRL's GRPOConfig (or SFTConfig, for `algo=sft`) by its own name."""

    algo: AlgoConfig = field(default_factory=AlgoConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    trainer: Any = field(default_factory=dict)
    seed: int = 0
    output_dir: str | None = None  # default: Hydra's run folder
    resume: str | None = None  # a run folder or a checkpoint-* folder; "auto" on the command line: the latest run
    resume_changed: bool = False  # go on although dataset, model, LoRA, rewards or batches are not the run's
    retry_smaller: bool = False  # out of memory in a micro-batch: once more from the last checkpoint, with half of it
    max_nonfinite_steps: int = 3  # skipped steps in a row (loss or gradient NaN or infinite) that end the run
