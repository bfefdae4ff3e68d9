"""How many layers keep everything within a budget (`model.activation_gib`), from given bytes; what `fit` says of it."""

from dataclasses import replace
from functools import partial

import pytest
from test_fit import shape

from slothrl.fit_activations import MicroBatch, Route, activation_peak, head_bytes, kept_layer_peak, layer_peak
from slothrl.fit_batch import budget, keeping_layers, sizes
from slothrl.fit_memory import Settings, allocated, update
from slothrl.kept_attention import AttentionSizes, layers_on_a_cpu, layers_that_keep, reserved_bytes
from slothrl.token_bytes import bytes_per_token, left_beside, tokens_that_fit
from tests.gpu.fit_models import config_of

GB, GIB, TOKENS = 10**9, 1 << 30, 4096
# Llama-3-8B, 2 x 2,048 tokens: all of a layer 353 MB, 34 more with its input, 84 of them attention's.
WHOLE = AttentionSizes(32, 4096, 32, 218_103_808, 10_240, whole=True, rest=32_768, hidden=4096)
MODULES = replace(WHOLE, numbers=4096, whole=False, rest=0)
ALL, ATTENTION, INPUT = (TOKENS * count for count in (86_144, 20_608, 8192))


@pytest.fixture(scope="module")
def llama():
    return shape(config_of("Llama-3-8B"))


@pytest.mark.parametrize(
    ("policy", "given", "within", "gigabytes", "layers"),
    [
        ("layer", WHOLE, GIB, (70, 45, 9), (3, 0)),  # 1,059 of 1,074 MB
        ("layer", WHOLE, 3 * ALL - 1, (70, 45, 9), (2, 0)),
        ("layer", WHOLE, GIB, (70, 1, 9), (2, 0)),  # no more than the micro-batch leaves
        ("layer", WHOLE, GIB, (70, 0, 9), (0, 0)),
        ("layer", WHOLE, 100 * GIB, (70, 45, 9), (32, 0)),
        ("layer", WHOLE, 0, (70, 45, 9), (0, 0)),
        ("layer", MODULES, GIB, (70, 45, 9), (0, 0)),  # only where a layer is one step
        ("offload", WHOLE, GIB, (70, 45, 9), (2, 0)),  # with their inputs 1,159 MB
        ("offload", WHOLE, 3 * (ALL + INPUT), (70, 45, 9), (3, 0)),
        ("attention", WHOLE, GIB, (70, 45, 9), (3, 29)),
        ("attention", WHOLE, GIB, (4, 2, 9), (3, 11)),  # of what these leave: 941 MB
        ("attention", MODULES, GIB, (4, 2, 9), (0, 32)),
        ("all", WHOLE, GIB, (70, 45, 9), (3, 29)),  # at most
        ("all", WHOLE, 100 * GIB, (70, 1, 9), (2, 3)),
        ("all", WHOLE, 0, (70, 45, 9), (0, 32)),
        ("auto", WHOLE, GIB, (70, 45, 9), (3, 29)),  # of 24 that it would have
        ("auto", WHOLE, 100 * GIB, (70, 45, 9), (23, 9)),
        ("auto", WHOLE, GIB, (8, 2, 9), (0, 23)),  # attention first: a quarter of 8 GB
    ],
)
def test_layers_within_a_budget(policy, given, within, gigabytes, layers):
    free, left, light = (GB * count for count in gigabytes)
    assert layers_that_keep(policy, given, TOKENS, 2048, free, left, light, within=within) == layers


def test_beside_layers_in_the_host_s_memory():
    """What the host has no room for keeps its input, and an input counts where others' are there."""
    keep = partial(layers_that_keep, "both", WHOLE, TOKENS, 2048, 70 * GB, 45 * GB, 0)
    assert [keep(host=64 * GB, within=int(gib * GIB)) for gib in (0.3, 0.4, 0.8, 1.2, 1.6)] == [
        (whole, 32 - whole) for whole in (0, 1, 2, 3, 4)
    ]
    assert keep(host=2 * GB, within=GIB) == (2, 7)
    assert keep(host=64 * GB) == (0, 32)


def test_on_a_cpu():
    keep = partial(layers_on_a_cpu, sizes=WHOLE, tokens=TOKENS)
    assert [keep(policy) for policy in ("layer", "auto", "attention", "offload", "both", "all")] == [
        (0, 0), (0, 0), (0, 32), (0, 0), (0, 32), (32, 0),
    ]  # fmt: skip
    assert [keep(policy, within=GIB) for policy in ("layer", "auto", "attention", "offload", "both", "all")] == [
        (3, 0), (0, 0), (3, 29), (2, 0), (2, 30), (3, 29),
    ]  # fmt: skip


@pytest.mark.parametrize("gigabytes", [10, 17, 60])
@pytest.mark.parametrize("policy", ["layer", "both", "attention"])
def test_a_micro_batch_leaves_the_budget(policy, gigabytes, llama):
    """In steps of 1,024 tokens the usable bytes hold the micro-batch and so much more."""
    settings = Settings(activations=policy, engine="transformers", fused=True, within=2 * GIB)
    without, within = (budget(llama, each, gigabytes * GB) for each in (replace(settings, within=None), settings))
    each, config = bytes_per_token(config_of("Llama-3-8B"), 2, True), config_of("Llama-3-8B")
    usable, kept = left_beside(gigabytes * GB, config, 0), 0
    if policy == "attention":
        kept = reserved_bytes(policy, WHOLE, tokens_that_fit(gigabytes * GB, config, True), gigabytes * GB)
    if gigabytes < 60:
        assert within < without
        assert within * each + 2 * GIB <= usable < (within + 1024) * (each + kept) * usable / (usable - 2 * GIB)
    else:
        assert within == without == 24_576  # as many as are of use, all the same


def test_a_budget_larger_than_memory_reserves_what_layers_can_keep():
    reserve = partial(reserved_bytes, sizes=WHOLE, tokens=20_000, free=60 * GB, each=557_056, usable=40 * GB)
    assert reserve("layer", within=100 * GIB) == 32 * WHOLE.all_bytes
    assert reserve("layer", within=10 * GB) == int(10 * 557_056 / 30)
    assert reserve("all") == int((20_000 / 4096 - 1) * 557_056) > reserve("all", within=10 * GB) == 185_685
    assert reserve("auto", within=10 * GB) == reserve("layer") == reserve("layer", sizes=MODULES, within=GIB) == 0


def test_fit_counts_layers_within_a_budget(llama):
    settings = Settings(trainer="sft", packed=False, rows=2, prompt=0, completion=2048, fused=True, activations="both")
    batch = MicroBatch.padded(2, 2048, 2048, masked=False)
    assert sizes(llama, settings) == WHOLE
    peaks = []
    for gib in (None, 0.4, 0.8, 1.2):
        asked = replace(settings, within=None if gib is None else int(gib * GIB))
        found = keeping_layers(llama, batch, asked, 70 * GB)
        assert found == (0 if gib is None else round(gib / 0.4), 2)  # two at a time on their way
        route = replace(asked.route, whole=found[0], attending=2)
        peaks.append(activation_peak(llama, batch, route))
    assert keeping_layers(llama, batch, replace(asked, activations="offload"), 70 * GB) == (3, 0)
    assert keeping_layers(llama, batch, replace(asked, activations="layer", cuda=False), 0) == (3, 0)
    assert keeping_layers(llama, batch, replace(asked, fused=False), 70 * GB)[0] == 0
    # Two layers on their way, and one computed again; or those that keep all, and the head.
    assert peaks[0] == 2 * (ATTENTION + INPUT) + layer_peak(llama, batch, Route(fused=True))
    head = TOKENS * 6 * 4096 + head_bytes(llama, batch, 2) + 2 * llama.adapter
    worked = kept_layer_peak(llama, batch, Route(fused=True))
    assert worked < head
    # The input and attention's output of the layer below come back meanwhile.
    assert peaks[1] == peaks[0] > max(ALL + INPUT + head, ALL + INPUT + worked + TOKENS * 2 * 8192)
    assert [peaks[2], peaks[3]] == [whole * (ALL + INPUT) + head for whole in (2, 3)]
    mask = 2 * 2 * 2048 * 2048  # of padded rows, in 16 bits
    large = replace(asked.route, attending=2, tile=2**28)  # no tiles on 80 GiB
    assert allocated(update(llama, asked, 80 * GIB).parts) - allocated(
        update(llama, replace(asked, within=None), 80 * GIB).parts
    ) == pytest.approx(peaks[3] - activation_peak(llama, batch, large), abs=1.1 * mask)
    assert activation_peak(llama, batch, large) > peaks[0]
