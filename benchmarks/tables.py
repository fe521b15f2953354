"""Condense what pytest-benchmark wrote and put the tables into the documents: `python -m benchmarks.tables RAW`.

The raw file holds every single timing. What is kept, and committed, is one JSON file with machine, versions,
medians, spreads and ratios to each group's baseline; the tables in the README are made from that file alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.provenance import environment

RESULTS = Path("benchmarks/results/cpu.json")
README = Path("README.md")
# In extra_info: another command keeps this benchmark's figures, in a file of its own.
KEPT_ELSEWHERE = "kept_elsewhere"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def condensed(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each benchmark: group, name, median and spread in ms, and its ratio to the group's baseline.

    Those that another command keeps are left out.

    Raises:
        ValueError: a group has no baseline, or more than one.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in raw["benchmarks"]:
        if not entry["extra_info"].get(KEPT_ELSEWHERE):
            groups.setdefault(entry["group"], []).append(entry)
    rows = []
    for group, entries in groups.items():
        baselines = [entry for entry in entries if entry["extra_info"].get("baseline")]
        if len(baselines) != 1:
            raise ValueError(f"group {group!r} has {len(baselines)} baselines, wanted 1: set extra_info['baseline']")
        base = baselines[0]["stats"]["median"]
        rows += [_row(group, entry, base) for entry in entries]
    return rows


def _row(group: str, entry: dict[str, Any], base_seconds: float) -> dict[str, Any]:
    stats = entry["stats"]
    return {
        "group": group,
        "name": entry["name"],
        "baseline": bool(entry["extra_info"].get("baseline")),
        "median_ms": round(stats["median"] * 1e3, 4),
        "iqr_ms": round(stats["iqr"] * 1e3, 4),
        "rounds": stats["rounds"],
        "times_faster": round(base_seconds / stats["median"], 3),
    }


def markdown(results: dict[str, Any]) -> str:
    """The tables of a results file, each with its baseline first."""
    machine = results["environment"]["machine"]
    versions = results["environment"]["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino") if name in versions)
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {shown}. Times are medians with the "
        "interquartile range; read the ratios, which come from one run.",
    ]
    groups = dict.fromkeys(row["group"] for row in results["rows"])
    for group in groups:
        rows = sorted((r for r in results["rows"] if r["group"] == group), key=lambda row: not row["baseline"])
        lines += ["", f"| {group} | median | spread | times faster |", "|---|---:|---:|---:|"]
        lines += [
            f"| {r['name']} | {r['median_ms']:.2f} ms | {r['iqr_ms']:.2f} ms | {r['times_faster']:.2f} |" for r in rows
        ]
    return "\n".join(lines)


def with_tables(document: str, tables: str, *, begin: str = BEGIN, end: str = END) -> str:
    """The document with everything between two markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"the document needs the lines {begin} and {end} once each, in this order")
    head, rest = document.split(begin)
    return f"{head}{begin}\n{tables}\n{end}{rest.split(end)[1]}"


def publish(
    results: dict[str, Any], tables: str, *, path: Path, document: Path | None, markers: tuple[str, str]
) -> None:
    """Write a results file, show its tables, and put them into a document where there is one.

    Raises:
        ValueError: the document lacks the markers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(tables)
    if document is not None:
        begin, end = markers
        text = with_tables(document.read_text(encoding="utf-8"), tables, begin=begin, end=end)
        document.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results file and the README's tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    rows = condensed(json.loads(options.raw.read_text(encoding="utf-8")))
    results = {"environment": environment(), "rows": rows}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    document = with_tables(options.readme.read_text(encoding="utf-8"), markdown(results))
    options.readme.write_text(document, encoding="utf-8")
    print(f"wrote {options.results} and the tables in {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
