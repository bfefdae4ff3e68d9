"""The notebooks run from top to bottom as they are committed, and are committed without outputs."""

import os
import sys
from pathlib import Path

import pytest

from slothrl.embedded import EMBEDDED, embedded_folder
from slothrl.errors import UserError
from slothrl.report import read_json

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["01_quickstart", "02_custom_reward", "03_where_the_memory_goes"]


@pytest.fixture(scope="module")
def model():
    """The embedded model, converted before any clock runs."""
    try:
        return embedded_folder(next(iter(EMBEDDED)))
    except UserError as error:
        pytest.skip(str(error))


def execute(name: str, folder: Path, monkeypatch):
    """Run a notebook in `folder`, in a kernel of this very interpreter that finds the checkout's packages."""
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        @property
        def kernel_cmd(self) -> list[str]:  # whatever kernelspecs this machine has
            return [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

        def format_kernel_cmd(self, extra_arguments=None) -> list[str]:
            return [part.replace("{connection_file}", self.connection_file) for part in self.kernel_cmd]

    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "rewards"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        kernel_manager_class=Kernel,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()  # raises where a cell does
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    return outputs


def printed(outputs) -> str:
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(texts)


def has_picture(outputs) -> bool:
    return any("image/png" in output.get("data", {}) for output in outputs)


def test_all_notebooks_are_here():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert "/work/" not in path.read_text() and "/home/" not in path.read_text()
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_quickstart(model, tmp_path, monkeypatch):
    outputs = execute("01_quickstart", tmp_path, monkeypatch)
    (summary,) = tmp_path.glob("outputs/*/summary.json")
    assert read_json(summary)["steps"] == 3
    assert (summary.parent / "adapter" / "adapter_model.safetensors").is_file()
    assert has_picture(outputs)
    assert "did you mean trainer.learning_rate" in printed(outputs)


def test_custom_reward(model, tmp_path, monkeypatch):
    outputs = execute("02_custom_reward", tmp_path, monkeypatch)
    (summary,) = tmp_path.glob("outputs/*/summary.json")
    assert read_json(summary)["steps"] == 2
    text = printed(outputs)
    assert "[1.0, 0.5, 0.0, 0.3333333333333333, None]" in text
    assert "reward one_for_all returned 1 scores" in text
    assert "rewards/close/mean" in text


def test_where_the_memory_goes(model, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    outputs = execute("03_where_the_memory_goes", tmp_path, monkeypatch)
    text = printed(outputs)
    for name in ("4-bit weights", "embeddings = head (tied)", "optimizer state"):
        assert name in text
    assert has_picture(outputs)
    measured, estimated = (
        float(next(line for line in text.splitlines() if line.startswith(word)).split()[1])
        for word in ("measured", "estimated")
    )
    assert measured == pytest.approx(estimated, rel=0.05)
    (phases,) = (line.split() for line in text.splitlines() if line.startswith("MB "))
    assert phases == ["MB", "rollout", "update"]
    # Two float32 moments a LoRA value, of which there are 2.44M at r=8.
    optimizer = [line.split() for line in text.splitlines() if line.startswith("optimizer ")][-1]
    assert optimizer[0] == "optimizer" and int(optimizer[-1]) == 20
