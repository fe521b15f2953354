"""Export a trained run, or build engines from a bundle: `python -m export.trt --int8` (or `--fp16`, `--fp32`).

A run becomes a model bundle: the ONNX graphs, a TensorRT engine for each precision where TensorRT is installed, golden
inputs and the manifest with calibration and parity figures. That needs the `train` and `export` extras.

    python -m export.trt --run runs/demo --int8

A bundle gets engines from its ONNX graphs, on the machine where they will run. That needs numpy and TensorRT alone.

    python -m export.trt --model models/demo --int8
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from export.trt_options import Options, parse_options
from runtime.bundle import Bundle
from runtime.errors import NTFError
from runtime.manifest import MANIFEST_FILE

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse_options(arguments)
    try:
        if builds_from_bundle(options):
            build_bundle_engines(options)
        else:
            export_run(options)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; an earlier bundle stands as it was", file=sys.stderr)
        return INTERRUPTED
    return 0


def builds_from_bundle(options: Options) -> bool:
    """Whether engines are built into the bundle that --model names; otherwise a run is exported."""
    if options.run is not None or options.model is None:
        return False
    return options.model.is_file() or (options.model / MANIFEST_FILE).is_file()


def export_run(options: Options) -> Bundle:
    """The bundle of a run; see `export.run_export.export_run`."""
    from export.run_export import export_run as export  # torch and onnx: needed for this mode alone

    return export(options)


def build_bundle_engines(options: Options) -> Bundle:
    """The bundle with engines built from its graphs; see `export.bundle_engines.build_bundle_engines`."""
    from export.bundle_engines import build_bundle_engines as build

    return build(options)


if __name__ == "__main__":
    sys.exit(main())
