"""Our figures in the form of the paper's Tables 2 to 5, with its own beside them (Liang et al. 2024, arXiv:2403.16513).

The paper's figures stand in `paper_figures.json`, as printed. Its columns are mapped to ours in one place,
`paper_columns`; a generator is the paper's where its name is, whatever the case and punctuation, or an alias of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from runtime.strict_json import from_jsonable, parse_json
from train.markdown import markdown_code, markdown_table, percent
from train.metrics import DetectionMetrics
from train.report import EvaluationReport, SetReport

FIGURES_FILE = Path(__file__).with_name("paper_figures.json")
OURS = "ours"
COLUMNS = ("AP", "ACC", "FPR", "FNR")
IN_A_TABLE = 6  # generators, as in the paper
# Names that data sets use for the paper's generators. A named version of a generator is not among them: the paper does
# not say which it used.
ALIASES = {
    "projectedgan": "ProjGAN",
    "diffusionstylegan2": "Diff-StyleGAN2",
    "diffusionganstylegan2": "Diff-StyleGAN2",
    "ss": "SimSwap",
    "df": "DiffFace",
    "latentdiffusion": "LDM",
    "stablediffusion": "SDM",
    "simswapstylegan2": "SimSwap_Style2",
    "simswapvqgan": "SimSwap_VQ",
    "difffacestylegan2": "DiffFace_Style2",
    "difffaceprojgan": "DiffFace_Proj",
}
MAPPING_NOTE = (
    "The columns as the paper has them, in percent, at the uncalibrated 0.5, with real as the positive class: its FPR "
    "is our `fake missed` (fakes called real), its FNR our `real flagged` (real pictures called fake); AP has fake as "
    "the positive class. Average: the unweighted mean over the generators shown, ours and the paper's alike, which for "
    "all generators of a table is the paper's printed average but for a few. Its figures are of its own pictures; "
    "others of the same generator give other figures."
)


@dataclass(frozen=True)
class PaperMethod:
    """A row of the paper.

    Attributes:
        name: of the method; a star marks those that it evaluates on pictures without faces alone.
        figures: for each generator, one value for each column, percent.
        average: the same, as printed; None where the table has no average.
    """

    name: str
    figures: tuple[tuple[float, ...], ...]
    average: tuple[float, ...] | None


@dataclass(frozen=True)
class PaperTable:
    """One of Tables 2 to 5."""

    number: int
    title: str
    generators: tuple[str, ...]
    columns: tuple[str, ...]
    methods: tuple[PaperMethod, ...]


@dataclass(frozen=True)
class PaperFigures:
    """All of them, and where they are from."""

    source: str
    tables: tuple[PaperTable, ...]


@cache
def paper_figures() -> PaperFigures:
    """The paper's figures, read once."""
    text = FIGURES_FILE.read_text(encoding="utf-8")
    return from_jsonable(PaperFigures, parse_json(text, subject=FIGURES_FILE.name), subject=FIGURES_FILE.name)


def paper_name(generator: str) -> str | None:
    """What the paper calls a generator, or None where it has none of that name."""
    plain = _plain(generator)
    known = {_plain(name): name for table in paper_figures().tables for name in table.generators}
    return known.get(plain) or ALIASES.get(plain)


def paper_columns(metrics: DetectionMetrics) -> dict[str, float | None]:
    """Our figures under the paper's names, shares in 0..1."""
    return {
        "AP": metrics.ap,
        "ACC": metrics.accuracy_at_half,
        "FPR": metrics.fake_missed_rate_at_half,
        "FNR": metrics.real_flagged_rate_at_half,
    }


def paper_section(report: EvaluationReport, *, wanted: bool = False) -> str | None:
    """The section with our figures beside the paper's; None where no generator is the paper's.

    Args:
        report: of an evaluation.
        wanted: print our figures in the paper's form where no generator is the paper's, too.
    """
    named: dict[str, list[SetReport]] = {}
    others = []
    for entry in report.generators:
        name = paper_name(entry.name)
        named.setdefault(name, []).append(entry) if name else others.append(entry)
    if not named and not wanted:
        return None
    parts = [MAPPING_NOTE]
    if not named:
        parts.append("None of the generators is one of the paper's: these are our figures alone, in its form.")
    for table in paper_figures().tables:
        shown = [(name, entry) for name in table.generators for entry in named.get(name, ())]
        if shown:
            parts += [_title(table, shown), _beside_the_papers(table, shown)]
    if others:
        parts.append("### Generators that the paper does not have" if named else "### Our generators")
        chunks = [others[i : i + IN_A_TABLE] for i in range(0, len(others), IN_A_TABLE)]
        parts += [_ours_alone(chunk) for chunk in chunks]
    return "\n\n".join(parts)


def _title(table: PaperTable, shown: Sequence[tuple[str, SetReport]]) -> str:
    found = {name for name, _ in shown}
    missing = [name for name in table.generators if name not in found]
    title = f"### Table {table.number}: {table.title}"
    renamed = [f"{name} is our {markdown_code(entry.name)}" for name, entry in shown if name != entry.name]
    notes = [f"without {', '.join(missing)}, of which there are no pictures here"] if missing else []
    return f"{title}\n\n{'; '.join(renamed + notes)}." if renamed or notes else title


def _beside_the_papers(table: PaperTable, shown: Sequence[tuple[str, SetReport]]) -> str:
    rows = [_our_row([entry for _, entry in shown], table.columns)]
    indices = [table.generators.index(name) for name, _ in shown]
    for method in table.methods:
        values = [[v / 100 for v in method.figures[index]] for index in indices]
        rows.append((method.name, *_cells(values)))
    return markdown_table(_head([name for name, _ in shown], table.columns), rows)


def _ours_alone(entries: Sequence[SetReport]) -> str:
    return markdown_table(_head([entry.name for entry in entries], COLUMNS), [_our_row(entries, COLUMNS)])


def _our_row(entries: Sequence[SetReport], columns: Sequence[str]) -> tuple[str, ...]:
    figures = [paper_columns(entry.metrics) for entry in entries]
    return (OURS, *_cells([[values[column] for column in columns] for values in figures]))


def _cells(values: Sequence[Sequence[float | None]]) -> list[str]:
    """One cell for each generator and column, and the averages over generators; n/a in an average that lacks one."""
    averages = [_mean(column) for column in zip(*values, strict=True)]
    return [percent(value) for row in (*values, averages) for value in row]


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if len(defined) == len(values) else None


def _head(generators: Sequence[str], columns: Sequence[str]) -> list[str]:
    return ["method", *(f"{name} {column}" for name in (*generators, "Average") for column in columns)]


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
