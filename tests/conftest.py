"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from bundle_fixtures import write_bundle

if TYPE_CHECKING:
    from serve_fixtures import Hosted


@pytest.fixture(scope="session")
def _pristine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "tiny"
    write_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def bundle(_pristine_bundle: Path) -> Path:
    """Folder of a tiny FP32 bundle that no test may damage."""
    return _pristine_bundle


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Hosted]:
    """A server with the usual settings, for all tests of a file."""
    from serve_fixtures import hosted  # needs FastAPI, which the other tests do not

    with hosted(bundle) as running:
        yield running


@pytest.fixture
def tiny_bundle(_pristine_bundle: Path, tmp_path: Path) -> Path:
    """Folder of a tiny FP32 bundle that the test may damage."""
    return Path(shutil.copytree(_pristine_bundle, tmp_path / "tiny"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the checks of test pictures out of the user's cache; child processes inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
