"""One screen about a finished chain: per generator, per precision, and where things lie.

`python -m export.summary --run runs/demo --model models/demo` reads what `train.evaluate` and `export.verify` wrote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from export.errors import ExportError
from export.report import JSON_FILE as VERIFICATION_FILE
from export.report import REPORT_FOLDER, graph_name
from runtime.bundle import newest_bundle, open_bundle
from runtime.errors import NTFError
from runtime.manifest import ArtifactSpec
from train.checkpoint import newest_run
from train.report import JSON_FILE, report_from_jsonable, short_table

EVALUATION = Path("report") / JSON_FILE
VERIFICATION = REPORT_FOLDER / VERIFICATION_FILE


@dataclass(frozen=True)
class Options:
    """Print what a run and its bundle have shown."""

    run: Path | None = None
    """Run folder; default: the newest in runs/."""
    model: Path | None = None
    """Bundle; default: the newest in models/."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m export.summary", args=arguments)
    try:
        run = options.run or newest_run()
        model = options.model or newest_bundle(Path("models"))
        print(summary(run, model))
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def summary(run: Path, model: Path) -> str:
    """Tables per generator and per precision, and the files that were left.

    Args:
        run: run folder with the reports of `train.evaluate` and `export.verify`.
        model: bundle folder or .zip.

    Raises:
        ExportError: a report is missing.
        BundleError: the bundle or a report is damaged.
    """
    evaluation = report_from_jsonable(read_report(run, EVALUATION, "train.evaluate"), subject="evaluation")
    verification = read_report(run, VERIFICATION, "export.verify")
    artifacts = open_bundle(model).manifest.artifacts
    parts = [
        f"Per generator, in percent ({evaluation.data}, {evaluation.split})",
        short_table(evaluation),
        "",
        "Per precision, against the PyTorch model on the validation pictures",
        precision_table(verification["comparisons"], graph_sizes(artifacts)),
        "",
        f"run:    {run}  (reports in {run / 'report'})",
        f"bundle: {model}  ({', '.join(artifact.file for artifact in artifacts)})",
    ]
    return "\n".join(parts)


def read_report(run: Path, name: Path, command: str) -> dict[str, Any]:
    """A JSON report in a run folder.

    Raises:
        ExportError: it is not there, or is not JSON.
    """
    path = run / name
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            str(path), got=str(error), wanted=f"the report of {command}", remedy=f"run python -m {command} first"
        ) from error
    return content


def graph_sizes(artifacts: Sequence[ArtifactSpec]) -> dict[str, int]:
    """Bytes of each ONNX graph, by `export.report.graph_name`."""
    return {graph_name(a.precision, a.remainder): a.size_bytes for a in artifacts if a.format == "onnx"}


def precision_table(comparisons: Sequence[dict[str, Any]], size_bytes: Mapping[str, int]) -> str:
    """One line per graph and back-end.

    Args:
        comparisons: of `verify.json`.
        size_bytes: of each graph, from `graph_sizes`.
    """
    names = [graph_name(row["precision"], row.get("remainder", "fp32")) for row in comparisons]
    rows = [("precision", "back-end", "ONNX", "largest logit diff", "AP change", "verdict flips", "opposite", "result")]
    rows += [
        (
            name,
            row["backend"],
            f"{size_bytes[name] / 1e6:.1f} MB",
            f"{row['logit_diff_max']:.1e}",
            "n/a" if row["ap_change_points"] is None else f"{row['ap_change_points']:+.2f}",
            f"{row['verdict_flips']} of {row['pictures']}",
            str(row["opposite_verdicts"]),
            "pass" if row["passed"] else "FAIL",
        )
        for name, row in zip(names, comparisons, strict=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
