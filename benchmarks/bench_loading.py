"""Images a second of the loader and of the model, apart: `python -m benchmarks.bench_loading` writes both.

A run is as fast as the slower of the two. The loader reads, decodes and crops JPEG files, from a folder and from tar
shards, in one and two processes; the model trains a step of either stage, or scores, on one and two threads, with
batches that are in memory already. Batches from shards are compared with those of the folder before either is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.pictures import jpeg_bytes, photograph
from benchmarks.tables import README, with_tables
from train.config import RunConfig, preset_config
from train.data import load_split, scan_pictures
from train.encoder import Encoder
from train.loading import ViewBatch, prepared_loader, view_loader
from train.model import TraceModel, detector_from_traces
from train.pictures import PictureSet
from train.provenance import environment
from train.scoring import preprocess_spec
from train.shards import write_shards
from train.stage import Stage
from train.stages import DetectorStage, TraceStage

RESULTS = Path("benchmarks/results/loading.json")
BEGIN, END = "<!-- loading: begin -->", "<!-- loading: end -->"
SOURCES = ("folder", "shards")
COUNTS = (1, 2)  # processes of the loader, threads of the model
HEIGHT_PX, WIDTH_PX = 375, 500  # the commonest size in ImageNet, where the method's real pictures are from
TRAINING, SCORING = "training views", "scoring crops"


def write_folder(root: Path, pictures: int) -> Path:
    """`pictures` JPEG files, half of them called fake."""
    for number in range(pictures):
        path = root / "train" / "made" / ("1_fake" if number % 2 else "0_real") / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(photograph(HEIGHT_PX, WIDTH_PX, seed=number)))
    return root


def loading_config(batch_size: int) -> RunConfig:
    """The demo's encoder with random weights, which are as fast, trained as a whole as in the paper."""
    base = preset_config("demo")
    return replace(
        base,
        data="made",
        model=replace(base.model, encoder_weights="none"),
        stage1=replace(base.stage1, batch_size=batch_size, train_encoder=True),
        stage2=replace(base.stage2, batch_size=batch_size),
        device="cpu",
    )


def stages_of(config: RunConfig, pictures: PictureSet) -> dict[str, Stage]:
    """Both stages, ready to train."""
    traces = TraceModel(Encoder(config.model.encoder), config.model.embedding_dim)
    detector = detector_from_traces(traces, config.model.embedding_dim, config.model.classifier_input)
    return {
        "stage 1 step": TraceStage(traces, pictures.records, config),
        "stage 2 step": DetectorStage(detector, pictures.records, config, pictures.records, "reference"),
    }


def loader_of(kind: str, stage: Stage, config: RunConfig, pictures: PictureSet, workers: int) -> Iterable[Any]:
    """Batches of one epoch."""
    size = config.stage1.batch_size
    if kind == TRAINING:
        return view_loader(pictures.records, stage.plan, batch_size=size, epoch=0, workers=workers)
    spec = preprocess_spec(stage.model.encoder)  # type: ignore[arg-type]
    return prepared_loader(pictures.records, spec, batch_size=size, workers=workers)


def require_same_batches(first: Iterable[Any], second: Iterable[Any]) -> None:
    """Refuse to time two sources that do not give the same batches.

    Raises:
        AssertionError: a batch differs.
    """
    for mine, theirs in zip(first, second, strict=True):
        pairs = zip(mine, theirs, strict=True) if isinstance(mine, ViewBatch) else [(mine, theirs)]
        assert all(torch.equal(a, b) for a, b in pairs), "shards and folder give different batches"


def loader_rate(batches: Iterable[Any]) -> float:
    """Images a second, from the first batch on: the start of the processes is paid once an epoch."""
    iterator = iter(batches)
    next(iterator)
    began, images = time.perf_counter(), 0
    for batch in iterator:
        images += len(batch.labels) if isinstance(batch, ViewBatch) else len(batch)
    return images / (time.perf_counter() - began)


def training_step(stage: Stage, batch: ViewBatch) -> Callable[[], None]:
    """Forward, backward and update, as `train.loop.StageLoop` makes them."""
    optimizer = torch.optim.SGD(stage.trainable(), lr=1e-4, momentum=0.9)
    stage.set_train_mode()

    def step() -> None:
        loss = stage.losses(batch, len(batch.labels))["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def scoring(stage: Stage, batch: ViewBatch) -> Callable[[], None]:
    """One forward pass of the detector."""

    @torch.inference_mode()
    def score() -> None:
        stage.model.eval()
        stage.model(batch.first)

    return score


def model_rate(step: Callable[[], None], images: int) -> float:
    """Images a second of one call."""
    began = time.perf_counter()
    step()
    return images / (time.perf_counter() - began)


def row(what: str, source: str, count: int, rates: Sequence[float]) -> dict[str, Any]:
    """Median and spread over rounds."""
    low, _, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else (rates[0],) * 3
    return {
        "what": what,
        "source": source,
        "count": count,
        "images_per_s": round(statistics.median(rates), 2),
        "iqr": round(high - low, 2),
        "rounds": len(rates),
    }


def measured(folder: Path, *, pictures: int, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """All rows.

    Args:
        folder: to write pictures and shards in.
        pictures: how many; more than one batch.
        batch_size: pictures in a batch.
        rounds: repetitions; in each, everything takes its turn.
    """
    root = write_folder(folder / "folder", pictures)
    write_shards(scan_pictures(root), folder / "shards")
    sets = {name: load_split(folder / name, "train") for name in SOURCES}
    config = loading_config(batch_size)
    stages = stages_of(config, sets["folder"])
    some = next(iter(stages.values()))
    for kind in (TRAINING, SCORING):
        require_same_batches(*(loader_of(kind, some, config, sets[name], workers=2) for name in SOURCES))
    batch = next(iter(loader_of(TRAINING, stages["stage 2 step"], config, sets["folder"], 0)))
    first = next(iter(loader_of(TRAINING, stages["stage 1 step"], config, sets["folder"], 0)))
    steps = {
        "stage 1 step": training_step(stages["stage 1 step"], first),
        "stage 2 step": training_step(stages["stage 2 step"], batch),
    }
    rates: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(rounds):
        for kind in (TRAINING, SCORING):
            for source in SOURCES:
                for count in COUNTS:
                    found = loader_rate(loader_of(kind, some, config, sets[source], count))
                    rates.setdefault((kind, source, count), []).append(found)
        for count in COUNTS:
            torch.set_num_threads(count)
            for name, step in steps.items():
                stages[name].set_train_mode()
                step()  # the first call allocates
                rates.setdefault((name, "model", count), []).append(model_rate(step, len(batch.labels)))
            score = scoring(stages["stage 2 step"], batch)
            score()
            rates.setdefault(("scoring", "model", count), []).append(model_rate(score, len(batch.labels)))
    return [row(*key, found) for key, found in rates.items()]


def markdown(results: dict[str, Any]) -> str:
    """The table of a results file, and how far the loader is ahead of the model."""
    machine, settings = results["environment"]["machine"], results["settings"]
    found = {(r["what"], r["source"], r["count"]): r for r in results["rows"]}
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, torch "
        f"{results['environment']['versions']['torch']}; {settings['encoder']}, JPEG files of {WIDTH_PX}x{HEIGHT_PX}, "
        f"batches of {settings['batch_size']}. Images a second, medians ± half the interquartile range over "
        f"{settings['rounds']} rounds. Count: processes of the loader, threads of the model.",
        "",
        "| alone | count 1 | count 2 |",
        "|---|---:|---:|",
    ]
    for what, source in dict.fromkeys((r["what"], r["source"]) for r in results["rows"]):
        label = f"model: {what}" if source == "model" else f"loader: {what}, from {source}"
        cells = [found[what, source, count] for count in COUNTS]
        lines.append(
            f"| {label} | " + " | ".join(f"{r['images_per_s']:.0f} ± {r['iqr'] / 2:.0f}" for r in cells) + " |"
        )
    lines += ["", "| one loader process, two model threads | loader / model |", "|---|---:|"]
    for step, kind in (("stage 1 step", TRAINING), ("stage 2 step", TRAINING), ("scoring", SCORING)):
        for source in SOURCES:
            ratio = found[kind, source, 1]["images_per_s"] / found[step, "model", 2]["images_per_s"]
            lines.append(f"| {step}, from {source} | {ratio:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the results file and the README's table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_loading", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--readme", type=Path, help=f"file with the table; default: {README} with the default --results"
    )
    options = parser.parse_args(arguments)
    if options.pictures <= options.batch_size or options.rounds < 1:
        parser.error("wanted more --pictures than --batch-size, and 1 round or more")
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), pictures=options.pictures, batch_size=options.batch_size, rounds=options.rounds)
    settings = {
        "encoder": preset_config("demo").model.encoder,
        "pictures": options.pictures,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "picture_px": [WIDTH_PX, HEIGHT_PX],
    }
    results = {"environment": environment(), "settings": settings, "rows": rows}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(markdown(results))
    readme = options.readme or (README if options.results == RESULTS else None)
    if readme is not None:
        document = with_tables(readme.read_text(encoding="utf-8"), markdown(results), begin=BEGIN, end=END)
        readme.write_text(document, encoding="utf-8")
    print(f"wrote {options.results}" + (f" and the table in {readme}" if readme else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
