"""Where reward functions come from: entry points, modules and files. Only `slothrl.rewards` needs to import this."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import reprlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from slothrl.errors import UserError

KIND = "reward function"
GROUP = "slothrl.rewards"
GROUPS = {KIND: GROUP, "loss": "slothrl.losses", "advantage": "slothrl.advantages"}  # of entry points
# pyproject.toml's entry points once more (name: module), so that they resolve where nothing is installed.
BUILTIN = {
    "exact_match": "exact",
    "number_match": "number",
    "regex_format": "format",
    "tag_format": "format",
    "length_penalty": "length",
    "arithmetic": "arithmetic",
    "gsm8k": "gsm8k",
    "countdown": "countdown",
    "math_answer": "math_answers",
    "json_schema": "json_format",
    "xml_format": "json_format",
    "repetition_penalty": "repetition",
    "language_consistency": "language",
    "llm_judge": "judge",
    "code_tests": "code",
}
FORMS = "pkg.mod:function or ./file.py:function"


@dataclass(frozen=True)
class RewardSpec:
    """A name taken apart; an entry point's has neither module nor path."""

    text: str
    function: str  # also its key in reward.params
    module: str | None = None
    path: Path | None = None
    kind: str = KIND  # in messages; losses and advantages are named and loaded the same way


def parse(text: str, root: Path | None = None, kind: str = KIND) -> RewardSpec:
    """Take a name apart; nothing is looked up.

    Args:
        text: an entry point's name, `pkg.mod:function` or `./file.py:function`.
        kind: a key of `GROUPS`.
        root: folder that a relative path starts from; default: the current one.

    Raises:
        UserError: `text` is none of these.
    """
    place, colon, function = str(text).strip().rpartition(":")
    if not colon and function and "/" not in function and not function.endswith(".py"):
        return RewardSpec(text, function, kind=kind)
    if function.isidentifier() and place.endswith(".py"):
        return RewardSpec(text, function, path=(root or Path.cwd()) / Path(place).expanduser(), kind=kind)
    if function.isidentifier() and all(part.isidentifier() for part in place.split(".")):
        return RewardSpec(text, function, module=place, kind=kind)
    hint = f" (the function's name is missing: {text}:my_function)" if function.endswith(".py") else ""
    raise UserError(f"{kind} {text!r} is neither an entry point's name nor {FORMS}{hint}")


def check_static(spec: RewardSpec) -> None:
    """What shows without importing anybody's code.

    Raises:
        UserError: unknown entry point, no such file or package, or the file defines no such function.
    """
    if spec.path:
        names = _top_level_names(spec, spec.path)
        if names is not None and spec.function not in names:
            raise _absent(spec, names)
    elif spec.module:
        package = spec.module.partition(".")[0]  # finding a submodule would import its package
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise _no_module(spec, package)
    else:
        _entry_point(spec)


def resolve(spec: RewardSpec) -> tuple[Any, str]:
    """Import what a name stands for.

    Returns:
        The function, not yet checked, and its source for the report: "entry point exact_match" or the name with the
        first digits of its file's SHA-256.

    Raises:
        UserError: it cannot be found, or importing it failed.
    """
    point = None if spec.path or spec.module else _entry_point(spec)
    function = point.attr if point else spec.function
    module = _import(spec, point.module if point else spec.module)
    value: Any = module
    for attribute in function.split("."):
        if not hasattr(value, attribute):
            raise _absent(spec, [name for name, item in vars(module).items() if callable(item)])
        value = getattr(value, attribute)
    if point:
        owner = f" ({point.dist.name} {point.dist.version})" if point.dist else ""
        return value, f"entry point {spec.function}{owner}"
    file = getattr(module, "__file__", None) or ""
    if not file.endswith(".py"):
        return value, spec.text
    return value, f"{spec.text} sha256 {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}"


def mentions(spec: RewardSpec, word: str) -> bool:
    """Whether the source of a name's module holds `word`; nothing is imported. False where there is no source."""
    if spec.path:
        return spec.path.is_file() and word in _read(spec, spec.path)
    top, *rest = (spec.module or _entry_point(spec).module).split(".")
    found = importlib.util.find_spec(top)
    folders = [Path(folder).joinpath(*rest) for folder in (found and found.submodule_search_locations) or []]
    files = [folder / "__init__.py" for folder in folders] + [folder.with_suffix(".py") for folder in folders if rest]
    files += [Path(found.origin)] if found and found.origin and not rest else []
    return any(file.suffix == ".py" and file.is_file() and word in _read(spec, file) for file in files)


_SET_UP: set[str] = set()  # modules whose setup() has run in this process


def set_up(spec: RewardSpec, function: Any) -> None:
    """Call the `setup()` that the function's module defines without parameters, if any, once a process.

    Raises:
        UserError: it failed.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    hook = getattr(module, "setup", None)
    if not isinstance(hook, FunctionType) or module is None or hook.__module__ != module.__name__:
        return  # none, or one that the module only imported, such as setuptools'
    if hook.__code__.co_argcount or module.__name__ in _SET_UP:
        return
    _SET_UP.add(module.__name__)
    try:
        hook()
    except (Exception, SystemExit) as error:
        where = place(error, hook.__code__.co_filename)
        raise UserError(f"{spec.kind} {spec.text!r}: setup() raised {told(error)} ({where})") from error


def _entry_point(spec: RewardSpec) -> EntryPoint:
    name, group, builtin = spec.function, GROUPS[spec.kind], BUILTIN if spec.kind == KIND else {}
    if name in builtin:  # before the scan: fast, and nobody else can take a built-in's name
        return EntryPoint(name, f"slothrl_rewards.{BUILTIN[name]}:{name}", GROUP)
    points = {point.name: point for point in entry_points(group=group)}
    offers = {point.value for point in entry_points(group=group, name=name)}
    if len(offers) > 1:
        raise UserError(f"{spec.kind} {name!r} is offered more than once; name one: {', '.join(sorted(offers))}")
    if not offers:
        known = sorted({*builtin, *points})
        there = f"there are {', '.join(known)}"
        raise UserError(f"unknown {spec.kind} {name!r}{nearest(name, known)}; {there}; write your own as {FORMS}")
    return points[name]


def _read(spec: RewardSpec, path: Path) -> str:
    if not path.is_file():
        folder = "" if path.parent.is_dir() else " (nor its folder)"
        raise UserError(f"{spec.kind} {spec.text!r}: there is no file {path}{folder}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{spec.kind} {spec.text!r}: cannot read {path}: {told(error)}") from error


def _top_level_names(spec: RewardSpec, path: Path) -> list[str] | None:
    """The names that a file defines; None where that shows only at run time (a star import)."""
    try:
        tree = ast.parse(_read(spec, path), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise _failed(spec, error, str(path)) from error
    names = [name for statement in tree.body for name in _defined(statement)]
    return None if "*" in names or "__getattr__" in names else names


def _defined(statement: ast.AST) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store):
        yield statement.id
    else:  # assignments, and whatever stands under if, try, with, for
        for child in ast.iter_child_nodes(statement):
            yield from _defined(child)


def _import(spec: RewardSpec, name: str | None) -> ModuleType:
    file = str(spec.path) if spec.path else None
    try:
        return _import_file(spec, spec.path) if spec.path else importlib.import_module(str(name))
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise _no_module(spec, error.name) from error
        raise _failed(spec, error, file) from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script without a main guard may well call sys.exit
        raise _failed(spec, error, file) from error


class _FreshLoader(SourceFileLoader):
    """Compiles what the file holds now: a .pyc can be stale within one second, and would be left beside the file."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(spec: RewardSpec, path: Path) -> ModuleType:
    content = _read(spec, path)
    digest = hashlib.sha256(f"{path.resolve()}\n{content}".encode()).hexdigest()[:16]
    name = f"slothrl_reward_file_{path.stem}_{digest}"  # the same file twice is one module; an edited one is another
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path, loader=_FreshLoader(name, str(path)))
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by name
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _absent(spec: RewardSpec, names: Iterable[str]) -> UserError:
    names = sorted(name for name in names if not name.startswith("_"))
    close = nearest(spec.function, names) or (f" (it has {', '.join(names[:10])})" if names else "")
    where = spec.path.name if spec.path else spec.module or "its package"
    return UserError(f"{spec.kind} {spec.text!r}: {where} has no {spec.function!r}{close}")


def _no_module(spec: RewardSpec, name: str) -> UserError:
    hint = "install it, put its folder on PYTHONPATH, or name the file: ./file.py:function"
    return UserError(f"{spec.kind} {spec.text!r}: there is no module {name!r}; {hint}")


def _failed(spec: RewardSpec, error: BaseException, file: str | None) -> UserError:
    where = place(error, file)
    return UserError(f"{spec.kind} {spec.text!r} raised {told(error)} at import" + (f" ({where})" if where else ""))


def nearest(name: str, options: Iterable[str]) -> str:
    """The valid names closest to a wrong one, as "; did you mean a, b?", or ""."""
    close = difflib.get_close_matches(name, list(options), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def told(error: BaseException) -> str:
    """An exception on one line: "ValueError: no such unit"."""
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return type(error).__name__ + (f": {message[:300]}" if message else "")


def place(error: BaseException, file: str | None) -> str:
    """The innermost line of `file` that the error passed (without a file: of all), as "my.py, line 12", or ""."""
    if isinstance(error, SyntaxError) and error.filename and file in (None, error.filename):
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen") and file in (None, frame.filename)]
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""


def described(value: Any) -> str:
    """A value as an error message shows it: "a str ('good')", "an int (3)"."""
    kind = type(value).__name__
    try:
        shown = f" ({reprlib.repr(value)})"
    except Exception:  # a foreign __repr__, or an int past the conversion limit
        shown = ""
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}{shown}"
