"""`complete` takes tokens from vLLM's core: held against what `vllm.LLM.generate` gives, on the real engine."""

import importlib.util

import pytest
import torch

from slothrl import vllm_compat
from tests.families import make_checkpoint

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds the GPU's part"),
]
# 6 prompts for 2 completions each; a quarter of the vocabulary ends one.
PROMPTS = [{"prompt_token_ids": [10 + i // 2] * (5 + 13 * (i // 2))} for i in range(12)]
ENDS = list(range(1, 1003, 8))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("llama"), torch.float32, num_hidden_layers=1)
    arguments = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**24}
    arguments |= {"enforce_eager": True, "logprobs_mode": "processed_logprobs", "disable_log_stats": True}
    made = vllm_compat.import_vllm().LLM(model=str(folder), **arguments)
    yield made
    vllm_compat.shut_down(made)


def parameters(**changes):
    from vllm import SamplingParams

    wanted = {"max_tokens": 40, "temperature": 0.8, "logprobs": 0, "detokenize": False, "stop_token_ids": ENDS}
    return SamplingParams(**{**wanted, **changes})


def both_ways(llm, **changes):
    """(ours, vLLM's tokens, vLLM's log-probs), from the same random state and an empty prefix cache."""
    from slothrl.vllm_requests import complete

    torch.manual_seed(7)
    ours = complete(llm, PROMPTS, parameters(**changes), None)
    assert llm.reset_prefix_cache()  # nothing of ours is left under way
    torch.manual_seed(7)
    theirs = [output.outputs[0] for output in llm.generate(PROMPTS, parameters(**changes), use_tqdm=False)]
    assert llm.reset_prefix_cache()
    logprobs = [[at[token].logprob for token, at in zip(out.token_ids, out.logprobs, strict=True)] for out in theirs]
    return ours, [list(out.token_ids) for out in theirs], logprobs


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"logprobs": 3, "top_k": 20}, {"ignore_eos": True}])
def test_completions_are_vllms(llm, changes):
    """The same tokens and the same log-probs to their bits, ends of all kinds, 12 requests taking 8 places in turn."""
    ours, token_ids, logprobs = both_ways(llm, **changes)
    assert ours.token_ids == token_ids and ours.logprobs == logprobs
    lengths = [len(ids) for ids in token_ids]
    assert all(ids[-1] in ENDS or len(ids) == 40 for ids in token_ids) and min(lengths) < 40
    assert ours.preemptions == 0 and max(lengths) <= ours.steps <= sum(lengths)


def test_what_is_made_of_tokens_takes_vllms_way(llm):
    """Stop strings are found in texts, outside the core."""
    changes = {"detokenize": True, "stop": list("abcdefghijklmnopqrstuvwxyz"), "stop_token_ids": None}
    ours, token_ids, logprobs = both_ways(llm, **changes)
    assert ours.token_ids == token_ids and ours.logprobs == logprobs
    lengths = [len(ids) for ids in token_ids]
    assert min(lengths) < 40 and max(lengths) <= ours.steps <= sum(lengths) and ours.preemptions == 0


def test_several_completions_a_request_take_vllms_way(llm):
    """The first of each is taken, and the scheduler, which knows none of these requests by its name, not asked."""
    ours, token_ids, logprobs = both_ways(llm, n=2)
    assert ours.token_ids == token_ids and ours.logprobs == logprobs
    assert ours.steps is None and ours.preemptions is None


def test_a_failure_leaves_nothing_under_way(llm, monkeypatch):
    from slothrl.vllm_requests import complete

    greedy = {"temperature": 0.0}
    before = complete(llm, PROMPTS, parameters(**greedy), None)
    core, calls = llm.llm_engine.engine_core, []
    taken = core.get_output

    def breaks():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return taken()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(core, "get_output", breaks)
        complete(llm, PROMPTS, parameters(**greedy), None)
    assert not llm.llm_engine.has_unfinished_requests() and not core.engine_core.scheduler.has_unfinished_requests()
    assert llm.reset_prefix_cache()
    after = complete(llm, PROMPTS, parameters(**greedy), None)
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
