"""From a command line to a checked config, through Hydra, with every mistake found at once and nearest names given."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import slothrl
from slothrl.checks import UNSET, detect_gpu, problems
from slothrl.config import Config
from slothrl.errors import ConfigError
from slothrl.trainer_fields import trainer_fields

# What Hydra raises for a wrong override: its own and OmegaConf's errors, and for an empty key a plain ValueError.
MISTAKES = (HydraException, OmegaConfBaseException, ValueError)
# Open dictionaries whose keys are the task's or the reward's own: no "+" needed to add one.
OPEN = ("data.task.", "reward.params.")


def conf_dir() -> Path:
    """Where the packaged groups lie: inside the package from a wheel, beside it in a checkout."""
    inside = Path(slothrl.__file__).parent / "conf"
    return inside if inside.is_dir() else Path(slothrl.__file__).parent.parent / "conf"


class SearchPath(SearchPathPlugin):
    """Puts the user's own folder before the packaged groups, so that a file of the same name replaces ours.

    Hydra's own --config-dir goes behind the primary config's folder and would lose.
    """

    overlay: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.overlay is not None:
            search_path.append("user", f"file://{self.overlay.resolve()}")
        search_path.append("slothrl", f"file://{conf_dir()}")


def register(overlay: Path | None = None) -> None:
    """Make schema and search path known to Hydra in this process.

    Args:
        overlay: the user's own config folder.
    """
    schema = OmegaConf.structured(Config)
    # Every field of TRL's configs is there under its own name, unset, so that an override needs no "+".
    names = sorted(set(trainer_fields("grpo")) | set(trainer_fields("sft")))
    schema.trainer = OmegaConf.create(dict.fromkeys(names, UNSET))
    ConfigStore.instance().store(name="schema", node=schema)
    SearchPath.overlay = overlay
    if SearchPath not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(SearchPath)


def with_defaults(overrides: Sequence[str]) -> list[str]:
    """The overrides with the gpu preset of this machine where none is named, and open keys made addable."""
    given = [("++" + o) if o.startswith(OPEN) else o for o in overrides]
    given = [f"gpu={detect_gpu()}" if o == "gpu=auto" else o for o in given]
    if not any(o.startswith("gpu=") for o in given):
        given.append(f"gpu={detect_gpu()}")
    return given


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize(version_base="1.3", config_path=None):
        yield


def compose_config(overrides: Sequence[str] = (), overlay: Path | None = None, anywhere: bool = False) -> DictConfig:
    """Compose and check one config, as the command line would: the way in for notebooks and tests.

    Args:
        overrides: as on the command line, `["algo=dapo", "trainer.max_steps=10"]`.
        overlay: the user's own config folder.
        anywhere: the device need not be here: for what only plans a run.
    Raises:
        ConfigError: with every problem found.
    """
    register(overlay)
    config, found = _compose(with_defaults(overrides), anywhere)
    if found or config is None:
        raise ConfigError(found)
    return config


def _compose(overrides: list[str], anywhere: bool = False) -> tuple[DictConfig | None, list[str]]:
    """(the config or None, everything wrong with it, one line each)."""
    with _hydra():
        try:
            config, found = compose("config", overrides), []
        except MISTAKES as error:
            # Hydra stops at the first mistake; each override alone shows them all, and the others can still be checked.
            wrong = {override: line for override in overrides if (line := _override_problem(override))}
            found = list(wrong.values()) or [_one_line(error)]
            config = _compose_rest([override for override in overrides if override not in wrong])
        found += [
            f"{o}: no key may be called _target_: nothing is built from a config" for o in overrides if _builds(o)
        ]
        found += [f"{key}: there is no such key{_nearest(key, known_keys())}" for key in _added(config)]
    return config, found + (problems(config, anywhere) if config is not None else [])


def _builds(override: str) -> bool:
    """Whether Hydra would call what is named: it does so for its own callbacks, launchers and sweepers."""
    return override.partition("=")[0].lstrip("+~").startswith("hydra.") and "_target_" in override


def _added(config: DictConfig | None) -> Iterator[str]:
    """Keys that the schema has not: "+" on the command line and files of the user's can add any."""

    def walk(node: DictConfig, schema: type, prefix: str) -> Iterator[str]:
        kinds = typing.get_type_hints(schema)
        for key in node:
            child, kind = node._get_node(key), kinds.get(str(key))
            if kind is None:
                yield f"{prefix}{key}"
            elif dataclasses.is_dataclass(kind) and isinstance(child, DictConfig):
                yield from walk(child, typing.cast(type, kind), f"{prefix}{key}.")

    if config is not None:
        yield from walk(config, Config, "")


def _compose_rest(overrides: list[str]) -> DictConfig | None:
    try:
        return compose("config", overrides)
    except MISTAKES:
        return None


def _override_problem(override: str) -> str | None:
    try:
        compose("config", [override])
    except MISTAKES as error:
        return _explain(override, error)
    return None


def _explain(override: str, error: Exception) -> str:
    try:
        parsed: Override = OverridesParser.create().parse_override(override)
    except MISTAKES:
        command = _nearest_command(override)
        return f"{override}: not an override; write group=choice or key=value, quoted for your shell{command}"
    key = parsed.key_or_group
    if not key:
        return f"{override}: not an override; write group=choice or key=value"
    loader = GlobalHydra.instance().config_loader()
    if loader.list_groups(key) or loader.get_group_options(key):
        options = loader.get_group_options(key)
        if str(parsed.value()) in options:  # the choice is there, and its file is wrong
            return f"{override}: {_one_line(error)}"
        return f"{override}: {key} is one of {', '.join(options)}{_nearest(str(parsed.value()), options)}"
    keys = known_keys()
    if key in keys:
        return f"{override}: {_one_line(error)}"
    return f"{override}: there is no {key}{_nearest(key, keys)}"


def known_keys() -> list[str]:
    """Every key and group of the default config, "trainer.beta" style."""
    keys: list[str] = []

    def walk(node: DictConfig, prefix: str) -> None:
        for key in node:
            keys.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                walk(child, f"{prefix}{key}.")

    walk(compose("config"), "")
    return keys


def _nearest(word: str, known: Sequence[str]) -> str:
    # A key with the right last part under the wrong group is the commonest slip.
    tail = word.rsplit(".", 1)[-1]
    near = [k for k in known if "." in k and k.rsplit(".", 1)[-1] == tail]
    near += difflib.get_close_matches(word, known, n=3, cutoff=0.9)
    by_tail = {k.rsplit(".", 1)[-1]: k for k in known}
    near += [by_tail[t] for t in difflib.get_close_matches(tail, list(by_tail), n=2, cutoff=0.8)]
    # Far guesses only where there is no near one.
    near = near or difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    # Of two as near, the one that stands as deep: `modle` is `model` before it is `packing.mode`.
    near = sorted(dict.fromkeys(near), key=lambda known_key: known_key.count(".") != word.count("."))[:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _nearest_command(word: str) -> str:
    from slothrl.__main__ import COMMANDS

    near = difflib.get_close_matches(word, [*COMMANDS], n=1, cutoff=0.75)
    return f"; did you mean the command {near[0]}?" if near else ""


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Hydra wraps what OmegaConf says of a value
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("In '", "Could not override"))]
    text = (telling or lines or [""])[0]
    return re.sub(r"\s+", " ", text)


def check_jobs(jobs: Sequence[Sequence[str]], anywhere: bool = False) -> None:
    """Compose and check every job of a command line. Raises `ConfigError` with the problems of all of them."""
    found: list[str] = []
    for job in jobs:
        found += _compose(list(job), anywhere)[1]
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
