"""Demo data: crops of six real photographs, and the same crops rebuilt by small networks.

It shows the whole chain without a download; it does not show the accuracy to expect. Both classes take the same way
(crop, JPEG round trip, uncompressed PNG), so only the synthesis differs. `python -m train.demo_data [--root DIR]`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import Progress

from train.data import SOURCES_FILE, scan_pictures
from train.demo_cache import LICENCES_FILE, read_figures, replace_folder, why_stale, write_manifest
from train.demo_photographs import PHOTOGRAPHS, licences_markdown, load_photograph
from train.errors import ConfigError
from train.resynthesis import (
    UPSAMPLERS,
    Pictures,
    ResynthesisConfig,
    ResynthesisNet,
    one_thread_each,
    progress_bars,
    psnr_db,
    resynthesize,
    train_networks,
)

DEMO_ROOT = Path("data/demo")
RECIPE_VERSION = 1  # raise it when the code changes what is built
RECIPE_PACKAGES = ("numpy", "pillow", "scikit-image", "scikit-learn", "torch")
# A generator is the chain of networks that a crop goes through; the two of `multi_step` are unseen in training.
GENERATORS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in UPSAMPLERS},
    "multi_step": ("nearest_conv", "pixel_shuffle"),
}
SEEN_GENERATOR = "transposed_conv"
LABEL_FOLDERS = ("0_real", "1_fake")
LARGEST_PX = 272  # the lowest photograph has 300 rows, of which a reduction leaves 285


@dataclass(frozen=True)
class DemoDataConfig:
    """What is built; the defaults make 1,360 pictures (270 MB) in about two minutes on two cores.

    Attributes:
        train_photographs: cut for the training split; the networks learn from these alone.
        val_photographs: cut for the validation split.
        test_photographs: cut for the test split.
        train_crops: real pictures of the training split, and as many fakes.
        val_crops: real pictures of the validation split, and as many fakes; a rate of 1 % needs 100.
        test_crops: real pictures of each generator's test set, the same crops for each, and as many fakes.
        size_px: height and width of a picture, a multiple of 16.
        scale: smallest and largest factor of the antialiased reduction; below 1, so that a photograph's own JPEG
            grid reaches neither class.
        jpeg_quality: of the round trip that both classes take, with 4:2:0 chroma.
        seed: of crops and networks.
        networks: size and training of the networks.
    """

    train_photographs: tuple[str, ...] = ("astronaut", "china")
    val_photographs: tuple[str, ...] = ("coffee", "rocket")
    test_photographs: tuple[str, ...] = ("chelsea", "flower")
    train_crops: int = 240
    val_crops: int = 120
    test_crops: int = 80
    size_px: int = 256
    scale: tuple[float, float] = (0.6, 0.95)
    jpeg_quality: int = 92
    seed: int = 0
    networks: ResynthesisConfig = field(default_factory=ResynthesisConfig)

    def __post_init__(self) -> None:
        names = self.train_photographs + self.val_photographs + self.test_photographs
        known = set(names) <= set(PHOTOGRAPHS) and len(set(names)) == len(names)
        if not known or not (self.train_photographs and self.val_photographs and self.test_photographs):
            raise ConfigError(
                "photographs of the demo data",
                got=", ".join(names),
                wanted=f"each split some of {', '.join(PHOTOGRAPHS)}, none of them twice",
                remedy="give each photograph to one split",
            )
        if self.size_px % 16 or not 0 < self.size_px <= LARGEST_PX:
            raise ConfigError(
                "size of the demo pictures",
                got=f"{self.size_px} px",
                wanted=f"a multiple of 16 up to {LARGEST_PX}",
                remedy="choose another size",
            )


@dataclass(frozen=True)
class _Split:
    name: str
    photographs: tuple[str, ...]
    crops: int
    generators: tuple[str, ...]


def ensure_demo_data(
    root: Path | str = DEMO_ROOT, *, config: DemoDataConfig | None = None, progress: bool = True
) -> Path:
    """The folder with the demo data, built unless a complete and undamaged build of the same recipe is there.

    Args:
        root: folder of the data; replaced as a whole when it is stale.
        config: what to build, the full demo by default.
        progress: show progress bars.

    Raises:
        DataError: the folder holds something that is no demo data.

    Note:
        Every file is hashed on every call (under a second for the full demo).
    """
    root, config = Path(root), config or DemoDataConfig()
    recipe = demo_recipe(config)
    reason = why_stale(root, recipe)
    if reason is None:
        return root
    print(f"Building the demo data in {root}: {reason}.", flush=True)
    with replace_folder(root) as building, one_thread_each(), progress_bars(shown=progress) as bars:
        figures = _build(building, config, bars)
        write_manifest(building, recipe, figures)
    return root


def demo_recipe(config: DemoDataConfig) -> dict[str, Any]:
    """Everything that decides what is built: the configuration, the code's version and those of the packages."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    return {
        "recipe_version": RECIPE_VERSION,
        "config": settings,
        "generators": {name: list(chain) for name, chain in GENERATORS.items()},
        "packages": {name: version(name) for name in RECIPE_PACKAGES},
    }


def jpeg_round_trip(picture: Pictures, quality: int) -> Pictures:
    """The picture after JPEG compression with 4:2:0 chroma; its block grid starts at the top left corner."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"))


def main(root: Path = DEMO_ROOT, *, progress: bool = True) -> None:
    """Builds the demo data where they are absent, stale or damaged, and says what is there.

    Args:
        root: folder of the data.
        progress: show progress bars.
    """
    root = ensure_demo_data(root, progress=progress)
    print(scan_pictures(root).describe())
    quality = ", ".join(f"{place} {value:.1f}" for place, value in read_figures(root)["psnr_db"].items())
    print(f"Rebuilt pictures against their originals, PSNR in dB: {quality}")
    print(f"Photographs and licences: {root / LICENCES_FILE}")


def _build(root: Path, config: DemoDataConfig, bars: Progress) -> dict[str, Any]:
    """Writes all splits and returns the reconstruction quality per split and generator."""
    networks = _train_networks(config, bars)
    splits = _splits(config)
    total = sum(2 * s.crops * len(s.generators) for s in splits)
    task = bars.add_task("writing pictures", total=total)
    rows: list[tuple[str, str, str, str]] = []
    quality: dict[str, float] = {}
    for number, split in enumerate(splits):
        names, crops = _crops(split, config, np.random.default_rng([config.seed, 1 + number]))
        for generator in split.generators:
            fakes = crops
            for link in GENERATORS[generator]:
                fakes = resynthesize(networks[link], fakes)
            quality[f"{split.name}/{generator}"] = round(psnr_db(crops, fakes), 2)
            for folder, pictures in zip(LABEL_FOLDERS, (crops, fakes), strict=True):
                place = Path(split.name, generator, folder)
                rows += _write(root, place, names, pictures, config.jpeg_quality)
                bars.advance(task, len(pictures))
    _write_tables(root, rows, config)
    return {"psnr_db": quality}


def _splits(config: DemoDataConfig) -> tuple[_Split, ...]:
    seen = (SEEN_GENERATOR,)
    return (
        _Split("train", config.train_photographs, config.train_crops, seen),
        _Split("val", config.val_photographs, config.val_crops, seen),
        _Split("test", config.test_photographs, config.test_crops, tuple(GENERATORS)),
    )


def _train_networks(config: DemoDataConfig, bars: Progress) -> dict[str, ResynthesisNet]:
    scales = np.linspace(*config.scale, num=4)
    photographs = [_reduced(load_photograph(name), scale) for name in config.train_photographs for scale in scales]
    return train_networks(UPSAMPLERS, photographs, config.networks, bars)


def _reduced(photograph: Pictures, scale: float) -> Pictures:
    height, width = photograph.shape[:2]
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(photograph).resize(size, Image.Resampling.BICUBIC))


def _crops(split: _Split, config: DemoDataConfig, rng: np.random.Generator) -> tuple[list[str], Pictures]:
    """Names (photograph and number) and (N, size, size, 3) crops, the photographs in turn."""
    chosen = [split.photographs[i % len(split.photographs)] for i in range(split.crops)]
    loaded = {name: load_photograph(name) for name in split.photographs}
    crops = np.stack([_crop(loaded[name], config, rng) for name in chosen])
    return [f"{name}_{i:03d}" for i, name in enumerate(chosen)], crops


def _crop(photograph: Pictures, config: DemoDataConfig, rng: np.random.Generator) -> Pictures:
    """A crop at a random place of the photograph reduced by a random factor."""
    height, width = photograph.shape[:2]
    smallest = min(max(config.scale[0], config.size_px / min(height, width)), config.scale[1])
    side = config.size_px / rng.uniform(smallest, config.scale[1])
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    resized = Image.fromarray(photograph).resize(
        (config.size_px, config.size_px),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
    )
    return np.asarray(resized)


def _write(
    root: Path, place: Path, names: Sequence[str], pictures: Pictures, quality: int
) -> Iterator[tuple[str, str, str, str]]:
    """Writes the pictures and yields their rows of `sources.csv`."""
    (root / place).mkdir(parents=True)
    generator = place.parent.name
    for name, picture in zip(names, pictures, strict=True):
        path = place / f"{name}.png"
        # Level 0 stores: the length of a compressed file would tell the smoother fakes from the real pictures.
        Image.fromarray(jpeg_round_trip(picture, quality)).save(root / path, compress_level=0)
        yield path.as_posix(), generator, generator, name.rsplit("_", 1)[0]


def _write_tables(root: Path, rows: list[tuple[str, str, str, str]], config: DemoDataConfig) -> None:
    with (root / SOURCES_FILE).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("path", "generator", "family", "original_id"))
        writer.writerows(sorted(rows))
    used = {*config.train_photographs, *config.val_photographs, *config.test_photographs}
    names = tuple(name for name in PHOTOGRAPHS if name in used)
    (root / LICENCES_FILE).write_text(licences_markdown(names), encoding="utf-8")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
