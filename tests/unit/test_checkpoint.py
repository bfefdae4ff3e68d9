"""Checkpoints on disk: what a kill, a full disk, a flipped byte and a planted pickle leave behind."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slothrl import checkpoint
from slothrl.checkpoint import BadCheckpointError, DiskFullError

ROOT = Path(__file__).resolve().parents[2]
SAVER = """
import sys
from pathlib import Path
from slothrl import checkpoint

def fill(folder):
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        with (folder / name).open("wb") as file:
            for part in range(40):
                file.write(bytes([part]) * 10_000)

folder, step = Path(sys.argv[1]), int(sys.argv[2])
checkpoint.sweep(folder)
while True:
    step += 1
    checkpoint.write(folder, step, fill, {})
    checkpoint.rotate(folder, 3)
    print(step, flush=True)
"""


def fill(folder: Path) -> None:
    (folder / "adapter.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "inner").mkdir()
    (folder / "inner" / "state.json").write_text("{}")


def saved(folder: Path, *steps: int) -> list[Path]:
    return [checkpoint.write(folder, step, fill, {"note": step}) for step in steps]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_verifies(tmp_path):
    (path,) = saved(tmp_path, 7)
    assert path == tmp_path / "checkpoint-7"
    manifest = checkpoint.verify(path)
    assert (manifest["step"], manifest["note"]) == (7, 7)
    assert set(manifest["files"]) == {"adapter.safetensors", "inner/state.json"}
    assert manifest["files"]["inner/state.json"]["bytes"] == 2
    assert names(tmp_path) == {"checkpoint-7"}


def test_the_same_step_again_replaces(tmp_path):
    saved(tmp_path, 3)
    path = checkpoint.write(tmp_path, 3, fill, {"note": "second"})
    assert checkpoint.verify(path)["note"] == "second"
    assert names(tmp_path) == {"checkpoint-3"}


def damage_flip(path: Path) -> None:
    content = bytearray((path / "adapter.safetensors").read_bytes())
    content[5000] ^= 1
    (path / "adapter.safetensors").write_bytes(content)


def damage_truncate(path: Path) -> None:
    os.truncate(path / "adapter.safetensors", 100)


def damage_missing(path: Path) -> None:
    (path / "inner" / "state.json").unlink()


def damage_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_torn_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 40)


def damage_pickle(path: Path) -> None:
    (path / "optimizer.pt").write_bytes(pickle.dumps({"step": 1}))


def damage_listed_pickle(path: Path) -> None:
    """A pickle with a right entry in the manifest, as somebody who knows the format would plant it."""
    damage_pickle(path)
    manifest = json.loads((path / "manifest.json").read_text())
    file = path / "optimizer.pt"
    manifest["files"]["optimizer.pt"] = {"bytes": file.stat().st_size, "sha256": checkpoint.digest(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def damage_unknown(path: Path) -> None:
    (path / "more.json").write_text("{}")


DAMAGES = {
    damage_flip: "adapter.safetensors is not what was saved: its sha256 differs",
    damage_truncate: "adapter.safetensors has 100 bytes instead of 10240",
    damage_missing: "inner/state.json is missing",
    damage_no_manifest: "no manifest.json",
    damage_torn_manifest: "manifest.json cannot be read",
    damage_pickle: "holds optimizer.pt, and only safetensors and JSON are trusted",
    damage_listed_pickle: "holds optimizer.pt, and only safetensors and JSON are trusted",
    damage_unknown: "more.json, of which its manifest knows nothing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_one_is_skipped_with_the_reason(tmp_path, damage):
    first, second = saved(tmp_path, 2, 4)
    damage(second)
    search = checkpoint.newest(tmp_path)
    assert search.found == first
    ((path, reason),) = search.skipped
    assert path == second
    assert DAMAGES[damage] in reason


def test_none_left(tmp_path):
    (path,) = saved(tmp_path, 2)
    damage_flip(path)
    assert checkpoint.newest(tmp_path).found is None
    assert checkpoint.newest(tmp_path / "nowhere").found is None


def test_a_pickle_is_not_even_written(tmp_path):
    def bad(folder: Path) -> None:
        (folder / "training_args.bin").write_bytes(b"")

    with pytest.raises(BadCheckpointError, match="training_args.bin must not be in a checkpoint"):
        checkpoint.write(tmp_path, 1, bad, {})
    assert names(tmp_path) == set()


def test_a_failed_fill_leaves_nothing_and_raises(tmp_path):
    def bad(folder: Path) -> None:
        fill(folder)
        raise KeyError("x")

    saved(tmp_path, 1)
    with pytest.raises(KeyError):
        checkpoint.write(tmp_path, 2, bad, {})
    assert names(tmp_path) == {"checkpoint-1"}


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    paths = saved(tmp_path, 90, 1, 2, 10)  # 90 is of an earlier run in this folder
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "checkpoint-old").mkdir()
    checkpoint.rotate(tmp_path, None)
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    checkpoint.rotate(tmp_path, 3, paths[-1])
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [10, 2, 1]
    checkpoint.rotate(tmp_path, 2, paths[-1], paths[1])
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [10, 1]
    checkpoint.rotate(tmp_path, 1, paths[-1], None)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-old"}


def test_later_ones_are_put_aside(tmp_path):
    saved(tmp_path, 2, 4, 6)
    assert {path.name for path in checkpoint.set_aside(tmp_path, above=2)} == {
        "abandoned-checkpoint-4",
        "abandoned-checkpoint-6",
    }
    assert checkpoint.newest(tmp_path).found == tmp_path / "checkpoint-2"


def test_sigkill_during_a_save(tmp_path):
    """Twelve kills at random moments of a process that does nothing but save: what it announced is there, whole."""
    chance, last, torn = random.Random(0), 0, 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), str(last)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        announced = process.communicate()[0].split()
        torn += any(path.name.startswith(".checkpoint-") for path in tmp_path.iterdir())
        search = checkpoint.newest(tmp_path)
        assert search.found is not None
        assert search.skipped == []  # a torn one never gets the name of a checkpoint
        assert checkpoint.step_of(search.found) >= int(announced[-1] if announced else last + 1)
        last = checkpoint.step_of(search.found)
    assert torn > 0  # else no kill hit a save
    checkpoint.sweep(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- a full disk ----------------------------------------------------------------------------------------------------


def test_more_than_is_free_is_refused_beforehand(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(DiskFullError, match="disk full: checkpoint-2 needs 1,000,000,000,000,000 bytes .* are free in"):
        checkpoint.write(tmp_path, 2, fill, {}, needed=10**15)
    assert names(tmp_path) == {"checkpoint-1"}
    assert DiskFullError.exit_code == 1


FULL = """
import sys
from pathlib import Path
import torch
from slothrl import checkpoint
from slothrl.tensor_tree import save_tree

folder = Path(sys.argv[1])
def fill(count):
    return lambda place: [save_tree(place, f"state{i}", {"values": torch.ones(100_000)}) for i in range(count)]

checkpoint.write(folder, 1, fill(2), {})  # 0.8 MB
try:
    checkpoint.write(folder, 2, fill(4), {})  # 1.6 MB more than the 2 MB hold
except checkpoint.DiskFullError as error:
    print(error)
print(checkpoint.newest(folder).found.name, [path.name for path in folder.iterdir()])
checkpoint.make_room(folder, 1_600_000, limit=3)
print(len(checkpoint.checkpoints(folder)))  # three are allowed, and nobody deletes the only one
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare for a small filesystem")
def test_enospc_during_a_save(tmp_path):
    """A tmpfs of 2 MB, so that the error is the filesystem's own, in the middle of a file."""
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=2m tmpfs "$1" || exit 77; shift; exec "$@"', "sh"]
    command = [*mounted, str(tmp_path), sys.executable, "-c", FULL, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    first, second, third = done.stdout.splitlines()
    assert first.startswith("disk full: checkpoint-2 needs 1,")
    assert second == "checkpoint-1 ['checkpoint-1']"
    assert third == "1"
