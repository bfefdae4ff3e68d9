"""Memory by phase, predicted: pure functions from a model's shape and a run's settings to bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slothrl_kernels.layer_mlp import tile_bytes

from slothrl.fit_activations import MicroBatch, Route, activation_peak, layer_peak, whole_layers
from slothrl.fit_batch import keeping_layers, micro_batch
from slothrl.fit_constants import GIB, constant
from slothrl.fit_graphs import graphed_bytes
from slothrl.fit_shape import Shape
from slothrl.fit_terms import (
    adapter_bytes,
    allowed_rank,
    base_bytes,
    cache_bytes_per_token,
    generate_bytes,
    optimizer_bytes,
    vllm_adapter_bytes,
    vllm_prefill_bytes,
)
from slothrl.host_embeddings import wanted
from slothrl.memory_phases import BASE, REST, TEMPORARY

COPY = "base, the trainer's own"
CACHE, ADAPTER, VLLM_ADAPTER, GRAPHS = "KV cache", "LoRA", "LoRA in vLLM", "CUDA graphs"
LAYER_GRAPHS = "CUDA graphs of layers"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"


@dataclass(frozen=True)
class Settings:
    """What of a run decides its memory.

    Attributes:
        trainer: "grpo" or "sft".
        engine: "vllm" or "transformers".
        quantization: "nf4", "int8" or "none".
        width: bytes of a value in the computation.
        rows: sequences in a padded micro-batch (per_device_train_batch_size).
        packed: GRPO's updates are packed; the next four say how.
        completions: of an optimizer step, all of which are packed together.
        group: completions of a prompt.
        tokens: of a packed micro-batch at most; 0: as many as the trainer takes for the memory it finds free.
        shared_prefix: as in `slothrl.packing`.
        prompt, completion: tokens at most; for SFT `completion` is the whole sequence and `prompt` 0.
        sequences: completions generated side by side.
        fused: the trainer's layers are fused (`model.fuse`).
        layer_graphs: fused layers run by CUDA graphs (`model.graphs=on`; "auto" takes only what it finds free).
        activations: what checkpointed layers keep (`model.activations`).
        within: bytes that those which keep everything may take (`model.activation_gib`), or None.
        shared: vLLM and the trainer hold one base.
        embeddings: where the trainer's input embeddings lie (`model.embeddings`).
        sleep: vLLM's cache is not there while the trainer works.
        utilization: the share of the device that vLLM takes where `cache` is None.
        cache: KV cache in bytes, or None.
        graphs: vLLM records CUDA graphs.
        cuda: on a GPU; else the process' memory is meant, without context and allocator.
    """

    trainer: str = "grpo"
    engine: str = "vllm"
    quantization: str = "nf4"
    width: int = 2
    rows: int = 8
    packed: bool = True
    completions: int = 64
    group: int = 8
    tokens: int = 0
    shared_prefix: str = "auto"
    prompt: int = 512
    completion: int = 512
    sequences: int = 64
    checkpointing: bool = True
    fused: bool = False
    layer_graphs: bool = False
    activations: str = "layer"
    within: int | None = None
    optimizer: str = "adamw_torch_fused"
    shared: bool = True
    embeddings: str = "device"
    sleep: bool = True
    utilization: float = 0.35
    cache: int | None = None
    graphs: bool = True
    cuda: bool = True

    @property
    def length(self) -> int:
        return self.prompt + self.completion

    @property
    def generates(self) -> bool:
        return self.trainer == "grpo"

    @property
    def uses_vllm(self) -> bool:
        return self.generates and self.engine == "vllm"

    @property
    def packs(self) -> bool:
        return self.generates and self.packed

    @property
    def route(self) -> Route:
        quantized = self.quantization != "none"
        offload = self.activations in ("offload", "both")
        return Route(self.width, quantized, self.checkpointing, self.fused, offload)


@dataclass(frozen=True)
class PhasePrediction:
    """The fullest moment of a phase: bytes by holder, as `slothrl.memory_phases.Phase` measures them."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def host_embeddings(shape: Shape, settings: Settings) -> int:
    """Bytes of the trainer's embeddings that lie in the host's memory (`slothrl.host_embeddings`): all V h e, or none.

    Tied ones are the head's, and vLLM keeps those that it shares.
    """
    nbytes = settings.width * shape.embedding
    own = settings.cuda and shape.head > 0 and shape.frozen_embedding and not (settings.uses_vllm and settings.shared)
    return nbytes if own and wanted(settings.embeddings, nbytes) else 0


def held(shape: Shape, settings: Settings) -> dict[str, int]:
    """What is there in every phase, the cache aside."""
    moved = host_embeddings(shape, settings)
    parts = {BASE: base_bytes(shape, settings.quantization, settings.width) - moved}
    if settings.uses_vllm:
        # vLLM keeps expanded scales, transformers doubly quantised ones; LLM.int8 it has not at all.
        kept = "none" if settings.quantization == "int8" else settings.quantization
        own = base_bytes(shape, kept, settings.width, double=False)
        parts = {BASE: own} if settings.shared else {BASE: own, COPY: parts[BASE]}
    parts[ADAPTER] = adapter_bytes(shape)
    parts[OPTIMIZER] = optimizer_bytes(shape, settings.optimizer)
    if settings.uses_vllm:
        parts[VLLM_ADAPTER] = vllm_adapter_bytes(shape, allowed_rank(shape.rank), settings.width)
        if settings.graphs and settings.cuda:
            parts[GRAPHS] = int(constant("graphs_per_layer") * shape.layers)
    return parts


def around(shape: Shape, settings: Settings) -> int:
    """CUDA's context, cuBLAS' workspace and vLLM's own buffers: `vllm` + `vllm_matrices` x the largest matrix."""
    if not settings.cuda:
        return 0
    vllm = constant("vllm") + constant("vllm_matrices") * settings.width * shape.largest
    return int(constant("context") + constant("workspace") + (vllm if settings.uses_vllm else 0))


def update(shape: Shape, settings: Settings, total: int) -> PhasePrediction:
    """The trainer's part of a step: forward and backward of its fullest micro-batch over everything that stays."""
    parts = held(shape, settings)
    parts[GRADIENTS] = adapter_bytes(shape)
    if settings.uses_vllm and not (settings.sleep and settings.cuda):
        parts[CACHE] = cache(shape, settings, total)
    batch, free = largest_micro_batch(shape, settings, total), free_for_update(shape, settings, total)
    whole, attending = keeping_layers(shape, batch, settings, free)
    tile = tile_bytes(total if settings.cuda else 0)
    route = replace(settings.route, whole=whole, attending=attending, tile=tile)
    parts[TEMPORARY] = activation_peak(shape, batch, route)
    if settings.layer_graphs and whole_layers(shape, settings.fused):
        parts[LAYER_GRAPHS] = graphed_bytes(shape, batch, route)
    parts[REST] = around(shape, settings)
    if settings.cuda:
        parts[REST] += fragments(shape, batch, route)
    return PhasePrediction("update", parts)


def largest_micro_batch(shape: Shape, settings: Settings, total: int) -> MicroBatch:
    """The fullest micro-batch of an update on a device of `total` bytes (`slothrl.fit_batch`)."""
    return micro_batch(shape, settings, free_for_update(shape, settings, total))


def free_for_update(shape: Shape, settings: Settings, total: int) -> int:
    """What a micro-batch finds free: what weights, LoRA, gradients, the optimizer's state and the context leave."""
    free = total - sum(held(shape, settings).values()) - adapter_bytes(shape) - around(shape, settings)
    if settings.uses_vllm and not (settings.sleep and settings.cuda):
        free -= cache(shape, settings, total)
    return max(free, 0)


def fragments(shape: Shape, batch: MicroBatch, route: Route) -> int:
    """What torch's allocator keeps reserved beside the most it allocated: blocks that fit nothing that is asked for.

    `fragments_least`, and `fragments` of what one layer holds in its backward: what comes and goes once a layer leaves
    holes; what stays (weights, kept inputs) leaves none. Both constants are fitted to twelve updates.
    """
    return int(constant("fragments_least") + constant("fragments") * layer_peak(shape, batch, route))


def allocated(parts: dict[str, int]) -> int:
    """What torch's allocator holds of a phase: `torch.cuda.max_memory_allocated`, but for cuBLAS' workspace."""
    return sum(count for name, count in parts.items() if name not in (CACHE, GRAPHS, REST))


def rollout(shape: Shape, settings: Settings, total: int) -> PhasePrediction:
    """Generation: the engine with its cache, beside the LoRA and the optimizer's state."""
    parts = held(shape, settings)
    if settings.uses_vllm:
        parts[CACHE] = cache(shape, settings, total)
        parts[TEMPORARY] = _prefill(shape, settings)
    else:
        parts[CACHE] = settings.sequences * settings.length * cache_bytes_per_token(shape, settings.width)
        whole = generate_bytes(shape, settings.sequences, settings.length, settings.width)
        parts[TEMPORARY] = whole - parts[CACHE]
    parts[REST] = around(shape, settings)
    return PhasePrediction("rollout", parts)


def needed_cache(shape: Shape, settings: Settings) -> int:
    """vLLM does not start with less cache than one sequence of full length takes."""
    return settings.length * cache_bytes_per_token(shape, settings.width)


def cache(shape: Shape, settings: Settings, total: int) -> int:
    """vLLM's KV cache: as asked for, or what its share of the device leaves; `needed_cache` at least, since with less
    it refuses to start. On a CPU 1 GiB where nothing is asked for."""
    asked = settings.cache if settings.cache is not None else share_left(shape, settings, total)
    return max(asked, needed_cache(shape, settings))


def share_left(shape: Shape, settings: Settings, total: int) -> int:
    """utilization x total - base - LoRA in vLLM - its largest prefill - context: what vLLM makes its cache of."""
    if not settings.cuda:
        return GIB
    parts = held(shape, settings)
    own = parts[BASE] + parts[VLLM_ADAPTER] + _prefill(shape, settings) + around(shape, settings)
    return int(settings.utilization * total) - own


def _prefill(shape: Shape, settings: Settings) -> int:
    if not settings.cuda:
        return 0
    tokens = int(constant("vllm_tokens"))
    return vllm_prefill_bytes(shape, settings.sequences, tokens, settings.width)


def predict(shape: Shape, settings: Settings, total: int) -> list[PhasePrediction]:
    """Every phase of a run.

    Args:
        total: bytes of the device.
    """
    phases = [rollout(shape, settings, total)] if settings.generates else []
    return [*phases, update(shape, settings, total)]


def starts(shape: Shape, settings: Settings, total: int) -> bool:
    """Whether vLLM's share of the device holds its base and one sequence of full length."""
    if not settings.uses_vllm or settings.cache is not None:
        return True
    return share_left(shape, settings, total) >= needed_cache(shape, settings)


def fits(shape: Shape, settings: Settings, total: int) -> bool:
    """Whether vLLM starts, and no phase takes more than the device has."""
    phases = predict(shape, settings, total)
    return starts(shape, settings, total) and all(phase.total <= total for phase in phases)
