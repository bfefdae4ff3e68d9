"""What a wrong config is told; shared by the tests of configs."""

from pathlib import Path

import pytest

from slothrl.compose import compose_config
from slothrl.errors import ConfigError


def refused(*overrides: str, overlay: Path | None = None) -> list[str]:
    """The lines that a wrong config gets; fails where it gets none."""
    with pytest.raises(ConfigError) as caught:
        compose_config([*overrides], overlay)
    return caught.value.problems
