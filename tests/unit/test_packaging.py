"""The wheel has what it should and nothing at the top that shadows another package; it runs from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("slothrl", "kernels", "rewards", "conf")
NAMED = ("README.md", "LICENSE")  # by pyproject.toml


def python(*arguments: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    for tool in ("build", "hatchling"):
        pytest.importorskip(tool)
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    for name in NAMED:
        text = (ROOT / name).read_text(encoding="utf-8") if (ROOT / name).exists() else name
        (source / name).write_text(text, encoding="utf-8")
    command = ("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source))
    found = python(*command, path=[], cwd=out)
    assert found.returncode == 0, found.stdout + found.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked, as pip would leave it in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def hf_kernels(tmp_path) -> Path:
    """A folder with what stands for Hugging Face's package of the name `kernels`."""
    (tmp_path / "hf" / "kernels").mkdir(parents=True)
    (tmp_path / "hf" / "kernels" / "__init__.py").write_text("def get_kernel(*_): return 'HF'\n", encoding="utf-8")
    return tmp_path / "hf"


@pytest.mark.parametrize("name", NAMED)
def test_files_that_pyproject_names(name):
    assert (ROOT / name).is_file()


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "slothrl", "slothrl_kernels", "slothrl_rewards"
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    for expected in ("slothrl/__main__.py", "slothrl/conf/config.yaml", "slothrl/trainers/grpo.py"):
        assert expected in names
    for package, folder in (("slothrl_kernels", "kernels"), ("slothrl_rewards", "rewards"), ("slothrl", "")):
        sources = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder / package).rglob("*.py")}
        assert sources == {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}
    configs = {f"slothrl/conf/{path.relative_to(ROOT / 'conf').as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert configs == {name for name in names if name.endswith(".yaml")}


def test_entry_points(installed):
    from slothrl.reward_sources import BUILTIN

    text = next(installed.glob("*.dist-info/entry_points.txt")).read_text(encoding="utf-8")
    assert "slothrl = slothrl.__main__:main" in text
    rewards = text.split("[slothrl.rewards]")[1].split("[")[0].split()
    pairs = dict(zip(rewards[::3], rewards[2::3], strict=True))
    assert pairs == {name: f"slothrl_rewards.{module}:{name}" for name, module in BUILTIN.items()}


@pytest.mark.parametrize("with_hf", [False, True], ids=["alone", "beside HF kernels"])
def test_wheel_runs_from_elsewhere(installed, hf_kernels, with_hf, tmp_path):
    path = [installed, *([hf_kernels] if with_hf else [])]
    found = python("-m", "slothrl", "data=countdown", "gpu=cpu", "--cfg", "job", path=path, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "source: countdown" in found.stdout
    found = python("-m", "slothrl", "gpu=cpu", "trainer.num_generations=7", path=path, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: trainer.num_generations=7 does not divide the generation batch of 32")
    code = (
        "import slothrl, slothrl_kernels, slothrl_rewards, slothrl.compose as c, importlib.util as u\n"
        "rewards = u.find_spec('rewards')\n"  # an editable install shows the folder, which is no package
        "print(slothrl.__file__, c.conf_dir(), u.find_spec('kernels') is not None, getattr(rewards, 'origin', None))"
    )
    found = python("-c", code, path=path, cwd=tmp_path)
    expected = [str(installed / "slothrl" / "__init__.py"), str(installed / "slothrl" / "conf")]
    assert found.stdout.split()[:2] == expected, found.stderr
    if with_hf:
        code = "import slothrl, kernels; print(kernels.get_kernel())"
        assert python("-c", code, path=path, cwd=tmp_path).stdout == "HF\n"
    assert found.stdout.split()[3] == "None"


def test_no_package_is_called_kernels_or_rewards():
    """transformers imports whatever is called `kernels`, and crashes on ours; a folder without __init__ is safe."""
    for folder in ("kernels", "rewards"):
        assert (ROOT / folder).is_dir()
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("with_hf", [False, True], ids=["alone", "beside HF kernels"])
def test_transformers_beside_the_checkout(with_hf, hf_kernels, tmp_path):
    path = [ROOT, *([hf_kernels] if with_hf else [])]
    code = "import sys; from transformers import LlamaForCausalLM as m; print(m.__name__, m.__module__)"
    found = python("-c", code, path=path, cwd=tmp_path)
    assert found.stdout == "LlamaForCausalLM transformers.models.llama.modeling_llama\n", found.stderr
    if with_hf:  # a real package wins over a folder, even one that comes first
        assert python("-c", "import kernels; print(kernels.get_kernel())", path=path, cwd=tmp_path).stdout == "HF\n"


def test_import_slothrl_is_light(tmp_path):
    code = (
        "import sys, slothrl\n"
        "heavy = ('torch', 'trl', 'transformers', 'peft', 'datasets', 'vllm', 'hydra', 'matplotlib')\n"
        "print(slothrl.__version__, [m for m in heavy if m in sys.modules], 'GRPOTrainer' in slothrl.__all__)"
    )
    found = python("-c", code, path=[ROOT, ROOT / "kernels", ROOT / "rewards"], cwd=tmp_path)
    assert found.stdout == "0.1.0 [] True\n", found.stderr


def test_leaves_import_nothing_of_ours(tmp_path):
    code = (
        "import sys, slothrl_rewards, slothrl_rewards.exact, slothrl_rewards.countdown\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('slothrl', 'torch', 'transformers')])"
    )
    found = python("-c", code, path=[ROOT / "rewards"], cwd=tmp_path)
    assert found.stdout == "[]\n", found.stderr
    code = "import sys, slothrl_kernels; print([m for m in sys.modules if m.split('.')[0] in ('slothrl', 'trl')])"
    found = python("-c", code, path=[ROOT / "kernels"], cwd=tmp_path)
    assert found.stdout == "[]\n", found.stderr
