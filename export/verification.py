"""What a verification found, which gates it breaks, and its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.batch_invariance import LIMITS as INVARIANCE_LIMITS
from export.batch_invariance import BatchInvariance
from export.latency import STAGES, LatencySweep
from export.layer_comparison import LayerComparison
from export.parity import LIMITS, REFERENCE, Labels, Logits
from export.report import graph_parts
from runtime.golden import GoldenCheck
from runtime.manifest import CalibrationSpec, ParitySpec


@dataclass(frozen=True, eq=False)
class Scores:
    """Raw logits of the same pictures.

    Attributes:
        labels: (N,) 0 real, 1 fake.
        reference: (N,) of PyTorch.
        calibration: of PyTorch.
        found: (N,) by (graph, back-end); a graph is called as in `export.report.graph_name`.
    """

    labels: Labels
    reference: Logits
    calibration: CalibrationSpec
    found: Mapping[tuple[str, str], Logits]


@dataclass(frozen=True, eq=False)
class Verification:
    """Everything that was measured on a bundle.

    Attributes:
        scores: logits that the comparisons are made of.
        comparisons: graph and figures, for every graph and back-end.
        broken: limits that a comparison breaks, in words, by "<graph> on <back-end>".
        golden: golden inputs on every precision and back-end.
        invariance: scores in batches, on every precision and back-end.
        layers: of the graphs that were compared layer by layer.
        latency: None where it was not asked for.
    """

    scores: Scores
    comparisons: tuple[tuple[str, ParitySpec], ...]
    broken: Mapping[str, list[str]]
    golden: tuple[GoldenCheck, ...]
    invariance: tuple[BatchInvariance, ...]
    layers: tuple[LayerComparison, ...] = ()
    latency: LatencySweep | None = None

    @property
    def failures(self) -> dict[str, list[str]]:
        """Every gate that is broken, in words, by what it is about; empty when all hold."""
        gates = dict(self.broken)
        gates |= {f"{golden_subject(check)}": check.broken() for check in self.golden}
        gates |= {f"batch invariance of {c.precision} on {c.backend}": c.broken() for c in self.invariance}
        gates |= {f"layers of {comparison.precision}": comparison.broken() for comparison in self.layers}
        return {where: words for where, words in gates.items() if words}

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return not self.failures


def golden_subject(check: GoldenCheck) -> str:
    """What a golden check is about."""
    return f"golden inputs of {check.precision} on {check.backend}"


def verification_json(result: Verification, about: Mapping[str, Any]) -> str:
    """JSON of everything; figures that are not finite are null.

    Args:
        result: what was found.
        about: model, data, machine and versions.
    """
    content = {
        **about,
        "passed": result.passed,
        "failures": result.failures,
        "limits": LIMITS,
        "comparisons": [
            {
                **dict(zip(("precision", "remainder"), graph_parts(name), strict=True)),
                **dataclasses.asdict(parity),
                "broken": list(result.broken[f"{name} on {parity.backend}"]),
            }
            for name, parity in result.comparisons
        ],
        "golden": [{**dataclasses.asdict(c), "passed": not c.broken()} for c in result.golden],
        "batch_invariance": {
            "limits": INVARIANCE_LIMITS,
            "checks": [{**dataclasses.asdict(c), "passed": not c.broken()} for c in result.invariance],
        },
        "layers": [{**dataclasses.asdict(c), "culprit": c.culprit} for c in result.layers],
        "latency": result.latency and {**dataclasses.asdict(result.latency), "stages": STAGES},
        "logits": {
            "labels": result.scores.labels.tolist(),
            REFERENCE: result.scores.reference.tolist(),
            **{f"{p} on {backend}": found.tolist() for (p, backend), found in result.scores.found.items()},
        },
    }
    return json.dumps(jsonable(content), indent=1, sort_keys=True, allow_nan=False) + "\n"


def jsonable(value: Any) -> Any:
    """Dataclasses, mappings and sequences as plain JSON types, with null where a number is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {name: jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
