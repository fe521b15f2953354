"""OpenVINO's own format of a bundle's graphs: `python -m export.openvino_ir --model M --out DIR`.

Writes model.<precision>.xml and .bin, the same bytes each time, after a comparison with the ONNX graph that they come
from. OpenVINO loads them as they are; thresholds and hashes stand in their `rt_info`.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from export.bundling import carried_facts, golden_images, write_file
from export.calibration import PreparedPictures
from export.errors import ExportError
from export.folder_swap import replaced_folder
from export.onnx_export import PARITY_LIMIT
from export.parity import LIMITS, broken_limits, compare_logits
from export.run_inputs import require_checkpoint, validation_pictures
from runtime.backends import Outputs, open_backend
from runtime.backends.openvino import compile_for_cpu
from runtime.bundle import Bundle, newest_bundle, open_bundle
from runtime.errors import NTFError
from runtime.manifest import INPUT_NAME, OUTPUTS, PRECISIONS, ArtifactSpec, ParitySpec, Precision
from train.checkpoint import load_config

BACKEND = "openvino"
# Below this key of `rt_info` is what a bundle's manifest says; OpenVINO keeps keys of its own beside it.
RT_INFO = "ntf"
INSTALL = 'pip install "ntf-toolkit[cpu]"'
# The same arithmetic by the same library, whatever the precision: only the order of a sum may change.
IR_LIMITS = LIMITS["fp32"]
_BATCH_SIZE = 16


@dataclass(frozen=True)
class OpenVinoIR:
    """A graph in OpenVINO's format.

    Attributes:
        xml: the topology, with facts of the bundle in `rt_info`.
        weights: the content of the .bin file.
        parity: the comparison with the ONNX graph in OpenVINO, on the golden inputs and further pictures.
    """

    xml: bytes
    weights: bytes
    parity: ParitySpec


@dataclass(frozen=True)
class Options:
    """Write graphs of a bundle as OpenVINO IR; none asked means all precisions."""

    out: Path
    """Folder to write; an earlier one with nothing but these files is replaced."""
    model: Path | None = None
    """Bundle folder or .zip; default: the newest in models/."""
    precisions: tuple[Precision, ...] = ()
    """Which graphs; default: all of the bundle."""
    run: Path | None = None
    """Run that the bundle was exported from: compare on its validation pictures as well."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m export.openvino_ir", args=arguments)
    console = Console(markup=False, soft_wrap=True)  # file names are not markup
    try:
        bundle = open_bundle(options.model or newest_bundle(Path("models")))
        require_own_folder(options.out)
        pictures = pictures_of_run(bundle, options.run)
        made = {
            artifact.precision: checked_ir(bundle, artifact, pictures)
            for artifact in asked_artifacts(bundle, options.precisions)
        }
        with replaced_folder(options.out) as new:
            for precision, ir in made.items():
                write_file(new / f"model.{precision}.xml", ir.xml)
                write_file(new / f"model.{precision}.bin", ir.weights)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for precision, ir in made.items():
        console.print(f"{options.out / f'model.{precision}.xml'}: {parity_text(ir.parity)}")
    return 0


def checked_ir(bundle: Bundle, artifact: ArtifactSpec, pictures: PreparedPictures | None = None) -> OpenVinoIR:
    """IR of one ONNX graph, compared with that graph in OpenVINO.

    Args:
        bundle: opened.
        artifact: an ONNX graph of it.
        pictures: compared in addition to the bundle's golden inputs.

    Raises:
        ExportError: the IR gives other scores than the graph.
        BackendError: OpenVINO is missing or cannot open the graph.
    """
    model = bundle.read(artifact)
    with closing(open_backend(BACKEND, model, bundle.manifest, file=artifact.file)) as backend:
        xml, weights = ir_from_onnx(model, carried_facts(bundle.manifest, artifact))
        infer = opened_ir(xml, weights)
        pairs = [(infer(images), backend.infer(images)) for images in compared_images(bundle, pictures)]
    return OpenVinoIR(xml, weights, compared(bundle, artifact, pairs))


def ir_from_onnx(model: bytes, facts: Mapping[str, str]) -> tuple[bytes, bytes]:
    """The .xml and the .bin of an ONNX graph that keeps the contract; equal graphs and facts give equal bytes.

    Args:
        model: content of an .onnx file.
        facts: written to `rt_info`, below RT_INFO.
    """
    openvino = _openvino()
    graph = openvino.Core().read_model(io.BytesIO(model))
    graph.set_friendly_name("detector")
    graph.get_parameters()[0].set_layout(openvino.Layout("NHWC"))
    for index, node in enumerate(graph.get_ordered_ops()):
        # A name that OpenVINO gave counts all nodes of the process so far.
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}/{index}")
    for key, value in facts.items():
        graph.set_rt_info(value, [RT_INFO, key])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(graph, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def opened_ir(xml: bytes, weights: bytes) -> Any:
    """Function from images (N, H, W, 3) uint8 to Outputs: the IR as the runtime's back-end would open it."""
    request = compile_for_cpu(xml, weights).create_infer_request()

    def infer(images: NDArray[np.uint8]) -> Outputs:
        results = request.infer({INPUT_NAME: images}, share_outputs=False)
        return Outputs(**{name: np.asarray(results[name]) for name in OUTPUTS})

    return infer


def compared_images(bundle: Bundle, pictures: PreparedPictures | None) -> Iterator[NDArray[np.uint8]]:
    """Batches of pictures to compare on: golden inputs together and one by one, then those of a run."""
    golden = bundle.manifest.golden
    if golden is None:
        images = golden_images(bundle.manifest.preprocess.height, bundle.manifest.preprocess.width)
    else:
        images = np.load(io.BytesIO(bundle.read(golden)))["images"]
    yield images
    yield from np.split(images, len(images))
    if pictures is not None:
        yield from pictures.batches(_BATCH_SIZE)


def compared(bundle: Bundle, artifact: ArtifactSpec, pairs: Iterable[tuple[Outputs, Outputs]]) -> ParitySpec:
    """Figures of an IR against its ONNX graph; what the graph calls a picture is its label.

    Args:
        bundle: for the calibration.
        artifact: the graph.
        pairs: outputs of the IR and of the graph for the same pictures.

    Raises:
        ExportError: they differ more than IR_LIMITS and PARITY_LIMIT allow.
    """
    ours, theirs = (Outputs(*map(np.concatenate, zip(*side, strict=True))) for side in zip(*pairs, strict=True))
    calibration = bundle.manifest.calibration[artifact.precision]
    labels = (theirs.logits > calibration.fake_threshold).astype(np.int64)
    parity = compare_logits(
        ours.logits,
        theirs.logits,
        labels,
        calibration=calibration,
        reference_calibration=calibration,
        backend=f"{BACKEND} IR",
        limits=IR_LIMITS,
    )
    parity = replace(parity, reference=f"{artifact.file} in {BACKEND}")
    broken = broken_limits(parity, IR_LIMITS, calibration=calibration, logit_std=float(np.std(theirs.logits)))
    for name, mine, wanted in zip(OUTPUTS, ours, theirs, strict=True):
        difference = float(np.abs(mine - wanted).max() / max(1.0, float(np.abs(wanted).max())))
        if not difference <= PARITY_LIMIT:
            broken.append(f"{name} differ by {difference:.3g}, at most {PARITY_LIMIT:g}")
    if broken:
        raise ExportError(
            f"OpenVINO IR of {artifact.file}",
            got=f"scores unlike those of the graph: {'; '.join(broken)}",
            wanted="the same scores",
            remedy="let OpenVINO read the .onnx file, or try another version of OpenVINO",
        )
    return parity


def asked_artifacts(bundle: Bundle, precisions: Sequence[Precision]) -> list[ArtifactSpec]:
    """ONNX graphs of the asked precisions, widest first; all when none is asked.

    Raises:
        ExportError: the bundle has no graph of a precision.
    """
    there = {name: artifact for name in PRECISIONS if (artifact := bundle.manifest.onnx_artifact(name)) is not None}
    for name in precisions or there:
        if name not in there:
            raise ExportError(
                f"--precisions {name}",
                got=f"a bundle with {', '.join(there) or 'no ONNX graph'}",
                wanted="a precision of the bundle",
                remedy=f"leave it out, or run python -m export.trt --{name}",
            )
    return [artifact for name, artifact in there.items() if not precisions or name in precisions]


def pictures_of_run(bundle: Bundle, run: Path | None) -> PreparedPictures | None:
    """Validation pictures of the run that a bundle was exported from; None where no run is named.

    Raises:
        NTFError: it is another run, or its pictures cannot be read.
    """
    if run is None:
        return None
    require_checkpoint(run, bundle.manifest.checkpoint_sha256, model=bundle.location)
    pictures = validation_pictures(load_config(run))
    return PreparedPictures(pictures, bundle.manifest.preprocess, pictures.content_sha256())


def require_own_folder(folder: Path) -> None:
    """Nothing where there is no folder, or one with nothing but IR files of this command.

    Raises:
        ExportError: something else is there.
    """
    known = {f"model.{precision}.{ending}" for precision in PRECISIONS for ending in ("xml", "bin")}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= known):
        raise ExportError(
            f"--out {folder}",
            got="a path that holds something else than IR files",
            wanted="a new folder, or one that this command wrote",
            remedy="choose another folder",
        )


def parity_text(parity: ParitySpec) -> str:
    """One line about a comparison that passed."""
    return (
        f"as {parity.reference} on {parity.pictures} pictures, logit difference {parity.logit_diff_max:.2g} at most, "
        f"{parity.verdict_flips} verdict flips"
    )


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ExportError("OpenVINO IR", got=f"no OpenVINO ({error})", wanted=BACKEND, remedy=INSTALL) from error
    return openvino


if __name__ == "__main__":
    sys.exit(main())
