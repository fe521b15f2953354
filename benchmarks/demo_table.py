"""Put the demo's figures into the README: `python -m benchmarks.demo_table --run runs/demo --model models/demo`.

Everything that `train.evaluate` and `export.verify` wrote, with their machines and versions, is kept in one JSON file;
the README's table is made from that file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import README, with_tables
from export.summary import EVALUATION, VERIFICATION, graph_sizes, precision_table, read_report
from runtime.bundle import open_bundle
from train.report import report_from_jsonable, short_table

RESULTS = Path("benchmarks/results/demo.json")
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"


def collected(run: Path, model: Path) -> dict[str, Any]:
    """Both reports and the sizes of the graphs.

    Args:
        run: run folder with the reports of `train.evaluate` and `export.verify`.
        model: its bundle.
    """
    verification = read_report(run, VERIFICATION, "export.verify")
    for detail in ("logits", "layers"):  # of every picture and tensor; the tables need none of them
        verification.pop(detail, None)
    return {
        "evaluation": read_report(run, EVALUATION, "train.evaluate"),
        "verification": verification,
        "graph_size_bytes": graph_sizes(open_bundle(model).manifest.artifacts),
    }


def markdown(results: dict[str, Any]) -> str:
    """The two tables of the demo, as it prints them."""
    evaluation = report_from_jsonable(results["evaluation"], subject="evaluation")
    machine = evaluation.environment["machine"]
    precisions = precision_table(results["verification"]["comparisons"], results["graph_size_bytes"])
    return "\n".join(
        [
            f"What it printed at its end on {machine['cpu']}, {machine['cores']} cores (trained on `transposed_conv`",
            "alone; figures in percent, then each precision against PyTorch on the validation pictures):",
            "",
            "```",
            short_table(evaluation),
            "",
            precisions,
            "```",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results file and the README's tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_table", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    results = collected(options.run, options.model)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    document = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(with_tables(document, markdown(results), begin=BEGIN, end=END), encoding="utf-8")
    print(f"wrote {options.results} and the table in {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
