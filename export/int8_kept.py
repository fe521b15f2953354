"""The last INT8 graph that was found for a run, kept so that what fails afterwards does not cost the search again."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from export.budget import Cost
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.graph import model_bytes
from export.int8 import Int8Search, LayerSensitivity, Say, Step
from export.judge import Judge
from runtime.strict_json import canonical_json
from train.checkpoint import write_atomically
from train.errors import CheckpointError
from train.provenance import environment, machine

KEPT_FILE = Path("report") / "int8" / "kept.npz"


@dataclass(frozen=True)
class KeptInt8:
    """Where a run keeps its INT8 graph, and what this search depends on.

    Attributes:
        path: of the file.
        key: from `search_key`.
    """

    path: Path
    key: str

    def load(self, say: Say) -> tuple[ModelProto, Int8Search] | None:
        """The graph and how it was found, where a search with the same key left them; else None.

        Args:
            say: told where the graph is from, or why a file is not used.
        """
        try:
            with np.load(io.BytesIO(self.path.read_bytes()), allow_pickle=False) as kept:
                if str(kept["key"]) != self.key:
                    return None
                found = onnx.load_from_string(kept["graph"].tobytes()), _search(json.loads(str(kept["search"])))
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file makes numpy, json and protobuf raise almost anything
            say(f"note: {self.path} cannot be used ({error}), so INT8 is searched again")
            return None
        say(f"INT8 as an earlier export of the same found it: {self.path}")
        return found

    def save(self, model: ModelProto, search: Int8Search, say: Say) -> None:
        """Keep a graph and how it was found in place of an earlier one.

        Args:
            model: INT8 graph with FP32 in between.
            search: that found it.
            say: told where it cannot be written; the export goes on without.
        """
        buffer = io.BytesIO()
        graph = np.frombuffer(model_bytes(model), np.uint8)
        np.savez(buffer, allow_pickle=False, key=self.key, search=json.dumps(asdict(search)), graph=graph)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, buffer.getvalue())
        except (OSError, CheckpointError) as error:
            say(f"note: the INT8 graph could not be kept in {self.path} ({error})")


@contextmanager
def saying_what_is_kept(path: Path | None) -> Iterator[None]:
    """Context of what follows a search: its errors say that the search need not be made again.

    Args:
        path: of the file that keeps what was found; None where nothing was searched.
    """
    try:
        yield
    except ExportError as error:
        if path is None or not path.is_file():
            raise
        remedy = (
            f"{error.remedy}. The INT8 graph that was found is kept in {path}: the same export takes it from there,"
            " and with --no-engine ships the ONNX graphs alone"
        )
        raise ExportError(error.subject, got=error.got, wanted=error.wanted, remedy=remedy) from error


def search_key(
    model: ModelProto, pictures: PreparedPictures, judge: Judge, *, calibrator: str, smallest_share: float
) -> str:
    """SHA-256 of everything that a search depends on, the toolkit's own code included.

    Args:
        model: FP32 graph, which holds the weights.
        pictures: that ranges are measured on.
        judge: says what a graph costs, on which pictures and back-ends, within which budget.
        calibrator: see `export.int8.int8_within_budget`, as the next.
        smallest_share: of the operations that must stay in INT8.
    """
    facts: Mapping[str, object] = {
        "graph_sha256": hashlib.sha256(model_bytes(model)).hexdigest(),
        "calibration_pictures": _facts_of(pictures),
        "validation_pictures": _facts_of(judge.pictures),
        "calibration": asdict(judge.run_calibration),
        "backends": judge.backends,
        "budget": asdict(judge.budget),
        "calibrator": calibrator,
        "smallest_share": smallest_share,
        "versions": environment()["versions"],
        # What integers come out of depends on the instructions that a processor has for them.
        "processor": machine()["cpu"],
        "code_sha256": _code_sha256(),
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _facts_of(pictures: PreparedPictures) -> dict[str, object]:
    """What is scored: files, labels, generators, and what is done to the pixels."""
    records = pictures.pictures.records
    return {
        "listing": pictures.listing().decode(),
        "generators": [record.generator for record in records],
        "equalized": [repr(record.equalize) for record in records],
        "preprocess": asdict(pictures.spec),
    }


def _code_sha256() -> str:
    """Of the sources that a search runs through: a checkout may differ from the commit that it names."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for package in ("export", "runtime", "train") for path in (root / package).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _search(plain: dict[str, Any]) -> Int8Search:
    return Int8Search(
        **plain
        | {
            "sensitivities": tuple(LayerSensitivity(**layer) for layer in plain["sensitivities"]),
            "steps": tuple(_step(step) for step in plain["steps"]),
        }
    )


def _step(plain: dict[str, Any]) -> Step:
    costs = tuple(Cost(**cost | {"broken_limits": tuple(cost["broken_limits"])}) for cost in plain["costs"])
    return Step(**plain | {"costs": costs, "excess": tuple(plain["excess"])})
