"""Everything that depends on vLLM's version or internals, each with its bound and the test that covers it.

Features are probed, versions not compared. Nothing here changes vLLM's code: it reads its objects, writes into the LoRA
buffers that vLLM made for an adapter of ours, and hands it a worker class through the argument made for that.

| piece | seen working with | upstream | contract test |
|---|---|---|---|
| in-process engine, `ENVIRONMENT` | 0.26, 0.31 | documented variables | all of tests/integration/test_vllm_engine.py |
| adapter made of tensors, buffers written in place | 0.26, 0.31 | no public tensor path | `test_vllms_own_layers` |
| base weights read where they lie (`vllm_layout`) | 0.26, 0.31 | no public layout | integration/test_shared_model.py |
| `KVOnlyWorker`, sleep without the weights | 0.26 (GPU) | sleep takes weights and block tables along, #53343 | \
`test_sleep_frees_the_cache_only` |
| `release_kv_cache_memory` instead, where there is one | not run: GPU builds from 0.28 on | public | the same test |
| transformers' classes rewritten by vLLM's transformers backend | 0.26, 0.31 | `support_torch_compile` on them | \
`test_nf4_families[smollm3]` |
| the scheduler's requests, tokens from the core (`vllm_requests`) | 0.26 (read), 0.31 | no public way to them | \
`test_preemptions`, `test_completions_are_vllms` |
| its scheduler, shorter (`vllm_scheduler`) | 0.26, 0.31 (CPU) | a public argument alone | `test_plans_are_vllms` |
| our linear layers, on bitsandbytes' classes (`vllm_linear`) | 0.26, 0.31 | public registry | `test_nf4_families` |
| vLLM's stream (`streams.OwnStream`) | 0.26 (GPU) | it moves the calling thread to one of its own | `test_streams` |
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from slothrl.errors import UserError

# vLLM's own variables; the first keeps the engine in this process, where its LoRA buffers can be reached. A value that
# the user has set is left alone.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at first use, which needs a CUDA toolkit
}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's LoRA kernels take as max_lora_rank
ADAPTER_ID = 1


def import_vllm() -> ModuleType:
    """vLLM, with the variables of `ENVIRONMENT` set before its first import."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import vllm
    import vllm.platforms

    return vllm


def max_lora_rank(rank: int) -> int:
    """The smallest rank of `RANKS` that holds `rank`. Raises `UserError` above the largest."""
    if fitting := [allowed for allowed in RANKS if rank <= allowed]:
        return fitting[0]
    raise UserError(
        f"model.lora.r={rank}: vLLM takes LoRA ranks up to {RANKS[-1]}; lower it or use rollout=transformers"
    )


# --- our adapter ----------------------------------------------------------------------------------------------------


def register_adapter(llm, tensors: dict[str, torch.Tensor], rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Make an adapter known to vLLM from tensors (named as PEFT saves them), in the one place it keeps for adapters."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict({"r": rank, "lora_alpha": alpha, "target_modules": list(targets)})
    dtype = llm.llm_engine.vllm_config.model_config.dtype
    device = next(iter(tensors.values())).device
    # Clones: vLLM multiplies B by the scaling in place.
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    manager = model_of(llm).lora_manager
    manager.add_adapter(LoRAModel.from_lora_tensors(ADAPTER_ID, copies, helper, device=str(device), dtype=dtype))
    manager.activate_adapter(ADAPTER_ID)
    manager.pin_adapter(ADAPTER_ID)


def adapter_in_place(llm, index: int | None = None) -> int:
    """The row of the stacked buffers that is our adapter's. Raises `RuntimeError` where it is no longer `index`."""
    rows = model_of(llm).lora_manager.lora_index_to_id
    if ADAPTER_ID not in rows or (index is not None and rows[index] != ADAPTER_ID):
        raise RuntimeError("vLLM moved the adapter out of its place, or dropped it")
    return rows.index(ADAPTER_ID)


def lora_buffers(llm, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Views of row `index` of vLLM's stacked buffers by projection: A (max rank, in) and B (out, max rank)."""
    manager, found = model_of(llm).lora_manager, {}
    for name, module in manager.modules.items():
        for i, part in enumerate(manager.packed_modules.get(name, (name,))):
            found[part] = (module.lora_a_stacked[i][index, 0], module.lora_b_stacked[i][index, 0])
    return found


def lora_buffer_bytes(llm) -> int:
    """What the stacked buffers take, the padding to vLLM's ranks included."""
    modules = model_of(llm).lora_manager.modules.values()
    return sum(tensor.nbytes for module in modules for tensor in (*module.lora_a_stacked, *module.lora_b_stacked))


# --- sleeping -------------------------------------------------------------------------------------------------------


def sleep_arguments() -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine whose KV cache alone can be freed and given back."""
    import vllm

    if not torch.cuda.is_available():
        return {}
    if hasattr(vllm.LLM, "release_kv_cache_memory"):
        return {"enable_sleep_mode": True}
    return {"enable_sleep_mode": True, "worker_cls": "slothrl.vllm_compat.KVOnlyWorker"}


def sleep(llm) -> None:
    """Free the KV cache, and with it the prefix cache; the weights stay where they are."""
    if hasattr(llm, "release_kv_cache_memory"):
        llm.sleep(level=0)
        llm.release_kv_cache_memory()
    else:
        llm.sleep(level=1)


def wake(llm) -> None:
    """Give the KV cache its memory back, at the same addresses (CUDA graphs keep them)."""
    llm.wake_up()


def shut_down(llm) -> None:
    """Let go of vLLM's memory; base weights that others have views of stay. Its memory pool must go before another
    engine makes one, or the process aborts."""
    llm.llm_engine.engine_core.shutdown()


def __getattr__(name: str) -> Any:
    if name == "KVOnlyWorker":  # vLLM finds it by name; made on demand, because its base class imports vLLM
        return _kv_only_worker()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _kv_only_worker() -> type:
    from vllm.v1.worker.gpu_worker import Worker

    from slothrl.vllm_linear import make_views

    class KVOnlyWorker(Worker):
        """Keeps everything but the KV tensors out of the memory that sleeping takes away.

        vLLM's own worker frees or offloads the weights too, which the trainer still reads, and with the KV cache its
        block tables, which are not rebuilt (issue #53343).
        """

        graph_bytes = 0

        def load_model(self, *arguments, **named):
            super().load_model(*arguments, **named)
            wanted: Any = self.vllm_config.additional_config
            if wanted.get("slothrl", {}).get("view"):
                runner: Any = self.model_runner
                with super()._maybe_get_memory_pool_context("slothrl_view"):
                    make_views(runner.model)

        def _maybe_get_memory_pool_context(self, tag):
            return nullcontext()

        def initialize_from_config(self, kv_cache_config):
            pool = super()._maybe_get_memory_pool_context
            with _allocating(self.model_runner, lambda: pool("kv_cache")):
                super().initialize_from_config(kv_cache_config)

        def sleep(self, level=1):
            # Not the worker's own: it takes memory that another process filled meanwhile for a failure, and collects
            # all of Python's garbage each time.
            from vllm.device_allocator.cumem import unmap_and_release

            torch.cuda.synchronize()
            for allocation in self._kv_allocations():
                unmap_and_release(allocation.handle)
                allocation.is_asleep = True

        def wake_up(self, tags=None):
            from vllm.device_allocator.cumem import create_and_map

            for allocation in self._kv_allocations():
                if allocation.is_asleep:
                    create_and_map(allocation.handle)
                    allocation.is_asleep = False

        @staticmethod
        def _kv_allocations():
            from vllm.device_allocator.cumem import CuMemAllocator

            allocations = CuMemAllocator.get_instance().pointer_to_data.values()
            return [allocation for allocation in allocations if allocation.tag in ("kv_cache", "slothrl_view")]

        def compile_or_warm_up_model(self):
            capture = self.model_runner.capture_model

            def counted():
                self.graph_bytes = capture()
                return self.graph_bytes

            self.model_runner.capture_model = counted
            return super().compile_or_warm_up_model()

    return KVOnlyWorker


@contextmanager
def _allocating(runner, pool) -> Iterator[None]:
    """Run the one function that allocates KV tensors inside `pool`, for the time of the block."""
    import vllm.v1.worker.gpu.attn_utils as attn_utils

    # A method of the first model runner, a function of a module for the second one.
    holder, name = runner, "_allocate_kv_cache_tensors"
    if not hasattr(holder, name):
        holder, name = attn_utils, "_allocate_kv_cache"
    own = name in vars(holder)
    original = getattr(holder, name)

    def pooled(*arguments, **named):
        with pool():
            return original(*arguments, **named)

    setattr(holder, name, pooled)
    try:
        yield
    finally:
        setattr(holder, name, original) if own else delattr(holder, name)


# --- what it holds --------------------------------------------------------------------------------------------------


def model_of(llm) -> Any:
    """The module that vLLM runs, in this process."""
    return llm.apply_model(lambda module: module)[0]


def worker_of(llm) -> Any:
    """vLLM's worker, in this process."""
    wrapper = llm.collective_rpc(lambda worker: worker)[0]
    return getattr(wrapper, "worker", wrapper)


def kv_cache_bytes(llm) -> int:
    """What the KV cache takes while the engine is awake."""
    found = {}
    for entry in getattr(worker_of(llm).model_runner, "kv_caches", []):
        for tensor in entry if isinstance(entry, (list, tuple)) else [entry]:
            if isinstance(tensor, torch.Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


# --- what it does to transformers -----------------------------------------------------------------------------------


_started_with: list[Any] = []  # the config of the last engine, without what ties it to the engine's memory


def remember_config(llm) -> None:
    """Keep what `making_models` needs, also when this engine is gone."""
    from vllm.config import CompilationConfig, CompilationMode

    config = copy.copy(llm.llm_engine.vllm_config)
    config.compilation_config = CompilationConfig(mode=CompilationMode.NONE)
    _started_with[:] = [config]


@contextmanager
def making_models() -> Iterator[None]:
    """For making a transformers model, where vLLM may have run before in this process.

    Architectures without a model of vLLM's own run through its transformers backend, which rewrites transformers'
    class for good: its `__init__` then asks for a config of vLLM's. `keep_plain` must follow.
    """
    if not _started_with:
        yield
        return
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(_started_with[0]):
        yield


def keep_plain(model: torch.nn.Module) -> None:
    """Tell a transformers model of a class that vLLM rewrote not to run as vLLM's compiled one."""
    for module in model.modules():
        if any(base.__name__ == "TorchCompileWithNoGuardsWrapper" for base in type(module).__mro__):
            module.do_not_compile = True  # pyright: ignore
