"""The `ntf` command: predict, score, inspect, pack, serve, tune, doctor.

Exit status: 0 everything scored, 1 some pictures failed (doctor: no back-end runs), 2 wrong usage, nothing found
or a bad bundle, 130 stopped by Ctrl-C, 141 when the reader of the output went away. Results go to standard
output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import runtime
from runtime.errors import NTFError
from runtime.scoring import command as score_command
from runtime.serve.command import add_serve

if TYPE_CHECKING:
    from runtime.detector import Detection, DetectorInfo

OK, SOME_FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141

_TABLE = "{verdict:<9}  {probability:>9}  {similarity:>10}  {picture}"
# With --stability: largest minus smallest fake probability, and what the verdict is on the picture as it is.
_STABILITY_TABLE = "{verdict:<9}  {probability:>9}  {similarity:>10}  {spread:>9}  {unchanged:<9}  {picture}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command.

    Args:
        arguments: without the program's name; None takes them from the command line.
    """
    _escape_unprintable(sys.stdout)
    _escape_unprintable(sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except NTFError as error:
        print(f"ntf: {_printable(str(error))}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("ntf: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough, as `head` does; the interpreter's last flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ntf", description="Tells generated pictures from natural ones.")
    parser.add_argument("--version", action="version", version=f"ntf-toolkit {runtime.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_predict(commands.add_parser("predict", help="score pictures"))
    score_command.add_options(commands.add_parser("score", help="score a large collection into one file"))
    inspect = commands.add_parser("inspect", help="show what a model bundle says about itself")
    inspect.add_argument("model", metavar="MODEL", help="folder or .zip file of a model bundle")
    inspect.add_argument("--json", action="store_true", help="the manifest as JSON")
    inspect.set_defaults(run=_inspect)
    pack = commands.add_parser("pack", help="write a model bundle as one .zip file")
    pack.add_argument("model", metavar="MODEL", help="folder or .zip file of a model bundle")
    pack.add_argument("target", metavar="ZIP", nargs="?", help="file to write; default: MODEL.zip beside the folder")
    pack.set_defaults(run=_pack)
    add_serve(commands.add_parser("serve", help="answer over HTTP, with a page for people"))
    _add_tune(commands.add_parser("tune", help="measure which back-end is fastest here"))
    doctor = commands.add_parser("doctor", help="show what is installed, what would run, what to install")
    doctor.add_argument("--json", action="store_true", help="the report as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.description = "Scores pictures. Exit status: 0 all scored, 1 some failed, 2 usage or bad bundle."
    parser.add_argument("paths", metavar="PATH", nargs="+", help="files, folders (searched) and patterns")
    parser.add_argument("--model", metavar="MODEL", help="bundle folder or .zip; default: newest in ./models")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--backend", default="auto", help="auto, or one that `ntf doctor` shows")
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16 or int8")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once (32)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of one inference")
    parser.add_argument("--hint", metavar="HINT", help="latency or throughput, for trt and openvino")
    parser.add_argument("--cuda-graphs", action="store_true", help="launch batches as CUDA graphs, for trt")
    parser.add_argument(
        "--views", default="center", help="parts of a picture whose logits are averaged: center, five or grid (3x3)"
    )
    parser.add_argument(
        "--check-golden", action="store_true", help="first check that the golden inputs give what they gave at export"
    )
    parser.add_argument(
        "--stability",
        action="store_true",
        help="score re-encoded and rescaled versions too; a verdict that flips becomes uncertain",
    )
    parser.set_defaults(run=_predict)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = "Times each back-end that runs here, and keeps the times for --backend auto."
    parser.add_argument("--model", metavar="MODEL", help="bundle folder or .zip file; default: newest in ./models")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="inferences of each batch (20)")
    parser.add_argument("--json", action="store_true", help="the times as JSON")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="show what was measured, and measure nothing")
    instead.add_argument("--clear", action="store_true", help="forget what was measured")
    parser.set_defaults(run=_tune)


def _predict(options: argparse.Namespace) -> int:
    from runtime.arguments import require_positive
    from runtime.bundle import newest_bundle
    from runtime.detector import Detector
    from runtime.picture_paths import expand_pictures

    require_positive("batch_size", options.batch_size)
    pictures = expand_pictures(options.paths)
    model = Path(options.model) if options.model else newest_bundle(Path("models"))
    with Detector.load(
        model,
        backend=options.backend,
        precision=options.precision,
        threads=options.threads,
        hint=options.hint,
        cuda_graphs=options.cuda_graphs,
        max_batch=options.batch_size,
        check_golden=options.check_golden,
    ) as detector:
        detections = detector.stream(
            pictures, batch_size=options.batch_size, views=options.views, stability=options.stability
        )
        checked = "; golden inputs give what they gave at export" if options.check_golden else ""
        print(_info_line(detector.info) + checked, file=sys.stderr)
        failed = 0
        if not options.json:
            print(_table_header(stability=options.stability), flush=True)
        for detection in detections:
            failed += detection.error is not None
            print(
                _json_line(detection) if options.json else _table_line(detection, stability=options.stability),
                flush=True,
            )
    print(f"{len(pictures) - failed} scored, {failed} failed", file=sys.stderr)
    return SOME_FAILED if failed else OK


def _inspect(options: argparse.Namespace) -> int:
    from runtime.bundle import open_bundle
    from runtime.describe import describe_manifest
    from runtime.manifest import manifest_to_json

    bundle = open_bundle(options.model)
    if options.json:
        print(manifest_to_json(bundle.manifest), end="")
    else:
        print(f"bundle           {_printable(str(bundle.location))}: every file is as the manifest says")
        print(_printable(describe_manifest(bundle.manifest), keep="\n"))
    return OK


def _pack(options: argparse.Namespace) -> int:
    from runtime.bundle import pack_bundle

    model = Path(options.model).absolute()
    packed = pack_bundle(model, options.target or model.with_name(f"{model.name.removesuffix('.zip')}.zip")).location
    print(f"{_printable(str(packed))}: {packed.stat().st_size} bytes")
    return OK


def _tune(options: argparse.Namespace) -> int:
    from runtime.bundle import newest_bundle, open_bundle
    from runtime.tune import measured, tuning_text
    from runtime.tuning import clear_tuning, kept_tuning

    bundle = open_bundle(options.model or newest_bundle(Path("models")))
    if options.clear:
        print("the times are forgotten" if clear_tuning(bundle.manifest) else "nothing was measured")
        return OK
    if options.show:
        tuning, note = kept_tuning(bundle.manifest)
        if tuning is None:
            print(_printable(note or "nothing was measured: run `ntf tune`"))
            return SOME_FAILED
    else:
        tuning = measured(bundle, repeats=options.repeats, say=lambda text: print(text, file=sys.stderr))
    print(json.dumps(asdict(tuning), indent=1) if options.json else _printable(tuning_text(tuning), keep="\n"))
    return OK


def _doctor(options: argparse.Namespace) -> int:
    from runtime.doctor import examine, report_text

    report = examine()
    print(json.dumps(report.to_json(), indent=1) if options.json else report_text(report))
    return OK if report.runs() else SOME_FAILED


def _info_line(info: DetectorInfo) -> str:
    return (
        f"model {_printable(info.location)} ({_printable(info.model)}): {info.precision} on {info.backend}"
        f" {info.backend_version}, {info.device}"
    )


def _table_header(*, stability: bool) -> str:
    table = _STABILITY_TABLE if stability else _TABLE
    return table.format(
        verdict="verdict",
        probability="fake",
        similarity="similarity",
        spread="spread",
        unchanged="unchanged",
        picture="picture",
    )


def _table_line(detection: Detection, *, stability: bool) -> str:
    table, found = _STABILITY_TABLE if stability else _TABLE, detection.stability
    if detection.error is not None:
        empty = dict.fromkeys(("probability", "similarity", "spread", "unchanged"), "-")
        return table.format(verdict="error", **empty, picture=_printable(detection.error))
    return table.format(
        verdict=detection.verdict,
        probability=f"{100 * (detection.fake_probability or 0.0):.2f} %",
        similarity=f"{detection.trace_similarity:+.4f}",
        spread="-" if found is None else f"{100 * found.spread:.2f} %",
        unchanged="-" if found is None else found.verdict,
        picture=_printable(detection.source),
    )


def _json_line(detection: Detection) -> str:
    # Escaped to ASCII: valid JSON whatever encoding the output has, and whatever bytes a file name holds.
    return json.dumps(detection.to_json(), allow_nan=False)


def _printable(text: str, *, keep: str = "") -> str:
    """Text without control characters: a file name must not move the cursor or forge a line."""
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def _escape_unprintable(stream: object) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
