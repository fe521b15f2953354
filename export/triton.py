"""A Triton model repository from a bundle: `python -m export.triton --model M --out repo/`.

One model for each precision and backend, NAME_PRECISION_BACKEND. The graphs take raw pixels, so there is no model for
preprocessing and no ensemble; thresholds and temperature stand in the parameters of each `config.pbtxt`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from export.bundling import carried_facts, write_file
from export.errors import ExportError
from export.folder_swap import replaced_folder
from export.triton_config import (
    BACKENDS,
    CONFIG_FILE,
    PREFIX,
    BackendName,
    Device,
    Serving,
    config_text,
    model_config,
    parsed_config,
)
from runtime.backends.choice import compared_artifact, parity_passed
from runtime.bundle import Bundle, newest_bundle, open_bundle
from runtime.errors import NTFError
from runtime.manifest import PRECISIONS, ArtifactSpec, Precision

MARK = f"{PREFIX}manifest_sha256"
# Triton puts a model's name into URLs and metrics.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Options:
    """Write a Triton model repository from a bundle."""

    out: Path
    """Repository folder to write; an earlier one of this command is replaced as a whole."""
    model: Path | None = None
    """Bundle folder or .zip; default: the newest in models/."""
    name: str | None = None
    """Beginning of the models' names; default: the name of the bundle."""
    backends: tuple[BackendName, ...] = ()
    """Backends of Triton; default: all that the bundle has files for."""
    precisions: tuple[Precision, ...] = ()
    """Precisions; default: FP32, and those that passed their comparison with PyTorch."""
    run: Path | None = None
    """Run that the bundle was exported from: OpenVINO's files are compared on its validation pictures as well."""
    device: Device = "cpu"
    """What ONNX graphs run on; OpenVINO's backend has CPUs only, TensorRT's GPUs only."""
    instances: int = 1
    """Copies of each model, on each GPU or on the CPU."""
    max_batch_size: int = 64
    """Pictures that Triton joins at most; of an engine not more than it was built for."""
    preferred_batch_sizes: tuple[int, ...] | None = None
    """Sizes at which Triton waits no longer; default: 8, or what an engine was optimised for."""
    max_queue_delay_us: int = 500
    """Microseconds that a request waits for others to join it."""
    version: int = 1
    """Version of the models in Triton's sense."""


@dataclass(frozen=True)
class ServedModel:
    """One model of a repository.

    Attributes:
        config: its ModelConfig message.
        files: content of the files of its version, by name.
        about: one line for people.
    """

    config: Any
    files: dict[str, bytes]
    about: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m export.triton", args=arguments)
    console = Console(markup=False, soft_wrap=True)  # file names are not markup
    try:
        write_repository(options, console)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_repository(options: Options, console: Console) -> None:
    """The repository of a bundle, in place of an earlier one.

    Raises:
        NTFError: whatever was wrong, in a full sentence; an earlier repository stands as it was.
    """
    require_own_repository(options.out)
    if options.version < 1:
        raise ExportError("--version", got=str(options.version), wanted="at least 1", remedy="leave it out")
    bundle = open_bundle(options.model or newest_bundle(Path("models")))
    models = list(served_models(bundle, options, console))
    if not models:
        raise ExportError(
            str(bundle.location),
            got="no file that a backend of Triton may serve",
            wanted="a graph that passed its comparison, or an engine of TensorRT",
            remedy="run python -m export.trt, or name --backends and --precisions",
        )
    with replaced_folder(options.out) as new:
        for model in models:
            write_model(new / model.config.name, model, options.version)
    for model in models:
        console.print(f"  {model.config.name}: {model.about}")
    console.print(f"serve it with: tritonserver --model-repository={options.out}")


def served_models(bundle: Bundle, options: Options, console: Console) -> Iterator[ServedModel]:
    """Each model that was asked for, or that the bundle has where nothing was; what is left out is said.

    Raises:
        ExportError: what was asked for by name cannot be served.
    """
    reasons: dict[tuple[BackendName, str], str | None] = {
        (backend, precision): why_not(bundle, backend, precision, named=precision in options.precisions)
        for backend in options.backends or BACKENDS
        for precision in options.precisions or PRECISIONS
    }
    require_asked(reasons, options)
    for (backend, precision), reason in reasons.items():
        if reason is not None:
            console.print(f"without {backend} {precision}: {reason}")
        else:
            yield served_model(bundle, backend, artifacts_for(bundle, backend, precision)[0], options)


def require_asked(reasons: Mapping[tuple[BackendName, str], str | None], options: Options) -> None:
    """Nothing where each backend and precision that was named is served, and each pair where both were named.

    Args:
        reasons: why each pair is not served, or None.
        options: of the command.

    Raises:
        ExportError: naming the first that is not.
    """
    groups = [[pair] for pair in reasons if options.backends and options.precisions]
    groups += [[pair for pair in reasons if name in pair] for name in (*options.backends, *options.precisions)]
    for group in groups:
        refused = [(pair, reason) for pair in group if (reason := reasons[pair]) is not None]
        if len(refused) == len(group):
            (backend, precision), reason = refused[0]
            raise ExportError(
                f"{backend} {precision}", got=reason, wanted="a file that it can serve", remedy=_remedy(backend)
            )


def why_not(bundle: Bundle, backend: BackendName, precision: str, *, named: bool) -> str | None:
    """Why a precision is not served by a backend, or None.

    Args:
        bundle: opened.
        backend: one of BACKENDS.
        precision: one of PRECISIONS.
        named: whether the precision was asked for by name, and is served whatever its comparison said.
    """
    found = artifacts_for(bundle, backend, precision)
    if backend == "tensorrt_plan":
        others = [a for a in bundle.manifest.artifacts if a.format == "engine" and a.precision == precision]
        if not found and others:
            return f"{others[0].file} is an engine of {others[0].builder}, which Triton's TensorRT cannot load"
        if len(found) > 1:
            return f"{len(found)} engines ({', '.join(a.file for a in found)}), of which one would have to be chosen"
        if found and found[0].profile is not None and found[0].profile.min_batch > 1:
            return f"{found[0].file} takes at least {found[0].profile.min_batch} pictures at once"
    if not found:
        return f"the bundle has no {'engine' if backend == 'tensorrt_plan' else 'ONNX graph'} of it"
    if named or precision == "fp32":  # as `precision="auto"` of the runtime chooses
        return None
    compared = compared_artifact(bundle.manifest, found[0])
    if compared is None or not parity_passed(compared, backend):
        graph = compared.file if compared is not None else f"the graph of {found[0].file}"
        return f"{graph} has no passed comparison with PyTorch; it is served where --precisions names it"
    return None


def artifacts_for(bundle: Bundle, backend: BackendName, precision: str) -> list[ArtifactSpec]:
    """Files of the bundle from which a backend can serve a precision."""
    if backend == "tensorrt_plan":
        mine = (a for a in bundle.manifest.artifacts if a.format == "engine" and a.flavour == "trt")
        return [artifact for artifact in mine if artifact.precision == precision]
    artifact = bundle.manifest.onnx_artifact(precision)
    return [] if artifact is None else [artifact]


def served_model(bundle: Bundle, backend: BackendName, artifact: ArtifactSpec, options: Options) -> ServedModel:
    """Configuration and files of one model.

    Raises:
        ExportError: its name is none for Triton, or OpenVINO's file gives other scores than the graph.
    """
    serving = _serving(backend, artifact, options)
    name = f"{_name(bundle, options)}_{artifact.precision}_{backend}"
    facts = carried_facts(bundle.manifest, artifact)
    about = f"{artifact.file}, {artifact.size_bytes / 1e6:.1f} MB"
    if backend == "openvino":
        files, about = _openvino_files(bundle, artifact, options.run)
    else:
        files = {BACKENDS[backend].model_file: bundle.read(artifact)}
    if artifact.format == "engine":
        facts |= {"engine_builder": artifact.builder, "engine_targets": ",".join(artifact.targets)}
        about += f", by {artifact.builder} for {', '.join(artifact.targets)}"
    return ServedModel(model_config(name, backend, bundle.manifest, serving, facts), files, about)


def write_model(folder: Path, model: ServedModel, version: int) -> None:
    """Write one model into a new folder and read its configuration back."""
    (folder / str(version)).mkdir(parents=True)
    for name, content in model.files.items():
        write_file(folder / str(version) / name, content)
    write_file(folder / CONFIG_FILE, config_text(model.config).encode())
    if parsed_config((folder / CONFIG_FILE).read_text(encoding="utf-8")) != model.config:
        raise ExportError(
            str(folder / CONFIG_FILE), got="another text than was written", wanted="the same", remedy="write it again"
        )


def require_own_repository(folder: Path) -> None:
    """Nothing where there is no folder, an empty one, or a repository that this command wrote.

    Raises:
        ExportError: something else is in it, which would be lost.
    """
    if not folder.exists():
        return
    foreign = [str(folder)] if not folder.is_dir() else [p.name for p in sorted(folder.iterdir()) if not _is_ours(p)]
    if foreign:
        raise ExportError(
            f"--out {folder}",
            got=f"a path with something else in it than models of this command ({foreign[0]})",
            wanted="a new folder, or an earlier repository",
            remedy="choose another folder; Triton serves several (--model-repository twice)",
        )


def _is_ours(model: Path) -> bool:
    config = model / CONFIG_FILE
    if not config.is_file():
        return False
    try:
        return MARK in parsed_config(config.read_text(encoding="utf-8")).parameters
    except (ExportError, UnicodeDecodeError):
        return False


def _serving(backend: BackendName, artifact: ArtifactSpec, options: Options) -> Serving:
    largest, preferred = options.max_batch_size, options.preferred_batch_sizes
    if artifact.profile is not None:
        largest = min(largest, artifact.profile.max_batch)
    if preferred is None:
        preferred = (min(largest, artifact.profile.opt_batch if artifact.profile else 8),)
    device: dict[BackendName, Device] = {"onnxruntime": options.device, "openvino": "cpu", "tensorrt_plan": "gpu"}
    return Serving(largest, tuple(sorted(preferred)), options.max_queue_delay_us, device[backend], options.instances)


def _name(bundle: Bundle, options: Options) -> str:
    name = options.name or bundle.manifest.name
    if not _MODEL_NAME.fullmatch(name):
        raise ExportError(
            "model name",
            got=repr(name),
            wanted="letters, digits, '_', '-' and '.', a letter or digit first",
            remedy="choose one with --name",
        )
    return name


def _openvino_files(bundle: Bundle, artifact: ArtifactSpec, run: Path | None) -> tuple[dict[str, bytes], str]:
    """OpenVINO's files of a graph, compared first, and a line about them."""
    try:
        from export.openvino_ir import checked_ir, parity_text, pictures_of_run  # PyTorch comes with it
    except ImportError as error:
        raise ExportError(
            "Triton backend openvino",
            got=str(error),
            wanted="PyTorch and OpenVINO, to compare its file",
            remedy='pip install "ntf-toolkit[train,export,cpu]", or --backends onnxruntime tensorrt_plan without it',
        ) from error
    ir = checked_ir(bundle, artifact, pictures_of_run(bundle, run))
    return {"model.xml": ir.xml, "model.bin": ir.weights}, f"OpenVINO IR, {parity_text(ir.parity)}"


def _remedy(backend: BackendName) -> str:
    if backend == "tensorrt_plan":
        return 'export on the GPU that will serve, with pip install "ntf-toolkit[trt]"'
    return "leave it out, or export the precision with python -m export.trt"


if __name__ == "__main__":
    sys.exit(main())
