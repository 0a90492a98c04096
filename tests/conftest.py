"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests out of the user's cache; one cache for all, as a user has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNNCC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits_folder() -> Path:
    """The example's folder: the seed CNN and its training."""
    return ROOT / "examples" / "digits"
