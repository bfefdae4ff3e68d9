"""The contract with vLLM's internals on a GPU, beside a base of the trainer's own: nf4 and bf16, CUDA graphs on."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from slothrl.embedded import embedded_folder
from slothrl.engine import Sampling, model_logprobs
from slothrl.lora_slot import lora_shape
from slothrl.probe import PolicyProbe, mean_difference, perturbed_lora

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BOUND = 0.25  # bf16 rounding of two implementations of a small model: measured 0.06 to 0.15


@pytest.fixture(scope="module", params=["nf4", "nf4, what is off by default", "none"])
def parts(request):
    from slothrl.models import quantization_config
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    torch.manual_seed(0)
    folder = embedded_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    nf4, more = request.param.startswith("nf4"), "off" in request.param
    extra = {"quantization_config": quantization_config("nf4", torch.bfloat16)} if nf4 else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0}, **extra)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    memory = {"gpu_memory_utilization": 0.1, "kv_cache_gb": 1.0, "early_launch": more, "short_steps": more}
    options = VLLMOptions(str(folder), 256, 16, "bitsandbytes" if nf4 else None, **memory)
    engine = VLLMEngine(options, lora_shape(model)).follow(model, tokenizer)
    rows = [tokenizer(text)["input_ids"] for text in ("The capital of France is Paris.", "2 + 2 = 4, and 3 + 3 = 6")]
    manager = engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    assert (type(manager).__name__ == "ShortWay") == more
    yield engine, model, tokenizer, rows
    engine.close()


def test_policies_agree_and_follow(parts):
    engine, model, _, rows = parts
    probe = PolicyProbe(engine, model, rows, bound=BOUND)
    assert probe.check() < BOUND
    moved, apart = probe.perturbation_test()
    assert moved > 3 * apart


def test_push_keeps_addresses_under_cuda_graphs(parts):
    engine, model, tokenizer, rows = parts
    prompt = [tokenizer("Once upon a time")["input_ids"]]
    greedy = Sampling(max_tokens=12, temperature=0.0)
    before = engine.generate(prompt, greedy)
    places = [(b.a_into.data_ptr(), b.b_into.data_ptr()) for b in engine.slot.buffers]
    with perturbed_lora(model, 0.1):
        engine.push_lora()
        changed = engine.generate(prompt, greedy)
        assert mean_difference(engine.logprobs(rows), model_logprobs(model, rows)) < BOUND
        # The decode path, which runs in captured graphs, must see the new weights as well as the prefill path.
        row = prompt[0] + changed.completion_ids[0]
        expected = model_logprobs(model, [row])[0][len(prompt[0]) - 1 :]
        assert (expected - torch.tensor(changed.sampling_logprobs[0])).abs().mean() < BOUND
    engine.push_lora()
    assert changed.completion_ids != before.completion_ids
    assert engine.generate(prompt, greedy).completion_ids == before.completion_ids
    assert places == [(b.a_into.data_ptr(), b.b_into.data_ptr()) for b in engine.slot.buffers]


def test_the_same_again(parts):
    """The same log-probs, to their bits, from our layers; vLLM's own LoRA adds up in any order."""
    engine, _, tokenizer, _ = parts
    if engine.linear is None:
        pytest.skip("vLLM's own layers")
    prompts = [tokenizer(f"Once upon {i} times")["input_ids"] for i in range(16)]  # shorter than a block: never cached
    greedy = Sampling(max_tokens=48, temperature=0.0, extra={"ignore_eos": True})
    first, second = (engine.generate(prompts, greedy) for _ in range(2))
    assert first.completion_ids == second.completion_ids
    assert first.sampling_logprobs == second.sampling_logprobs


def test_requests_are_counted(parts):
    """What vLLM's scheduler is asked afterwards (`vllm_requests`): all fit here, none waits, none is preempted."""
    engine, _, tokenizer, _ = parts
    prompts = [tokenizer(f"Once upon {i} times")["input_ids"] for i in range(16)]
    rollout = engine.generate(prompts, Sampling(max_tokens=48, extra={"ignore_eos": True}))
    assert [len(ids) for ids in rollout.completion_ids] == [48] * 16
    assert (rollout.steps, rollout.preemptions, rollout.occupancy) == (48, 0, 1.0)


def test_completions_are_vllms(parts):
    """Tokens from the core, under asynchronous scheduling and CUDA graphs: those that `vllm.LLM.generate` gives."""
    from vllm import SamplingParams

    from slothrl.vllm_requests import complete, serve

    engine, _, tokenizer, _ = parts
    if engine.linear is None:
        pytest.skip("vLLM's own layers add up in any order")
    prompts = [tokenizer(f"Once upon {i} times")["input_ids"] for i in range(16)]  # shorter than a block: never cached
    wanted = {"max_tokens": 48, "temperature": 0.0, "logprobs": 0, "detokenize": False}
    wanted["stop_token_ids"] = list(range(0, 49152, 50))  # lengths of all kinds
    ours = engine._run(complete, prompts, SamplingParams(**wanted))
    theirs = [output.outputs[0] for output in engine._run(serve, prompts, SamplingParams(**wanted))]
    assert ours.token_ids == [list(out.token_ids) for out in theirs]
    for row, out in zip(ours.logprobs, theirs, strict=True):
        assert row == [at[token].logprob for token, at in zip(out.token_ids, out.logprobs, strict=True)]
    assert (ours.steps, ours.preemptions) == (max(len(ids) for ids in ours.token_ids), 0)
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_push_time(parts):
    """Not a timing test: the figure is printed, the assertion only guards against a push through disk."""
    engine = parts[0]
    engine.push_lora()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(20):
        engine.slot.push()
    end.record()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end) / 20
    print(f"push of {len(engine.slot.buffers)} projections: {milliseconds:.2f} ms")
    assert milliseconds < 50
