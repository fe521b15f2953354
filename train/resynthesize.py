"""Fake pictures from real ones: `python -m train.resynthesize --data DIR --out OUT`.

Small networks learn to rebuild the training photographs (`train.resynthesis`), then rebuild them: fakes whose content
is that of the real pictures beside them, for a training set that has few fakes or few generators. `--data
OUT/pictures.csv` of training, evaluation and audit then takes the collection with them.

A rebuilt JPEG is stored with the size, the quantisation tables and the chroma sub-sampling of its photograph, so that
neither tells the classes apart; any other picture becomes a PNG.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, JpegImagePlugin

from runtime.errors import NTFError
from train.checkpoint import save_json
from train.data import scan_pictures
from train.errors import ConfigError, DataError
from train.folders import new_folder
from train.integrity import CORRUPT_FILE, checked, corrupt_counts
from train.pictures import CorruptPolicy, PictureRecord, PictureSet, load_pixels
from train.resynthesis import (
    MARGIN,
    MULTIPLE,
    Pictures,
    ResynthesisConfig,
    ResynthesisNet,
    Upsampler,
    one_thread_each,
    progress_bars,
    resynthesize,
    train_networks,
)

LIST_FILE = "pictures.csv"
FAMILY = "resynthesis"
COLUMNS = ("path", "label", "generator", "family", "original_id", "split")
SMALLEST_PATCH_PX = MARGIN + MULTIPLE  # a border is mirrored, which takes more pixels than it has


@dataclass(frozen=True)
class Options:
    """Rebuild the real training pictures of a collection with small networks, as more fakes to train on."""

    data: Path
    """Folder, CSV file or JSON list with labelled pictures and a train split."""
    out: Path
    """Folder to make; it must not hold anything yet. Its pictures.csv lists the collection and the new fakes."""
    upsamplers: tuple[Upsampler, ...] = ("transposed_conv",)
    """How the networks enlarge; one network for each, among which the pictures are dealt."""
    share: float = 1.0
    """Share of the real training pictures to rebuild, drawn by the seed."""
    learn_from: int = 2000
    """Most photographs that the networks learn from, drawn by the seed; they are kept in memory."""
    networks: Annotated[ResynthesisConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: ResynthesisConfig(steps=2000, batch=8)
    )
    corrupt: CorruptPolicy = "refuse"
    """Refuse a collection with pictures that cannot be decoded, or leave them out and list them in corrupt.json."""
    workers: int = 0
    """Threads that check the pictures."""
    progress: bool = True
    """Show progress bars."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m train.resynthesize", args=arguments)
    try:
        rebuilt = write_resynthesized(options)
    except NTFError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {rebuilt:,} rebuilt pictures; train with --data {options.out / LIST_FILE}")
    return 0


def write_resynthesized(options: Options) -> int:
    """The rebuilt pictures and the list of all, in a new folder; gives how many were rebuilt.

    Raises:
        ConfigError: an option that makes no sense, or a folder that is taken.
        DataError: the collection cannot be used: shards, no real training pictures, or some that are too small; or
            --out cannot be written.
    """
    _check_options(options)
    pictures = scan_pictures(options.data, require_both=False)
    print(pictures.describe(), flush=True)
    pictures = checked(pictures, corrupt=options.corrupt, workers=options.workers, progress=options.progress)
    chosen = _photographs(pictures, options)
    rng = np.random.default_rng(options.networks.seed)
    learnt = [chosen[i] for i in sorted(rng.permutation(len(chosen))[: options.learn_from])]
    count = max(1, round(options.share * len(chosen)))
    rebuilt = [chosen[i] for i in sorted(rng.permutation(len(chosen))[:count])]
    try:
        _write_all(pictures, learnt, rebuilt, options)
    except OSError as error:
        raise _unwritable(options.out, error) from error
    return len(rebuilt)


def _write_all(
    pictures: PictureSet, learnt: Sequence[PictureRecord], rebuilt: Sequence[PictureRecord], options: Options
) -> None:
    """Trains the networks on `learnt`, and fills the folder with `rebuilt` and the list of all pictures."""
    with new_folder(options.out) as building, one_thread_each(), progress_bars(shown=options.progress) as bars:
        photographs = [_pixels(record, options.networks.patch_px) for record in learnt]
        networks = train_networks(options.upsamplers, photographs, options.networks, bars)
        task = bars.add_task("rebuilding", total=len(rebuilt))
        rows = [_row(record, options.out) for record in pictures.records]
        for number, record in enumerate(rebuilt):
            upsampler = options.upsamplers[number % len(options.upsamplers)]
            name = _write_rebuilt(record, networks[upsampler], building / upsampler, number, options.networks.patch_px)
            split = record.split or ""
            rows.append((f"{upsampler}/{name}", "1", f"resynthesis_{upsampler}", FAMILY, record.original_id, split))
            bars.advance(task)
        _write_list(building / LIST_FILE, rows)
        if pictures.corrupt:
            listed = [asdict(picture) for picture in pictures.corrupt]
            save_json(building / CORRUPT_FILE, {"counts": corrupt_counts(pictures.corrupt), "pictures": listed})


def _unwritable(out: Path, error: OSError) -> DataError:
    return DataError(
        f"--out {out}",
        got=error.strerror or str(error),
        wanted="a folder that can be written",
        remedy="free some space, or choose another one",
    )


def _check_options(options: Options) -> None:
    networks = options.networks
    positive = {"--steps": networks.steps, "--batch": networks.batch, "--width": networks.width}
    positive |= {"--code-channels": networks.code_channels}
    patch = networks.patch_px
    patch_fits = patch >= SMALLEST_PATCH_PX and patch % MULTIPLE == 0
    for name, got, good, wanted in (
        ("--share", options.share, 0 < options.share <= 1, "more than 0 and at most 1"),
        ("--learn-from", options.learn_from, options.learn_from >= 1, "1 or more"),
        *((name, value, value >= 1, "1 or more") for name, value in positive.items()),
        ("--learning-rate", networks.learning_rate, networks.learning_rate > 0, "more than 0"),
        ("--patch-px", patch, patch_fits, f"a multiple of {MULTIPLE}, {SMALLEST_PATCH_PX} or more"),
        ("--upsamplers", " ".join(options.upsamplers), _all_different(options.upsamplers), "one or more, each once"),
    ):
        if not good:
            raise ConfigError(name, got=str(got), wanted=wanted, remedy="change this option")


def _all_different(names: Sequence[str]) -> bool:
    return 0 < len(names) == len(set(names))


def _photographs(pictures: PictureSet, options: Options) -> list[PictureRecord]:
    """The real pictures to learn from: the training split's, never those that will be tested on."""
    shards = sum(record.member is not None for record in pictures.records)
    if shards:
        raise DataError(
            f"--data {options.data}",
            got=f"{shards:,} pictures in shards, which a list cannot name",
            wanted="files of their own",
            remedy="pass the collection that the shards were written from",
        )
    real = [record for record in pictures.split("train").records if record.label == 0]
    if not real:
        raise DataError(
            f"--data {options.data}",
            got="no real picture in its train split",
            wanted="photographs to rebuild",
            remedy="add some, or pass another collection",
        )
    return real


def _pixels(record: PictureRecord, smallest: int) -> Pictures:
    pixels = load_pixels(record)
    if min(pixels.shape[:2]) < smallest:
        raise DataError(
            record.name,
            got=f"{pixels.shape[1]} x {pixels.shape[0]} px",
            wanted=f"at least {smallest} px on each side, the patches of the networks",
            remedy="leave it out, or choose a smaller --patch-px",
        )
    return pixels


def _write_rebuilt(record: PictureRecord, network: ResynthesisNet, folder: Path, number: int, smallest: int) -> str:
    """Writes the picture as the network rebuilds it; gives the file's name."""
    pixels = _pixels(record, smallest)
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)), mode="reflect")
    picture = Image.fromarray(resynthesize(network, padded[None])[0, :height, :width])
    folder.mkdir(exist_ok=True)
    with Image.open(io.BytesIO(record.read_bytes())) as source:
        if source.mode == "L":
            picture = picture.convert("L")
        if isinstance(source, JpegImagePlugin.JpegImageFile):
            name, sampling = f"{number:06d}.jpg", JpegImagePlugin.get_sampling(source)
            picture.save(folder / name, "JPEG", qtables=source.quantization, subsampling=sampling)
        else:
            name = f"{number:06d}.png"
            picture.save(folder / name)
    return name


def _row(record: PictureRecord, out: Path) -> tuple[str, ...]:
    """Row of a picture of the collection, whose file stays where it is."""
    path = os.path.relpath(record.path, out.absolute())
    return (path, str(record.label), record.generator, record.family, record.original_id, record.split or "")


def _write_list(path: Path, rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
