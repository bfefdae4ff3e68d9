"""vLLM's scheduler, with a short way where a sequence's next token has its place already."""

from __future__ import annotations

from typing import Any

SHORT = "slothrl.vllm_scheduler.short_scheduler"  # as `vllm.LLM` takes it


def short_scheduler(**arguments: Any) -> Any:
    """For `scheduler_cls` of `vllm.LLM`: vLLM's own scheduler over `ShortWay`, where the cache is of one simple kind.

    vLLM asks its cache's manager for room, and to note full blocks, once a sequence and step; 14 of 16 times the answer
    is known by counting, and a plan takes half the time. The plans stay the same; seen with the schedulers of 0.26 and
    0.31, with and without a step under way, on a CPU; `test_plans_are_vllms`.
    """
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    ahead = arguments["vllm_config"].scheduler_config.async_scheduling
    made = (AsyncScheduler if ahead else Scheduler)(**arguments)
    block = simple_block(made)
    if block is not None:
        made.kv_cache_manager = ShortWay(made.kv_cache_manager, block)  # pyright: ignore
    return made


def simple_block(scheduler: Any) -> int | None:
    """Tokens of a block, where full attention alone fills the cache, a hash a block and nothing ahead; else None."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if [type(manager) for manager in managers] != [FullAttentionManager]:
        return None
    block = managers[0].block_size
    simple = scheduler.connector is None and scheduler.num_lookahead_tokens == 0
    return block if simple and scheduler.kv_cache_manager.block_pool.hash_block_size == block else None


class ShortWay:
    """A `KVCacheManager` that answers by itself where nothing is to be done, and else asks the real one.

    Args:
        manager: vLLM's own; whatever is not here is its.
        block: tokens of a block.
    """

    def __init__(self, manager: Any, block: int):
        self.manager, self.block = manager, block
        self.nothing = manager.empty_kv_cache_blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def allocate_slots(
        self, request: Any, num_new_tokens: int, *, num_lookahead_tokens: int = 0, **prefill: Any
    ) -> Any:
        """Blocks that the request must get for so many tokens more; None where there are too few.

        One more token inside a block, neither its first (a block is needed) nor its last (a block is full, and noted
        for the prefix cache): nothing is needed, and nothing to be noted that has not been. A sequence that is not
        running yet brings more arguments.
        """
        if num_new_tokens == 1 and not prefill and 0 < request.num_computed_tokens % self.block < self.block - 1:
            return self.nothing
        return self.manager.allocate_slots(
            request, num_new_tokens, num_lookahead_tokens=num_lookahead_tokens, **prefill
        )

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Note the full blocks of so many tokens, called for each token that becomes known; full: a multiple."""
        if num_computed_tokens % self.block == 0:
            self.manager.cache_blocks(request, num_computed_tokens)
