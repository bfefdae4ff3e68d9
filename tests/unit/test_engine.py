"""transformers' generate behind the Engine interface."""

import pytest
import torch

from slothrl.config import RolloutConfig
from slothrl.engine import EngineChoice, Rollout, Sampling, TransformersEngine, describe_engine, model_logprobs
from slothrl.rollout import wants_view
from slothrl.vllm_compilation import compilation, graph_sizes
from tests.helpers import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    return TransformersEngine(model, tokenizer), model, tokenizer


def test_greedy_takes_the_likeliest_token_whatever_stands_beside(parts):
    engine, model, tokenizer = parts
    prompts = [tokenizer(text)["input_ids"] for text in ("abc", "a much longer prompt")]
    found = engine.generate(prompts, Sampling(max_tokens=4, temperature=0.0)).completion_ids
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token in completion:
            with torch.no_grad():
                assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


def test_a_completion_ends_with_its_end_token(parts):
    engine, _, tokenizer = parts
    always = {"suppress_tokens": [i for i in range(len(tokenizer)) if i != tokenizer.eos_token_id]}
    found = engine.generate([[5, 6]], Sampling(max_tokens=4, extra=always)).completion_ids
    assert found == [[tokenizer.eos_token_id]]  # and TRL's generation_kwargs reach the engine


def test_sampling_follows_the_distribution(parts):
    engine, model, tokenizer = parts
    prompt = tokenizer("xyz")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    first = [ids[0] for ids in engine.generate([prompt] * 4000, Sampling(max_tokens=1)).completion_ids]
    counted = torch.bincount(torch.tensor(first), minlength=len(expected)) / len(first)
    assert (counted - expected).abs().sum() / 2 < 0.1  # total variation


def test_generating_leaves_the_training_mode_alone(parts):
    engine, model, _ = parts
    model.train()
    rollout = engine.generate([[5, 6]], Sampling(max_tokens=2))
    assert model.training
    assert rollout.sampling_logprobs is None
    model.eval()


def test_model_logprobs_are_of_the_following_tokens(parts):
    _, model, _ = parts
    rows = [[5, 6, 7, 8], [9, 10]]
    found = model_logprobs(model, rows)
    assert [len(row) for row in found] == [3, 1]
    with torch.no_grad():
        expected = model(torch.tensor([rows[0]])).logits[0].log_softmax(-1)
    assert torch.allclose(found[0], torch.stack([expected[i, rows[0][i + 1]] for i in range(3)]), atol=1e-6)


def test_probe_after_pushes_keeps_to_its_share(monkeypatch):
    """The first push is checked; then as often as one hundredth of the time allows."""
    import torch

    from slothrl import probe as module
    from slothrl.probe import PolicyProbe

    clock, rows = [0.0], []

    class Engine:
        name = "vllm"

        def logprobs(self, token_ids):
            clock[0] += 0.5  # what a check takes
            rows.extend(token_ids)
            return [torch.zeros(len(ids) - 1) for ids in token_ids]

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module, "model_logprobs", lambda model, ids: [torch.zeros(len(row) - 1) for row in ids])
    probe = PolicyProbe(Engine(), torch.nn.Identity(), [[1] * 9, [2] * 40])
    checked = []
    for second in range(0, 200, 10):
        clock[0] = max(clock[0], float(second))
        checked.append(probe.check_push() is not None)
    assert [10 * i for i, yes in enumerate(checked) if yes] == [0, 60, 120, 180]
    assert rows == [[2] * 24] * 4


def test_occupancy_is_the_share_of_sequences_still_generating():
    assert Rollout([[1, 2, 3, 4], [1], [1], [1, 2]]).occupancy == 8 / 16  # 4, 2, 1 and 1 of 4 in the four steps
    assert Rollout([[1, 2], [3, 4]]).occupancy == 1.0
    assert Rollout([[], []]).occupancy == 1.0
    assert Rollout([[1, 2], [3, 4]], steps=4).occupancy == 4 / 8  # one after the other


def test_view_is_for_many_sequences_and_free_memory():
    weights = 7_000_000_000
    assert wants_view("bf16", weights, 1, 0) and not wants_view("nf4", weights, 512, 10**12)
    assert wants_view("auto", weights, 256, 64 * 10**9)
    assert not wants_view("auto", weights, 64, 64 * 10**9)
    assert not wants_view("auto", weights, 256, 24 * 10**9)


@pytest.mark.parametrize(
    "sequences, sizes",
    [
        (1, [1]),
        (6, [1, 2, 4, 6]),
        (64, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
        (100, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]),
    ],
)
def test_graphs_are_recorded_up_to_the_sequences_there_are(sequences, sizes):
    assert graph_sizes(sequences) == sizes


def test_early_launch_is_an_option_of_inductor():
    import torch._inductor.config as inductor

    assert compilation([1, 2]) == {"cudagraph_capture_sizes": [1, 2]}
    patches = compilation([1, 2], early_launch=True)["inductor_compile_config"]
    with inductor.patch(patches):  # refuses a name that it does not know
        assert inductor.triton.enable_pdl
    assert not inductor.triton.enable_pdl


def test_what_only_vllm_takes_is_said():
    asked = RolloutConfig(view="bf16", kv_cache_dtype="fp8")
    slow = EngineChoice("transformers", "asked for")
    assert describe_engine(slow, RolloutConfig()) == "transformers (asked for)"
    assert describe_engine(slow, asked) == (
        "transformers (asked for); of vLLM alone, and not used: rollout.view=bf16, rollout.kv_cache_dtype=fp8"
    )
    assert describe_engine(EngineChoice("vllm", "auto"), asked) == "vllm (auto)"
