import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_family(
    tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Callable[[str], Path]
) -> Callable[[str], Any]:
    """Family -> :class:`tiny_adapters.TinyFamily`; read only."""
    from tiny_adapters import TinyFamily

    @functools.cache
    def make(family: str) -> Any:
        folder = tmp_path_factory.mktemp(f"{family}-features")
        return TinyFamily.make(family, tiny_pipeline(family), folder)

    return make
