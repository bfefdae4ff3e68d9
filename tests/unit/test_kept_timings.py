"""Timings in the user's cache: whole or not at all, by GPU and versions; what attention and layers make of them."""

import json

import pytest
import torch
from slothrl_kernels import PackedLayout, attention_choice, kept_timings
from slothrl_kernels.attention_choice import Choice, choose
from slothrl_kernels.attention_rule import Rule
from slothrl_kernels.kept_timings import keep, recall, timed_on, timings_file

from slothrl import doctor, fuse_timing
from slothrl.fuse import fuse
from slothrl.fuse_timing import Timing, layer_key
from tests.helpers import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "slothrl"


@pytest.fixture
def gpu(monkeypatch):
    """The name of a GPU that is not there, to be changed."""
    name = ["a GPU"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    return name


def test_files(folder, gpu):
    """One entry more leaves the others; a file that is damaged or holds something else is as good as none."""
    cuda = torch.device("cuda")
    assert timed_on(CPU) is None and recall("times", None) == {} and not keep("times", None, "k", 1)
    assert not folder.exists()
    first = timed_on(cuda)
    assert first is not None and first.startswith(f"a GPU, torch {torch.__version__}, triton ")
    assert recall("times", first) == {}
    assert keep("times", first, "a", {"ms": 1.5}) and keep("times", first, "b", 2)
    gpu[0] = "another GPU"
    other = timed_on(cuda)
    assert recall("times", other) == {} and keep("times", other, "a", 3)
    assert recall("times", first) == {"a": {"ms": 1.5}, "b": 2} and recall("times", other) == {"a": 3}
    assert [file.name for file in folder.iterdir()] == ["times.json"]
    for damage in ("{", "[]", json.dumps({first: [1]})):
        timings_file("times").write_text(damage)
        assert recall("times", first) == {}
        assert keep("times", first, "c", 4) and recall("times", first) == {"c": 4}


def test_a_folder_that_cannot_be_written(folder):
    folder.parent.joinpath("slothrl").write_text("a file where the folder would be")
    assert not keep("times", "a GPU", "a", 1) and recall("times", "a GPU") == {}


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on CUDA: there is no GPU here, and nothing of it is computed with."""

    is_cuda = True  # pyright: ignore


def call(layout: PackedLayout) -> tuple:
    q, k = (torch.zeros(layout.tokens, heads, 64, dtype=torch.bfloat16).as_subclass(OnCuda) for heads in (4, 2))
    return q, k, k, layout, Rule(0.125)


def test_attention_is_measured_by_the_first_process_alone(gpu, monkeypatch):
    """A stand-in measures; the choice and where it came from are real. Other kinds, versions and GPUs are measured."""
    measured = []

    def measure(serving, run, leaves):
        measured.append(tuple(serving))
        return Choice("sdpa", {"triton": 1.5, "sdpa": 1.25} if len(measured) < 3 else {"sdpa": "no memory"})

    monkeypatch.setattr(attention_choice, "_measure", measure)
    monkeypatch.setattr(attention_choice, "takes_triton", lambda impl, q: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kept_timings, "timed_on", lambda device: gpu[0])
    batch, rows = PackedLayout.build([40, 40]), PackedLayout.build([20] * 8)
    for turn in range(2):  # two processes
        monkeypatch.setattr(attention_choice, "CHOICES", {})
        assert choose(*call(batch), run=None) == "sdpa" and len(measured) == 1  # pyright: ignore
        assert choose(*call(PackedLayout.build([33, 33])), run=None) == "sdpa" and len(measured) == 1  # pyright: ignore
        assert ("; kept from an earlier run in " in attention_choice.said()[0]) == (turn == 1)
        assert "(triton 1.50 ms; sdpa 1.25 ms" in attention_choice.said()[0]
    assert measured == [("triton", "sdpa")]
    assert choose(*call(rows), run=None) == "sdpa" and len(measured) == 2  # pyright: ignore
    gpu[0] = "another GPU"
    for count in (3, 4):  # none of them ran: that is not kept
        monkeypatch.setattr(attention_choice, "CHOICES", {})
        choose(*call(batch), run=None)  # pyright: ignore
        assert len(measured) == count
    gpu[0] = "a GPU"
    file = timings_file("attention_choices")
    file.write_text(file.read_text().replace('"sdpa",', '"a backend of tomorrow",'))
    choose(*call(batch), run=None)  # pyright: ignore
    assert len(measured) == 5


def test_a_layer_is_timed_by_the_first_run_alone(gpu, monkeypatch):
    """Fused, by times that a first run kept, and taken away, by others: no layer runs."""
    monkeypatch.setattr(kept_timings, "timed_on", lambda device: gpu[0])
    monkeypatch.setattr(fuse_timing, "TOKENS", 16)
    monkeypatch.setattr(fuse_timing, "REPEATS", 1)
    first = fuse(tiny_model(50), only_if_faster=True)
    assert "ms fused" in first.notes[-1] and "kept" not in first.notes[-1]
    (stored,) = recall("fused_layers", "a GPU").items()
    assert stored[0].startswith("LlamaDecoderLayer, 64 wide, float32, 16 tokens, ")

    def fails(*args):
        raise AssertionError("timed again")

    monkeypatch.setattr(fuse_timing, "_timed", fails)
    for fused, plain in ((1.0, 1.5), (1.5, 1.0)):
        keep("fused_layers", "a GPU", stored[0], {"fused": fused, "plain": plain})
        report = fuse(tiny_model(50), only_if_faster=True)
        assert f"{fused:.2f} ms fused, {plain:.2f} ms as it was (kept from an earlier run in " in report.notes[-1]
        assert bool(report.fused) == (fused < plain) and ("slower fused" in dict(report.rows())["not fused"]) == (
            fused > plain
        )
    gpu[0] = "another GPU"
    assert "not timed: AssertionError: timed again" in fuse(tiny_model(50), only_if_faster=True).notes[-1]
    keep("fused_layers", "another GPU", stored[0], "nothing to read")
    assert "not timed" in fuse(tiny_model(50), only_if_faster=True).notes[-1]


def test_what_a_layer_is_told_apart_by():
    def key(model, replacements=()):
        return layer_key(model, model.model.layers[0], replacements)

    model = tiny_model(50)
    known = key(model)
    assert known == key(tiny_model(90, layers=1)) == key(tiny_model(50))
    fuse(model)
    found = vars(model)["_slothrl_replacements"]
    inside = set(model.model.layers[0].modules())
    others = [key(tiny_model(50, hidden=32)), key(tiny_model(50).bfloat16()), key(tiny_model(50).requires_grad_(False))]
    others.append(key(model, [replacement for replacement in found if replacement.module in inside]))
    assert len({known, *others}) == 5 and str(Timing(1.0, 2.0)).endswith("2.00 ms as it was")


def test_the_doctor_counts_them(gpu, monkeypatch):
    assert doctor.timings().status == (doctor.OK if torch.cuda.is_available() else doctor.NOTE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    keep("attention_choices", attention_choice.measured_on(torch.device("cuda")), "a", {})
    assert doctor.timings().detail.startswith("1 of attention, 0 of layers, in ")
    folder = timings_file("attention_choices").parent
    timings_file("fused_layers").write_text("{")
    found = doctor.timings()
    assert found.status == doctor.NOTE and found.detail.endswith("; nothing can be read in fused_layers.json")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("a file where the folder would be")
    found = doctor.timings()
    assert found.status == doctor.NOTE and found.detail.endswith(f"none can be added: {folder} is a file")
    assert "XDG_CACHE_HOME" in found.fix
