"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bundle_fixtures import write_bundle


@pytest.fixture(scope="session")
def _pristine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "tiny"
    write_bundle(folder)
    return folder


@pytest.fixture
def tiny_bundle(_pristine_bundle: Path, tmp_path: Path) -> Path:
    """Folder of a tiny FP32 bundle that the test may damage."""
    return Path(shutil.copytree(_pristine_bundle, tmp_path / "tiny"))
