"""Graphs on the validation pictures, as the runtime scores them, against PyTorch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.progress import track

from export.budget import Budget, Cost
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.parity import (
    LIMITS,
    Labels,
    Logits,
    broken_limits,
    centred_thresholds,
    compare_logits,
    matched_thresholds,
    opened_backends,
)
from export.session import open_session
from runtime.manifest import INPUT_NAME, CalibrationSpec, ModelManifest, ParitySpec, Precision, Remainder
from train.errors import DataError
from train.metrics import detection_metrics, fit_calibration

# The back-end whose logits a precision is calibrated on: it runs wherever an export does.
CALIBRATED_ON = "onnxruntime"
# ONNX Runtime's optimiser (1.31) drops Q/DQ nodes from a graph whose remainder is FP16 and then computes scores that
# are further from PyTorch's, so a graph for engines is run node by node.
NODE_BY_NODE = "onnxruntime without optimizations"
BATCH_SIZE = 16
# Beside the names of generators.
ALL = "all pictures"


@dataclass(frozen=True)
class Candidate:
    """A graph to be judged: its precision, what it computes between integer layers, and the .onnx file's content."""

    precision: Precision
    content: bytes
    remainder: Remainder = "fp32"


class Judge:
    """Scores graphs on the validation pictures as the runtime would, and says what they cost.

    Args:
        pictures: the validation pictures.
        reference: (N,) logits of the PyTorch model for them.
        calibration: of the PyTorch model.
        manifest: what graphs are checked against.
        backends: back-ends that run here.
        budget: what a graph may cost.
        progress: show a bar for each pass over the pictures.

    Raises:
        ExportError: no back-end runs here.
    """

    def __init__(
        self,
        pictures: PreparedPictures,
        reference: Logits,
        calibration: CalibrationSpec,
        manifest: ModelManifest,
        backends: Sequence[str],
        budget: Budget,
        *,
        progress: bool = False,
    ) -> None:
        if not backends:
            raise ExportError(
                "export",
                got="no back-end that runs here",
                wanted="onnxruntime or openvino, to check what was exported",
                remedy='pip install "ntf-toolkit[export]"',
            )
        self.pictures, self.reference, self.budget = pictures, reference, budget
        self.run_calibration = calibration
        self._manifest, self._progress = manifest, progress
        self.backends = sorted(backends, key=lambda name: name != CALIBRATED_ON)
        records = pictures.pictures.records
        self._labels: Labels = np.array([record.label for record in records])
        self._generators = np.array([record.generator for record in records])
        self._centred = centred_thresholds(calibration, reference)
        self._scored: dict[tuple[str, str], Logits] = {}
        self._theirs = detection_metrics(reference, self._labels, calibration=self._centred)

    def costs(self, candidates: Sequence[Candidate]) -> tuple[Cost, ...]:
        """Cost of graphs of one precision on each back-end, one after the other, up to the first over the budget.

        Args:
            candidates: share the calibration of the first, which has an FP32 remainder.
        """
        found: list[Cost] = []
        calibration: CalibrationSpec | None = None
        for candidate, name in ((c, name) for c in candidates for name in self._backends_of(c)):
            logits = self.scores(candidate, name)
            shown = name if candidate.remainder == "fp32" else f"{name} ({candidate.remainder} remainder)"
            if not np.isfinite(logits).all():
                found.append(self._unusable(shown))
                break
            try:
                calibration = calibration or self._fitted(logits)
                found.append(self._cost(shown, candidate.precision, logits, calibration))
            except DataError:  # logits that do not rise with the label: no temperature makes probabilities of them
                found.append(
                    replace(self._cost(shown, candidate.precision, logits, self.run_calibration), ece=math.inf)
                )
            if found[-1].excess(self.budget):
                break
        return tuple(found)

    def parity(
        self, candidates: Iterable[Candidate]
    ) -> tuple[dict[str, CalibrationSpec], dict[tuple[Precision, Remainder], tuple[ParitySpec, ...]]]:
        """Calibration of each precision, from its own logits, and the comparison of each graph on each back-end.

        Args:
            candidates: of a precision, the one with an FP32 remainder comes first.

        Raises:
            ExportError: a graph gives logits that are not finite.
        """
        calibration: dict[str, CalibrationSpec] = {}
        parity: dict[tuple[Precision, Remainder], tuple[ParitySpec, ...]] = {}
        for candidate in candidates:
            precision = candidate.precision
            backends = self._backends_of(candidate)
            scored = {name: self._finite(candidate, name) for name in backends}
            if precision not in calibration:
                calibration[precision] = self._fitted(scored[backends[0]])
            parity[precision, candidate.remainder] = tuple(
                self._compared(name, precision, logits, calibration[precision]) for name, logits in scored.items()
            )
        return calibration, parity

    def scores(self, candidate: Candidate, backend: str) -> Logits:
        """Logits (N,) of a graph on a back-end; those of a graph that was scored before are remembered."""
        key = hashlib.sha256(candidate.content).hexdigest(), backend
        if key not in self._scored:
            run = self._node_by_node if backend == NODE_BY_NODE else self._on_backend
            self._scored[key] = run(candidate, backend)
        return self._scored[key]

    def _on_backend(self, candidate: Candidate, backend: str) -> Logits:
        precision = candidate.precision
        with opened_backends({precision: candidate.content}, self._manifest, [backend]) as opened:
            batches = self._batches(f"{precision} on {backend}")
            return np.concatenate([opened[precision, backend].infer(images).logits for images in batches])

    def _node_by_node(self, candidate: Candidate, backend: str) -> Logits:
        session = open_session(onnx.load_from_string(candidate.content), optimize=False)
        batches = self._batches(f"{candidate.precision} for engines")
        return np.concatenate([session.run(["logits"], {INPUT_NAME: images})[0] for images in batches])

    def _backends_of(self, candidate: Candidate) -> list[str]:
        """Where a graph is run: a graph for engines on one back-end, which proves it."""
        if candidate.remainder == "fp32":
            return self.backends
        return ["openvino"] if "openvino" in self.backends else [NODE_BY_NODE]

    def _batches(self, what: str) -> Iterable[NDArray[np.uint8]]:
        total = -(-len(self.pictures) // BATCH_SIZE)
        return track(self.pictures.batches(BATCH_SIZE), f"scoring {what}", total=total, disable=not self._progress)

    def _fitted(self, logits: Logits) -> CalibrationSpec:
        """Calibration of one precision: it keeps the run's rates and, with them, most of PyTorch's verdicts."""
        fitted = fit_calibration(
            logits,
            self._labels,
            real_flagged_rate=self.run_calibration.real_flagged_rate,
            fake_missed_rate=self.run_calibration.fake_missed_rate,
            rule=self.run_calibration.threshold_rule,
        )
        return matched_thresholds(fitted, logits, self._centred.verdicts(self.reference))

    def _finite(self, candidate: Candidate, backend: str) -> Logits:
        logits = self.scores(candidate, backend)
        if not np.isfinite(logits).all():
            raise ExportError(
                f"{candidate.precision} graph on {backend}",
                got=f"{np.sum(~np.isfinite(logits))} of {len(logits)} logits that are not finite",
                wanted="a number for every validation picture",
                remedy="give more calibration pictures, so that layers which overflow are found",
            )
        return logits

    def _compared(self, backend: str, precision: Precision, logits: Logits, calibration: CalibrationSpec) -> ParitySpec:
        return compare_logits(
            logits,
            self.reference,
            self._labels,
            calibration=calibration,
            reference_calibration=self._centred,
            backend=backend,
            limits=LIMITS[precision],
        )

    def _cost(self, backend: str, precision: Precision, logits: Logits, calibration: CalibrationSpec) -> Cost:
        ours = detection_metrics(logits, self._labels, calibration=calibration)
        flipped = calibration.verdicts(logits) != self._centred.verdicts(self.reference)
        parity = self._compared(backend, precision, logits, calibration)
        spread = float(np.std(self.reference))
        ap = {str(name): self._ap_loss(logits, self._generators == name) for name in np.unique(self._generators)}
        return Cost(
            backend=backend,
            pictures=len(logits),
            # Where real pictures have a name of their own, no generator has both classes.
            ap=ap | {ALL: self._ap_loss(logits, np.ones(len(logits), bool))},
            accuracy=100.0 * (self._theirs.accuracy_at_threshold - ours.accuracy_at_threshold),
            flips=100.0 * float(flipped.mean()),
            ece=100.0 * (ours.ece_calibrated - self._theirs.ece_calibrated),
            logit_rms=float(np.sqrt(np.mean((logits.astype(np.float64) - self.reference) ** 2))),
            broken_limits=tuple(broken_limits(parity, LIMITS[precision], calibration=self._centred, logit_std=spread)),
        )

    def _unusable(self, backend: str) -> Cost:
        """Cost of a graph that gives infinity or NaN for a picture."""
        return Cost(backend, len(self.reference), {ALL: math.inf}, math.inf, 100.0, math.inf, math.inf)

    def _ap_loss(self, logits: Logits, chosen: np.ndarray) -> float | None:
        labels = self._labels[chosen]
        theirs = detection_metrics(self.reference[chosen], labels, calibration=self._centred).ap
        ours = detection_metrics(logits[chosen], labels, calibration=self._centred).ap
        return None if theirs is None or ours is None else 100.0 * (theirs - ours)
