"""`short_scheduler` against vLLM's own schedulers: the same plan at every step, and the same completions."""

import copy
import importlib.util
import random
from collections import deque

import pytest
import torch

from slothrl import vllm_compat
from slothrl.vllm_scheduler import SHORT
from tests.families import make_checkpoint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds the GPU's part"),
]
BLOCK = 16


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("llama"), torch.float32, num_hidden_layers=1)
    arguments = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**24}
    arguments |= {"enforce_eager": True, "disable_log_stats": True, "logprobs_mode": "processed_logprobs"}
    made = vllm_compat.import_vllm().LLM(model=str(folder), scheduler_cls=SHORT, **arguments)
    yield made
    vllm_compat.shut_down(made)


class Steps:
    """A scheduler with `blocks` of cache over made-up tokens, each drawn of its request and place; one step is under
    way while the next is planned where it schedules ahead."""

    def __init__(self, llm, short, ahead, blocks):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        from slothrl.vllm_scheduler import short_scheduler

        init_none_hash(sha256)
        self.engine, self.ahead, self.plans, self.under_way = llm.llm_engine, ahead, [], deque()
        old = self.engine.engine_core.engine_core.scheduler
        config, cache = copy.copy(self.engine.vllm_config), copy.deepcopy(old.kv_cache_config)
        config.scheduler_config, config.cache_config = map(copy.copy, (config.scheduler_config, config.cache_config))
        config.scheduler_config.async_scheduling = ahead
        config.scheduler_config.max_num_batched_tokens = config.scheduler_config.max_num_scheduled_tokens = 40
        config.cache_config.num_gpu_blocks = cache.num_blocks = blocks
        cache.kv_cache_groups[0].kv_cache_spec = copy.copy(cache.kv_cache_groups[0].kv_cache_spec)
        object.__setattr__(cache.kv_cache_groups[0].kv_cache_spec, "block_size", BLOCK)
        options = {"structured_output_manager": old.structured_output_manager, "hash_block_size": BLOCK}
        options |= {"vllm_config": config, "kv_cache_config": cache, "block_size": BLOCK}
        self.scheduler = (short_scheduler if short else AsyncScheduler if ahead else Scheduler)(**options)

    def add(self, name, prompt, tokens):
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        wanted = SamplingParams(max_tokens=tokens, stop_token_ids=[3], detokenize=False)
        wanted.update_from_generation_config({}, None)
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request(name, prompt, wanted, None, arrival_time=0.0, block_hasher=hasher)
        self.scheduler.add_request(request)
        return request

    def run(self):
        while self.scheduler.requests:
            plan = self.scheduler.schedule()
            self.plans.append(said(plan))
            assert len(self.plans) < 2000
            chunks = {name: self.scheduler.requests[name].is_prefill_chunk for name in plan.num_scheduled_tokens}
            self.under_way.append((plan, chunks))
            while len(self.under_way) > self.ahead or (self.under_way and not plan.total_num_scheduled_tokens):
                self._end(*self.under_way.popleft())

    def _end(self, plan, chunks):
        from vllm.v1.outputs import ModelRunnerOutput

        sampled = [[] if chunk else self._token(name) for name, chunk in chunks.items()]
        places = {name: i for i, name in enumerate(chunks)}
        made = {"req_ids": list(chunks), "req_id_to_index": places, "sampled_token_ids": sampled}
        made |= {"logprobs": None, "prompt_logprobs_dict": {}, "pooler_output": []}
        self.scheduler.update_from_output(plan, ModelRunnerOutput(**made))

    def _token(self, name):
        request = self.scheduler.requests.get(name)
        if request is None:
            return []
        return [random.Random(f"{name.split('/')[0]} {request.num_output_tokens}").choice([3, *range(10, 40)])]


def said(plan):
    """What a plan tells the model's runner, and who gave way."""
    new = [(r.req_id, r.block_ids, r.num_computed_tokens) for r in plan.scheduled_new_reqs]
    cached = plan.scheduled_cached_reqs
    more = (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens)
    return new, more, dict(plan.num_scheduled_tokens), plan.preempted_req_ids, plan.finished_req_ids


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("blocks", [200, 24])
def test_plans_are_vllms(llm, ahead, blocks):
    """Groups of 4 of one prompt, two and two of which say the same, in a cache for all and for a third of them; prompts
    of more tokens than a step takes; then each goes on from where it ended, by blocks that it filled if they are there.
    """
    from slothrl.vllm_scheduler import ShortWay

    plans, preemptions = [], []
    for short in (False, True):
        steps = Steps(llm, short, ahead, blocks)
        assert isinstance(steps.scheduler.kv_cache_manager, ShortWay) == short
        assert not short or steps.scheduler.kv_cache_manager.block == BLOCK
        prompts = [[50 + i // 4] * (1 + 7 * (i // 4)) + [5] * BLOCK for i in range(20)]
        for again in range(2):
            lengths = [20 + 9 * (i % 7) for i in range(20)]
            both = zip(prompts, lengths, strict=True)
            requests = [steps.add(f"{i // 2 * 2}/{i}/{again}", *each) for i, each in enumerate(both)]
            steps.run()
            prompts = [list(request.all_token_ids) for request in requests]
        plans.append(steps.plans)
        preemptions.append(sum(request.num_preemptions for request in requests))
        assert steps.scheduler.kv_cache_manager.usage == 0.0
    assert plans[0] == plans[1] and len(plans[0]) > 60
    assert preemptions[0] == preemptions[1] and (preemptions[0] > 0) == (blocks == 24)
    found = [computed for new, *_ in plans[0] for name, _, computed in new if name.endswith("/1")]
    assert len(found) >= 20 and max(found) > 44 + BLOCK  # beyond the longest prompt: what was generated is cached


def test_completions_are_the_same(llm):
    """Through the engine: where the scheduler is ours and, put back, vLLM's own."""
    from vllm import SamplingParams

    from slothrl.vllm_requests import complete
    from slothrl.vllm_scheduler import ShortWay

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    short = scheduler.kv_cache_manager
    assert isinstance(short, ShortWay)
    wanted = {"max_tokens": 60, "temperature": 0.0, "logprobs": 0, "detokenize": False, "ignore_eos": True}
    prompts = [{"prompt_token_ids": [10 + i // 2] * 130} for i in range(6)]
    found = []
    for manager in (short, short.manager):
        scheduler.kv_cache_manager = manager
        for _ in range(2):
            made = complete(llm, prompts, SamplingParams(**wanted), None)
            found.append((made.token_ids, made.logprobs, made.steps))
        assert llm.reset_prefix_cache()
    assert found[0] == found[2] and found[1] == found[3]
