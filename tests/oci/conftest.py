"""A registry for all tests that do not harm it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.oci import registries


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[registries.Registry]:
    with registries.registry(tmp_path_factory.mktemp("registry")) as running:
        yield running
