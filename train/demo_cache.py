"""A built folder that knows its recipe and the hash of each of its files, and is replaced only as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.data_csv import summary
from train.demo_photographs import LICENCES_TITLE
from train.errors import DataError

MANIFEST_FILE = "manifest.json"
LICENCES_FILE = "LICENSES.md"


def why_stale(root: Path, recipe: dict[str, Any]) -> str | None:
    """Why the folder is no complete build of the recipe, as half a sentence; None when it is one."""
    if not root.exists():
        return "it is not there yet"
    try:
        manifest = json.loads((root / MANIFEST_FILE).read_text(encoding="utf-8"))
        listed, built_from = dict(manifest["files"]), dict(manifest["recipe"])
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST_FILE} is damaged"
    changed = _changes(built_from, recipe)
    if changed:
        return f"the recipe has changed ({summary(changed)})"
    found = hash_files(root)
    for kind, names in (
        ("missing", listed.keys() - found.keys()),
        ("surplus", found.keys() - listed.keys()),
        ("damaged", {name for name in listed.keys() & found.keys() if listed[name] != found[name]}),
    ):
        if names:
            return f"{len(names):,} files are {kind} ({summary(sorted(names), 2)})"
    return None


def write_manifest(root: Path, recipe: dict[str, Any], figures: dict[str, Any]) -> None:
    """Records the recipe, the figures of the build and the hash of every file there."""
    manifest = {"recipe": recipe, "figures": figures, "files": hash_files(root)}
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (root / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_figures(root: Path) -> dict[str, Any]:
    """The figures that the build recorded."""
    manifest = json.loads((root / MANIFEST_FILE).read_text(encoding="utf-8"))
    return dict(manifest["figures"])


def hash_files(root: Path) -> dict[str, str]:
    """Hex SHA-256 by relative path of every file but the manifest; hidden names are left out."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    relative = {p.relative_to(root).as_posix(): p for p in paths}
    relative.pop(MANIFEST_FILE, None)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), relative.values())
        return dict(zip(relative, digests, strict=True))


@contextmanager
def replace_folder(root: Path) -> Iterator[Path]:
    """An empty folder beside `root` to build in, which takes its place when the block ends without an error.

    Raises:
        DataError: `root` holds something that was not built here, which is never deleted.
    """
    _refuse_foreign(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    building = root.with_name(f".{root.name}.building-{os.getpid()}")
    outdated = root.with_name(f".{root.name}.outdated-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        if root.exists():
            root.rename(outdated)
        building.rename(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)


def _refuse_foreign(root: Path) -> None:
    if root.is_dir():
        if _starts_with(root / LICENCES_FILE, LICENCES_TITLE) or not any(root.iterdir()):
            return
    elif not root.exists():
        return
    raise DataError(
        str(root),
        got="something that is no demo data",
        wanted="no such folder, an empty one, or demo data built earlier",
        remedy="name another folder, or move its contents away",
    )


def _starts_with(path: Path, title: str) -> bool:
    return path.is_file() and path.read_bytes().startswith(title.encode())


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for every leaf that differs."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += _changes(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before} -> {after}")
    return changes
