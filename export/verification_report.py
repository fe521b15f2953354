"""A verification for reading: one section of Markdown for each check, with its pictures, beside the JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.batch_invariance import LIMITS as INVARIANCE_LIMITS
from export.latency import STAGES, Latency, LatencySweep, LeftOut
from export.layer_comparison import EQUAL_DB, LayerComparison, TensorError
from export.parity import LIMITS
from export.report import COLUMNS, JSON_FILE, LEFT_OUT, MARKDOWN_FILE, parity_rows
from export.verification import Verification, verification_json
from export.verification_figures import write_latency_figure, write_layers_figure, write_logits_figure
from runtime.golden import GoldenCheck
from train.checkpoint import make_folder, write_atomically
from train.markdown import markdown_table, markdown_text

LOGITS_FIGURE, LAYERS_FIGURE, LATENCY_FIGURE = "verify_logits.png", "verify_layers.png", "verify_latency.png"
# Tensors that are listed; the JSON has all.
LISTED_LAYERS = 12


def write_verification(folder: Path, result: Verification, about: Mapping[str, Any]) -> list[Path]:
    """Write JSON, Markdown and pictures, each atomically; their paths.

    Args:
        folder: made where it is not there; pictures of an earlier verification go.
        result: what was found.
        about: model, data, machine and versions.

    Raises:
        NTFError: the folder cannot be written, or the disk is full.
    """
    make_folder(folder, option="--out")
    for name in (LAYERS_FIGURE, LATENCY_FIGURE):
        (folder / name).unlink(missing_ok=True)
    write_logits_figure(folder / LOGITS_FIGURE, result.scores)
    if result.layers:
        write_layers_figure(folder / LAYERS_FIGURE, result.layers)
    if result.latency is not None:
        write_latency_figure(folder / LATENCY_FIGURE, result.latency)
    texts = {JSON_FILE: verification_json(result, about), MARKDOWN_FILE: verification_markdown(result, about)}
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [
        folder / name for name in (*texts, LOGITS_FIGURE, LAYERS_FIGURE, LATENCY_FIGURE) if (folder / name).exists()
    ]


def verification_markdown(result: Verification, about: Mapping[str, Any]) -> str:
    """The report for reading; arguments as for `write_verification`."""
    sections = {
        "Against PyTorch FP32": _parity_section(result),
        "Golden inputs": _golden_section(result),
        "Batch invariance": _invariance_section(result),
        **{f"Layers of {c.precision} against fp32": _layers_section(c) for c in result.layers},
    }
    if result.latency is not None:
        sections["Latency"] = _latency_section(result.latency)
    sections["Where this comes from"] = _provenance(about)
    head = [f"# Verification of {markdown_text(str(about['model']))}", _verdict(result)]
    return "\n\n".join([*head, *(f"## {title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _verdict(result: Verification) -> str:
    if result.passed:
        return "Passed: every gate holds."
    failures = [f"- FAIL {where}: {'; '.join(words)}" for where, words in result.failures.items()]
    return "\n".join(["FAILED:", "", *(markdown_text(line) for line in failures)])


def _parity_section(result: Verification) -> str:
    return "\n".join(
        [
            markdown_table(COLUMNS, parity_rows(result.comparisons)),
            "",
            "max and mean diff: of the raw logits; AP pts, acc pts: change in percentage points, accuracy at each",
            "precision's own threshold; flips/opp: verdicts that differ, and how many of them between real and fake.",
            "",
            f"![Differences of the logits]({LOGITS_FIGURE})",
            "",
            "Limits (logit differences are divided by the PyTorch model's temperature, or by a quarter of its logits'",
            "standard deviation where that is more):",
            "",
            *(f"- {name}: {_limits_text(name)}" for name in LIMITS),
        ]
    )


def _golden_section(result: Verification) -> str:
    outputs = list(dict.fromkeys(name for check in result.golden for name in check.differences))
    rows = [
        [check.precision, check.backend, *(_golden_cell(check, name) for name in outputs), _pass(check.broken())]
        for check in result.golden
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for check in result.golden:
        reasons.setdefault((check.precision, check.reason), []).append(check.backend)
    return "\n".join(
        [
            "The bundle's golden inputs, against the outputs that the export stored: norm of the difference over norm",
            "of the stored values, and what it may be at most.",
            "",
            markdown_table(["precision", "back-end", *outputs, "result"], rows),
            "",
            *(f"- {precision} on {' and '.join(names)}: {reason}" for (precision, reason), names in reasons.items()),
        ]
    )


def _golden_cell(check: GoldenCheck, output: str) -> str:
    if output not in check.differences:
        return "not stored"
    return f"{100 * check.differences[output]:.2g} of {100 * check.limits[output]:g} %"


def _invariance_section(result: Verification) -> str:
    rows = [
        [
            c.precision,
            c.backend,
            f"{c.logit_diff_max:.2g}",
            f"{c.limit:.2g}",
            f"{c.worst_picture} at {c.worst_place}" if c.logit_diff_max else "none moved",
            _pass(c.broken()),
        ]
        for c in result.invariance
    ]
    batch = result.invariance[0].batch
    return "\n".join(
        [
            f"Logits of pictures alone against those in batches of {batch}: one picture at each place, beside it in",
            "turn a picture of the other class, black, white, noise and a checkerboard; all of them are compared.",
            "",
            markdown_table(["precision", "back-end", "largest diff", "at most", "picture and place", "result"], rows),
            "",
            "Limits, in the unit of the comparison with PyTorch:",
            "",
            *(f"- {name}: {limit.logit_diff_max:g} ({limit.reason})" for name, limit in INVARIANCE_LIMITS.items()),
        ]
    )


def _layers_section(comparison: LayerComparison) -> str:
    noisiest = sorted(comparison.layers, key=lambda layer: layer.sqnr_db)[:LISTED_LAYERS]
    adding = sorted(comparison.layers, key=lambda layer: layer.own_sqnr_db)[:LISTED_LAYERS]
    culprit = comparison.broken() or [f"No tensor has an SQNR below {comparison.bound_db:g} dB."]
    return "\n".join(
        [
            f"{len(comparison.layers)} tensors on {comparison.pictures} pictures, in onnxruntime without optimising.",
            "SQNR: power of the FP32 tensor over that of the difference; own SQNR: without the noise that the node",
            "read; relative errors: largest difference over largest magnitude, mean over mean.",
            "",
            *map(markdown_text, culprit),
            "",
            f"![SQNR of each tensor]({LAYERS_FIGURE})",
            "",
            "Most noise:",
            "",
            _layers_table(noisiest),
            "",
            "Most noise added:",
            "",
            _layers_table(adding),
            "",
            f"Without a counterpart in fp32: {_names(comparison.graph_only)}; in {comparison.precision}: "
            f"{_names(comparison.reference_only)}.",
        ]
    )


def _layers_table(layers: Sequence[TensorError]) -> str:
    head = ["tensor", "node", "operator", "SQNR dB", "own SQNR dB", "max rel. error", "mean rel. error"]
    rows = [
        [
            layer.compared,
            layer.node,
            layer.op_type,
            _decibel(layer.sqnr_db),
            _decibel(layer.own_sqnr_db),
            f"{layer.max_relative_error:.2g}",
            f"{layer.mean_relative_error:.2g}",
        ]
        for layer in layers
    ]
    return markdown_table(head, rows)


def _latency_section(sweep: LatencySweep) -> str:
    parts = [f"![Times over batch sizes]({LATENCY_FIGURE})"]
    for stage, meaning in STAGES.items():
        found = [latency for latency in sweep.measured if latency.stage == stage]
        parts += [f"{stage.capitalize()} ({meaning}), median ms ± half the interquartile range:", _sweep_table(found)]
    parts += ["Percentiles of single pictures, in ms; n/a where there were too few calls:", _percentile_table(sweep)]
    firsts: dict[tuple[str, str, str], LeftOut] = {}
    for left in sweep.left_out:
        firsts.setdefault((left.precision, left.backend, left.stage), left)
    parts.append(
        "\n".join(
            f"- left out: {left.precision} on {left.backend}, {left.stage}, from batch {left.batch} on: {left.reason}"
            for left in firsts.values()
        )
    )
    return "\n\n".join(part for part in parts if part)


def _sweep_table(found: Sequence[Latency]) -> str:
    batches = sorted({latency.batch for latency in found})
    cells = {(f"{x.precision} on {x.backend}", x.batch): f"{x.p50_ms:.2f} ± {x.spread_ms:.2f}" for x in found}
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(cells.get((name, batch), LEFT_OUT) for batch in batches)] for name in names]
    return markdown_table(["batch", *map(str, batches)], rows)


def _percentile_table(sweep: LatencySweep) -> str:
    head = ["precision and back-end", "stage", "p50", "p90", "p95", "p99", "calls", "pictures/s"]
    rows = [
        [
            f"{x.precision} on {x.backend}",
            x.stage,
            *("n/a" if value is None else f"{value:.2f}" for value in (x.p50_ms, x.p90_ms, x.p95_ms, x.p99_ms)),
            str(x.calls),
            f"{x.pictures_per_second:.1f}",
        ]
        for x in sweep.measured
        if x.batch == 1
    ]
    return markdown_table(head, rows)


def _provenance(about: Mapping[str, Any]) -> str:
    environment = about["environment"]
    machine, versions = environment["machine"], environment["versions"]
    return "\n".join(
        [
            f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}",
            f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
            f"- toolkit {environment['tool_version']}, commit {environment['tool_commit']}",
            f"- weights: sha256 {about['checkpoint_sha256']}",
            f"- pictures: sha256 {about['data_sha256']}",
        ]
    )


def _limits_text(name: str) -> str:
    limits = dataclasses.asdict(LIMITS[name])
    reason = limits.pop("reason")
    return ", ".join(f"{key} {value:g}" for key, value in limits.items()) + f" ({reason})"


def _pass(broken: Sequence[str]) -> str:
    return "FAIL" if broken else "pass"


def _decibel(value: float) -> str:
    return "equal" if value >= EQUAL_DB else f"{value:.1f}"


def _names(names: Sequence[str]) -> str:
    return markdown_text(", ".join(names)) if names else "none"
