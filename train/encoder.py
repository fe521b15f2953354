"""Frozen-or-trained image encoders, by timm name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.embedding_store import EmbeddingStore
from train.errors import ConfigError

EncoderInput = Literal["rgb", "residual", "both"]

# What timm calls the parts in front of the first stage, in a ResNet and in an EfficientNet.
STEM = ("conv1", "conv_stem", "maxpool")
# What timm calls the group before, in the patterns of `group_matcher`.
MATCH_PREV_GROUP = (99999,)
# Side of the square of pixels whose mean predicts the one in its middle.
RESIDUAL_SIDE = 3
# Gives the residual of a photograph about the spread that the encoder was trained on.
RESIDUAL_GAIN = 8.0


class EncoderOutput(NamedTuple):
    """What an encoder says of a batch."""

    pooled: Tensor  # (N, d)
    cells: Tensor  # (N, h, w, d), each cell of the last map taken through the encoder's own pooling head


@dataclass(frozen=True)
class DepthOutput:
    """What one depth adds to the embedding.

    Attributes:
        pooled: (N, c) class tokens, or (N, 2 c) spatial statistics.
        values: (N, c, h, w) map.
        spread: whether `pooled` are spatial statistics.
    """

    pooled: Tensor
    values: Tensor
    spread: bool

    def on_grid(self, grid: Sequence[int]) -> Tensor:
        """What stands in for `pooled` in each cell of a coarser grid (h, w), (N, h, w, c or 2 c).

        A cell stands in for the class token, or for the mean; the standard deviation stays that of the whole map,
        since few values have no spread of their own.

        Raises:
            ConfigError: the grid does not divide the map.
        """
        (height, width), (rows, columns) = self.values.shape[2:], grid
        if height % rows or width % columns:
            raise ConfigError(
                "--encoder-depths",
                got=f"a map of {height} x {width} cells",
                wanted=f"a multiple of the last one, {rows} x {columns}",
                remedy="leave this depth out, or choose another encoder",
            )
        cells = F.avg_pool2d(self.values, (height // rows, width // columns)).permute(0, 2, 3, 1)
        if not self.spread:
            return cells
        spread = self.pooled[:, None, None, self.values.shape[1] :].expand(-1, rows, columns, -1)
        return torch.cat((cells, spread), dim=-1)


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
        early_downsampling: as timm has it; False sets the strides of the stem to 1.
        depths: stages of a convolutional network, or blocks of a ViT, that join the embedding, counted from 0; rising:
            class tokens of a ViT that has them, spatial statistics of the map otherwise. Traces of synthesis are
            low-level, and the last map has lost much of them.
        reads: pixels, their `residual`, or both, each of which the network is gone through with; the two embeddings
            then stand side by side.

    Raises:
        ConfigError: timm does not know the name, its feature map is not (N, d, h, w) or (N, tokens, d), or there is
            no such depth, or no stem whose strides could be set.
    """

    def __init__(
        self,
        name: str,
        *,
        early_downsampling: bool = True,
        depths: Sequence[int] = (),
        reads: EncoderInput = "rgb",
    ) -> None:
        super().__init__()
        require_model(name)
        self.name = name
        self.net = timm.create_model(name, pretrained=False, num_classes=0)
        if getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            raise ConfigError(
                f"encoder {name}",
                got="a channels-last feature map",
                wanted="(N, d, h, w) or (N, tokens, d)",
                remedy="choose a convolutional network or a plain ViT",
            )
        if not early_downsampling:
            _set_stem_strides_to_1(self.net, name)
        cfg = self.net.pretrained_cfg
        self.early_downsampling = early_downsampling
        # Where embeddings are kept while the encoder is frozen; None computes them.
        self.store: EmbeddingStore | None = None
        self.depths = list(depths)
        self.reads: EncoderInput = reads
        self._class_tokens = bool(self.depths) and getattr(self.net, "num_prefix_tokens", 0) > 0
        # The pooled output, then what each depth adds.
        width = int(self.net.num_features) + sum(_widths(self.net, self.depths)) * (1 if self._class_tokens else 2)
        self.width = 2 * width if reads == "both" else width
        self.input_size: tuple[int, int] = tuple(cfg["input_size"][1:])
        self.mean: tuple[float, float, float] = tuple(float(v) for v in cfg["mean"])
        self.std: tuple[float, float, float] = tuple(float(v) for v in cfg["std"])
        self.fixed_input_size = bool(cfg.get("fixed_input_size", False))
        # A `Standardizer` with --standardize; it has no state otherwise.
        self.standardizer: nn.Module = nn.Identity()

    def pool(self, pixels: Tensor) -> Tensor:
        """What the network itself gives, (N, d), of normalised pixels (N, 3, H, W)."""
        return _joined(self.parts(pixels))

    def embed(self, pixels: Tensor) -> Tensor:
        """Embedding e = E(x), (N, d), of normalised pixels (N, 3, H, W); standardised where the run says so."""
        return self.standardizer(self.pool(pixels))

    def parts(self, pixels: Tensor) -> list[Tensor]:
        """What `pool` puts side by side: the pooled output, then what each depth adds."""
        return self.pooled_parts(*self.features(pixels))

    def pooled_parts(self, features: Tensor, maps: Sequence[DepthOutput]) -> list[Tensor]:
        """What `parts` gives, of what `features` gives."""
        return self._side_by_side([self.net.forward_head(features, pre_logits=True), *(part.pooled for part in maps)])

    def part_names(self) -> list[str]:
        """A name for each of `parts`, which tells it from every other part of the same weights."""
        strides = "" if self.early_downsampling else " without early down-sampling"
        names = [f"{name}{strides}" for name in ("output", *(f"depth {depth}" for depth in self.depths))]
        of_residual = [f"residual {name}" for name in names]
        return {"rgb": names, "residual": of_residual, "both": names + of_residual}[self.reads]

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
        """Embedding, and one embedding for each cell of the last map, of normalised pixels (N, 3, H, W)."""
        features, maps = self.features(pixels)
        pooled = _joined(self.pooled_parts(features, maps))
        cells = self._token_cells(features) if features.ndim == 3 else self._map_cells(features)
        parts = self._side_by_side([cells, *(part.on_grid(cells.shape[1:3]) for part in maps)])
        return EncoderOutput(self.standardizer(pooled), self.standardizer(_joined(parts)))

    def features(self, pixels: Tensor) -> tuple[Tensor, list[DepthOutput]]:
        """The last map (N, d, h, w) or tokens (N, tokens, d) of normalised pixels, and what the depths add.

        2 N of each where the encoder reads both, those of the pixels before those of their residuals.
        """
        seen = self._seen(pixels)
        if not self.depths:
            return self.net.forward_features(seen), []
        if not self._class_tokens:
            features, maps = self.net.forward_intermediates(seen, indices=self.depths, output_fmt="NCHW")
            return features, [DepthOutput(spatial_statistics(values), values, spread=True) for values in maps]
        features, maps = self.net.forward_intermediates(
            seen, indices=self.depths, output_fmt="NCHW", return_prefix_tokens=True
        )
        return features, [DepthOutput(tokens[:, 0], values, spread=False) for values, tokens in maps]

    def _seen(self, pixels: Tensor) -> Tensor:
        """What the network gets; both in one batch, so that an exported graph holds the network once."""
        if self.reads == "rgb":
            return pixels
        filtered = residual(pixels)
        return filtered if self.reads == "residual" else torch.cat((pixels, filtered))

    def _side_by_side(self, parts: list[Tensor]) -> list[Tensor]:
        """Parts of N pictures each; where there are 2 N rows, those of the pixels, then those of their residuals."""
        if self.reads != "both":
            return parts
        # Not chunk(2), whose sizes an exported graph would have to compute.
        halves = [part.unflatten(0, (2, -1)) for part in parts]
        return [half[which] for which in (0, 1) for half in halves]

    def _map_cells(self, features: Tensor) -> Tensor:
        _, d, h, w = features.shape
        single = features.permute(0, 2, 3, 1).reshape(-1, d, 1, 1)
        return self.net.forward_head(single, pre_logits=True).reshape(-1, h, w, self.net.num_features)

    def _token_cells(self, features: Tensor) -> Tensor:
        prefix = self.net.num_prefix_tokens
        h, w = self.net.patch_embed.grid_size
        # The cell stands in for the class token and for the only patch, so either way of pooling returns it.
        single = features[:, prefix:].reshape(-1, 1, features.shape[2]).expand(-1, prefix + 1, -1)
        return self.net.forward_head(single, pre_logits=True).reshape(-1, h, w, self.net.num_features)


def require_model(name: str) -> None:
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise ConfigError("--encoder", got=repr(name), wanted="a timm model name", remedy=f"near matches: {close}")


def _set_stem_strides_to_1(net: nn.Module, name: str) -> None:
    """No down-sampling in front of the first stage, as Gragnaniello et al. 2021 (arXiv:2104.02617) and their published
    network have it: convolution and max-pool of the stem have stride 1. Weights keep their shapes."""
    stem = [getattr(net, part) for part in STEM if hasattr(net, part)]
    strided = [m for part in stem for m in part.modules() if getattr(m, "stride", 1) not in (1, (1, 1))]
    if not strided:
        raise ConfigError(
            "--no-early-downsampling",
            got=f"--encoder {name}",
            wanted="an encoder with a strided first convolution, such as a ResNet or an EfficientNet",
            remedy="leave it out, or choose another encoder",
        )
    for layer in strided:
        layer.stride = 1 if isinstance(layer, nn.MaxPool2d) else (1, 1)


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts side by side along their last axis; one alone leaves no trace in an exported graph."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def residual(pixels: Tensor) -> Tensor:
    """What its surroundings do not say of a pixel, of (N, c, H, W) and amplified by RESIDUAL_GAIN.

    A noise residual, pixel minus prediction, as of Fridrich and Kodovsky 2012 (doi:10.1109/TIFS.2012.2190402): what is
    in a picture is smooth and goes; the noise of a sensor, or the traces of a generator, stay. The prediction is the
    mean of 3 x 3 pixels, at a border of those that are there.

    Args:
        pixels: normalised; a constant that is added to a colour goes as well.
    """
    mean = F.avg_pool2d(pixels, RESIDUAL_SIDE, stride=1, padding=RESIDUAL_SIDE // 2, count_include_pad=False)
    return RESIDUAL_GAIN * (pixels - mean)


def spatial_statistics(values: Tensor) -> Tensor:
    """Mean and standard deviation over the cells of a map (N, c, h, w), side by side, (N, 2 c)."""
    rows = values.flatten(2)
    mean = rows.mean(2)
    variance = (rows - mean[..., None]).square().mean(2)
    # A map of one cell has no spread, and the square root no gradient at 0.
    return torch.cat((mean, (variance + 1e-6).sqrt()), dim=1)


def _widths(net: nn.Module, depths: Sequence[int]) -> list[int]:
    """Channels of the maps at these depths."""
    info = list(getattr(net, "feature_info", ()))
    known = len(info) if hasattr(net, "forward_intermediates") else 0
    if any(depth not in range(known) for depth in depths) or sorted(set(depths)) != list(depths):
        raise ConfigError(
            "--encoder-depths",
            got=" ".join(map(str, depths)),
            wanted=f"rising numbers from 0 to {known - 1}" if known else "none: this encoder does not give its maps",
            remedy="change this option",
        )
    return [int(info[depth]["num_chs"]) for depth in depths]
