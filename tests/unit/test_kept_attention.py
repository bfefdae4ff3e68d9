"""In how many layers attention is kept, from given bytes; and that the memory prediction knows it."""

from dataclasses import replace
from functools import partial

import psutil
import pytest
from test_fit import shape

from slothrl.fit_activations import (
    MicroBatch,
    Route,
    activation_peak,
    head_bytes,
    kept_attention_bytes,
    kept_layer_peak,
)
from slothrl.fit_batch import keeping_layers, sizes, text_config
from slothrl.fit_constants import card_bytes
from slothrl.fit_memory import Settings, largest_micro_batch, predict
from slothrl.fit_terms import adapter_bytes
from slothrl.host_memory import free_of_host
from slothrl.kept_attention import AttentionSizes, layers_that_keep, reserved_bytes
from slothrl.memory_phases import TEMPORARY
from slothrl.token_bytes import bytes_per_token, left_beside, left_of_light, tokens_that_fit
from tests.gpu.fit_models import config_of
from tests.traced import traced_peak

GB = 10**9
# Llama-3-8B: 218M weights a layer; fused it keeps 4,096 of the output and 6,144 of q, k and v.
MODULES = AttentionSizes(32, 4096, 32, 218_103_808, 4096, whole=False, hidden=4096)
WHOLE = replace(MODULES, numbers=10_240, whole=True, rest=32_768)  # h, and gate and up of 14,336


@pytest.fixture(scope="module")
def llama():
    return shape(config_of("Llama-3-8B"))


def test_sizes_by_hand():
    assert (MODULES.bytes, WHOLE.bytes, WHOLE.all_bytes) == (2 * 4096 + 128, 20_608, 86_144)
    assert MODULES.share(24_576) == pytest.approx(0.316, abs=1e-3)


@pytest.mark.parametrize(
    ("policy", "given", "reach", "gigabytes", "layers"),
    [
        ("auto", WHOLE, 2048, (70, 45, 9), (5, 27)),  # all of them: 5.7 GB; everything else of a layer: 569 MB
        ("auto", WHOLE, 2048, (400, 300, 90), (32, 0)),
        ("auto", WHOLE, 2048, (20, 15, 9), (0, 27)),  # a quarter of 20
        ("auto", WHOLE, 2048, (70, 2, 9), (0, 11)),  # no more than the micro-batch leaves
        ("auto", WHOLE, 2048, (70, 45, 3), (0, 16)),  # nor beyond the size of a large one
        ("auto", WHOLE, 2048, (20, 0, 9), (0, 0)),
        ("auto", MODULES, 2048, (70, 45, 9), (0, 0)),  # saving takes longer than it spares
        ("auto", MODULES, 24_576, (20, 15, 0), (0, 32)),  # 2.3 GB, worth half of the memory
        ("attention", MODULES, 2048, (4, 3, 0), (0, 27)),
        ("attention", WHOLE, 2048, (4, 3, 0), (0, 11)),
        ("both", MODULES, 2048, (4, 1, 0), (0, 13)),
        ("layer", WHOLE, 99_999, (70, 70, 70), (0, 0)),
        ("offload", WHOLE, 99_999, (70, 70, 70), (0, 0)),
        ("all", WHOLE, 2048, (70, -1, 9), (0, 0)),  # 748 MB a layer
        ("all", WHOLE, 2048, (70, 1, 9), (1, 1)),
        ("all", WHOLE, 2048, (70, 10, 0), (13, 1)),
        ("all", WHOLE, 2048, (70, 45, 0), (32, 0)),
        ("all", MODULES, 2048, (4, 3, 0), (0, 27)),  # these keep attention
    ],
)
def test_layers_from_given_bytes(policy, given, reach, gigabytes, layers):
    """A forward of 8,688 tokens: 72 MB a layer of modules, 179 MB a whole one, 748 MB of all that it computes."""
    free, left, light = (GB * count for count in gigabytes)
    assert layers_that_keep(policy, given, 8688, reach, free, left, light) == layers


def test_whole_layers_in_the_host_s_memory():
    """A share of what is free there, and none of the device's; no budget leaves anything for it."""
    keep = partial(layers_that_keep, "both", WHOLE, 8688, 2048, 8 * GB, 0, 0)
    assert [keep(host=gb * GB) for gb in (0, 4, 64)] == [(0, 0), (0, 6), (0, 32)]
    assert reserved_bytes("both", WHOLE, 20_000, 60 * GB) == 0 < reserved_bytes("both", MODULES, 20_000, 60 * GB)


@pytest.mark.parametrize(
    ("folder", "limit", "taken", "files"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_s_limit_counts(folder, limit, taken, files, tmp_path, monkeypatch):
    """Of 64 MiB, 48 taken, of which 16 are files' pages; a limit above the machine's memory, or none, says nothing."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": GB}))
    assert free_of_host(tmp_path) == GB
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / limit).write_text(f"{64 << 20}\n")
    (group / taken).write_text(f"{48 << 20}\n")
    (group / "memory.stat").write_text(f"cache 5\n{files} {16 << 20}\nactive_file 7\n")
    assert free_of_host(tmp_path) == 32 << 20
    (group / taken).write_text(f"{96 << 20}\n")
    assert free_of_host(tmp_path) == 0
    for most in ("9223372036854771712", "max"):
        (group / limit).write_text(most)
        assert free_of_host(tmp_path) == GB


def test_what_auto_keeps_lowers_no_budget(llama):
    """On cards of 12 to 80 GB: as many tokens as without, and where they fill a micro-batch hardly anything is kept."""
    config = text_config(llama)
    for gb in (12, 24, 80):
        free = gb * GB - 7 * GB
        tokens = tokens_that_fit(free, config, True)
        assert reserved_bytes("auto", WHOLE, min(tokens, 20_000), free) == 0
        left = left_beside(free, config, tokens)
        whole, kept = layers_that_keep("auto", WHOLE, tokens, 1528, free, left, left_of_light(config, tokens))
        assert whole == 0
        assert kept * tokens * WHOLE.bytes < 1024 * bytes_per_token(config, 2, True)  # tokens come in steps of 1,024
        assert (left > 20 * GB) is (gb == 80)
    # Of a group of 8 completions all layers keep it on a large card; of an 8B model's 20,480 tokens none does.
    assert left_of_light(config, 8688) == (20_480 - 8688) * 557_056
    assert left_of_light(config, 20_983) == 0


def at_head(llama, batch, kept):
    """The states, once in float32, and the head's; the LoRA in 16 bits."""
    return kept + batch.tokens * 6 * 4096 + head_bytes(llama, batch, 2) + 2 * llama.adapter


def test_fit_decides_as_the_trainer_does(llama):
    settings = Settings(completions=8, prompt=504, completion=1024, engine="transformers", fused=True)
    assert sizes(llama, settings) == WHOLE
    assert sizes(llama, replace(settings, fused=False)) == MODULES
    total = card_bytes(80)
    batch = largest_micro_batch(llama, settings, total)
    assert keeping_layers(llama, batch, settings, 70 * GB) == (0, 0)  # the default here: layer
    auto = replace(settings, activations="auto")
    assert largest_micro_batch(llama, auto, total) == batch
    assert keeping_layers(llama, batch, auto, 70 * GB) == (1, 31)
    assert keeping_layers(llama, batch, replace(auto, cuda=False), 70 * GB) == (0, 0)
    assert keeping_layers(llama, batch, replace(auto, checkpointing=False), 70 * GB) == (0, 0)
    # Fullest at the head: of 32 layers attention is kept, of one the rest too.
    kept = batch.tokens * (32 * 8192 + 32 * WHOLE.bytes + 2 * WHOLE.rest)
    worked = kept_layer_peak(llama, batch, Route(fused=True))
    assert predict(llama, auto, total)[-1].parts[TEMPORARY] == at_head(llama, batch, kept) > kept + worked
    # Half of what is free for what was asked for, which then is missing for tokens.
    small = card_bytes(12)
    asked = replace(settings, activations="attention")
    assert largest_micro_batch(llama, asked, small).tokens < largest_micro_batch(llama, settings, small).tokens


def test_a_budget_for_all_of_a_layer(llama):
    """All that 32 layers compute where that leaves 4,096 tokens, else as much as leaves these; small cards nothing."""
    config, tokens, reserved = text_config(llama), [], []
    for gb in (3, 10, 17, 73):
        fits = tokens_that_fit(gb * GB, config, True)
        reserved.append(reserved_bytes("all", WHOLE, fits, gb * GB, bytes_per_token(config, 2, True)))
        tokens.append(tokens_that_fit(gb * GB, config, True, reserved[-1]))
    assert tokens == [2048, 4096, 4096, 16_384]
    assert reserved[0] == 0 < reserved[1] < reserved[2] < reserved[3] == 32 * WHOLE.all_bytes


def test_fit_counts_all_of_a_layer(llama):
    """As without checkpointing; and some layers lie between none and all."""
    settings = Settings(trainer="sft", packed=False, rows=2, prompt=0, completion=2048, fused=True, activations="all")
    batch, cpu = MicroBatch.padded(2, 2048, 4096, masked=False), replace(settings, cuda=False)
    assert keeping_layers(llama, batch, settings, 70 * GB) == keeping_layers(llama, batch, cpu, 0) == (32, 0)
    some = keeping_layers(llama, batch, settings, 8 * GB)
    assert some == (9, 1) and keeping_layers(llama, batch, replace(settings, fused=False), 8 * GB) == (0, 32)
    peaks = [
        activation_peak(llama, batch, Route(fused=True, whole=whole, attending=attending))
        for whole, attending in ((0, 0), some, (32, 0))
    ]
    assert peaks[0] < peaks[1] < peaks[2]
    without = activation_peak(llama, batch, Route(fused=True, checkpointing=False))
    assert peaks[2] == pytest.approx(without, rel=0.02)
    assert peaks[1] == at_head(llama, batch, 4096 * (32 * 8192 + 9 * WHOLE.all_bytes + WHOLE.bytes))
    assert kept_layer_peak(llama, batch, Route(fused=True)) == 2 * 4096 * (3 * 4096 + 4096 + 2 * 14_336)


def test_some_layers_and_norms_of_heads(llama):
    batch = MicroBatch(1000, 1000, 0)
    assert kept_attention_bytes(llama, batch, Route(attending=5)) == 5 * 1000 * MODULES.bytes
    qwen = replace(llama, head_norms=True)  # before their norms, too
    assert kept_attention_bytes(qwen, batch, Route(fused=True, attending=1)) == 1000 * (2 * 16_384 + 128)
    gemma, other = replace(llama, norms=4), replace(llama, norms=3)  # no whole layers there
    assert kept_attention_bytes(gemma, batch, Route(fused=True, attending=1)) == 1000 * WHOLE.bytes
    assert kept_attention_bytes(other, batch, Route(fused=True, attending=1)) == 1000 * MODULES.bytes


def test_kept_attention_is_what_torch_keeps():
    """Four layers of 8B's width, traced with and without: the peaks, and what keeping adds to them, to 4 %."""
    config = config_of("Llama-3-8B", num_hidden_layers=4)
    counted, batch = shape(config), MicroBatch.padded(1, 4096, kept=0)
    kept, peak = traced_peak(config, 1, 4096, True, activations="attention")
    gradients = adapter_bytes(counted) // 4
    predicted = activation_peak(counted, batch, Route(attending=4))
    assert predicted == pytest.approx(max(kept, peak - gradients), rel=0.04)
    plain, _ = traced_peak(config, 1, 4096, True)
    assert kept - plain == pytest.approx(4 * 4096 * MODULES.bytes, rel=0.04)
