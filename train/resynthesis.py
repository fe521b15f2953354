"""Small networks that take a photograph apart and put it together again, one per family of up-samplers.

What they leave in a picture is the trace of their up-sampling and nothing else (the idea of AutoGAN, Zhang et al.
2019, arXiv:1907.06515): the content stays, so a detector has only the synthesis to go by.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

Upsampler = Literal["transposed_conv", "nearest_conv", "pixel_shuffle"]
UPSAMPLERS: tuple[Upsampler, ...] = get_args(Upsampler)
MULTIPLE = 4  # of a picture's height and width: there are two strided convolutions
MARGIN = 16  # mirrored around a picture before the network, cut off after: its border is no artefact of synthesis

Pictures = NDArray[np.uint8]
Report = Callable[[int, float], None]

# Weights are drawn from torch's one global generator.
_INITIALIZING = threading.Lock()


@dataclass(frozen=True)
class ResynthesisConfig:
    """Size and training of one network; the defaults take about half a minute on one core."""

    steps: int = 1500
    """Batches that each network learns from."""
    batch: int = 4
    """Patches in a batch."""
    patch_px: int = 64
    """Side of a patch."""
    width: int = 24
    """Channels of the networks' outer layers."""
    code_channels: int = 16
    """Channels between encoder and decoder: fewer rebuild less."""
    learning_rate: float = 6e-3
    """Largest of a one-cycle schedule."""
    seed: int = 0
    """Of weights and patches."""


class ResynthesisNet(nn.Module):
    """Encoder with two strided convolutions, decoder with two up-samplers of one kind.

    A quarter of the width and height and `code_channels` channels pass between the two.
    """

    def __init__(self, upsampler: str, config: ResynthesisConfig) -> None:
        super().__init__()
        width, deep, code = config.width, config.width * 4 // 3, config.code_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, deep, 4, stride=2, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(deep, code, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code, deep, 3, padding=1),
            nn.LeakyReLU(0.1),
            _upsampler(upsampler, deep, width),
            nn.LeakyReLU(0.1),
            _upsampler(upsampler, width, 3),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float in -1..1, H and W multiples of 4, to the same shape."""
        rebuilt: torch.Tensor = self.decoder(self.encoder(pixels))
        return rebuilt


def train_resynthesis(
    upsampler: str, photographs: Sequence[Pictures], config: ResynthesisConfig, *, report: Report | None = None
) -> ResynthesisNet:
    """A network that rebuilds patches of the photographs.

    Args:
        upsampler: one of `UPSAMPLERS`.
        photographs: (H, W, 3) uint8 each, at least `config.patch_px` high and wide.
        config: size, steps and seed.
        report: called after each step with its number (from 1) and its loss.

    Note:
        Steps are fixed and seeded. Several networks may be trained in threads at once, best inside
        `one_thread_each`. Torch's global generator is left as it was.
    """
    rng = np.random.default_rng([config.seed, UPSAMPLERS.index(upsampler)])
    with _INITIALIZING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = ResynthesisNet(upsampler, config).to(memory_format=torch.channels_last)
    # A short second-moment memory: with 0.999 the first, steep steps slow down all that follow (3 dB less here).
    optimizer = torch.optim.Adam(net.parameters(), config.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    for step in range(1, config.steps + 1):
        pixels = _to_tensor(_patches(rng, photographs, config))
        loss = F.mse_loss(net(pixels), pixels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step, loss.item())
    return net.eval()


def train_networks(
    upsamplers: Sequence[str], photographs: Sequence[Pictures], config: ResynthesisConfig, bars: Progress
) -> dict[str, ResynthesisNet]:
    """A network for each of the up-samplers, in a thread each, with a bar for each; as `train_resynthesis`."""
    interrupted = threading.Event()
    tasks = {name: bars.add_task(f"training {name}", total=config.steps) for name in upsamplers}

    def train(name: str) -> ResynthesisNet:
        def report(step: int, _loss: float) -> None:
            if interrupted.is_set():
                raise InterruptedError
            bars.update(tasks[name], completed=step)

        return train_resynthesis(name, photographs, config, report=report)

    with ThreadPoolExecutor(max_workers=min(len(upsamplers), os.cpu_count() or 1)) as pool:
        try:
            return dict(zip(upsamplers, pool.map(train, upsamplers), strict=True))
        except BaseException:
            interrupted.set()  # the pool waits for its threads, which would train on to their end
            raise


def progress_bars(*, shown: bool) -> Progress:
    """Bars for `train_networks` and for what follows it."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        disable=not shown,
    )


@torch.inference_mode()
def resynthesize(net: ResynthesisNet, pictures: Pictures, *, batch: int = 16) -> Pictures:
    """The pictures as the network rebuilds them: (N, H, W, 3) uint8 to the same shape, H and W multiples of 4."""
    rebuilt = []
    for start in range(0, len(pictures), batch):
        pixels = F.pad(_to_tensor(pictures[start : start + batch]), (MARGIN,) * 4, mode="reflect")
        output = net(pixels)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        levels = ((output + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        rebuilt.append(levels.permute(0, 2, 3, 1).contiguous().numpy())
    return np.concatenate(rebuilt)


def psnr_db(pictures: Pictures, rebuilt: Pictures) -> float:
    """Mean peak signal-to-noise ratio in dB of (N, H, W, 3) uint8 pictures."""
    error = np.mean((pictures.astype(np.float32) - rebuilt) ** 2, axis=(1, 2, 3))
    return float(np.mean(10.0 * np.log10(255.0**2 / np.maximum(error, 1e-6))))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch uses one thread per operator inside the block.

    These operators are too small to share: on a busy machine their threads wait for each other most of the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _upsampler(kind: str, inputs: int, outputs: int) -> nn.Module:
    """Doubles height and width."""
    if kind == "transposed_conv":
        return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
    if kind == "nearest_conv":
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inputs, outputs, 3, padding=1))
    if kind == "pixel_shuffle":
        return nn.Sequential(nn.Conv2d(inputs, 4 * outputs, 3, padding=1), nn.PixelShuffle(2))
    raise ValueError(f"upsampler must be one of {', '.join(UPSAMPLERS)}, got {kind!r}")


def _patches(rng: np.random.Generator, photographs: Sequence[Pictures], config: ResynthesisConfig) -> Pictures:
    """Random patches with shuffled channels and random contrast.

    Without the colours a network would learn three photographs' palettes and tint all others: a trace of the
    training set, not of the up-sampler.
    """
    side = config.patch_px
    patches = np.empty((config.batch, side, side, 3), np.uint8)
    for patch in patches:
        photograph = photographs[int(rng.integers(len(photographs)))]
        top, left = (int(rng.integers(size - side + 1)) for size in photograph.shape[:2])
        crop = photograph[top : top + side, left : left + side, rng.permutation(3)]
        gain = rng.uniform(0.4, 1.0, size=3)
        patch[...] = crop * gain + rng.uniform(0.0, 1.0, size=3) * (1.0 - gain) * 255.0
    return patches


def _to_tensor(pictures: Pictures) -> torch.Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1.0)
