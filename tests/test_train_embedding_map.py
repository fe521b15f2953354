"""The map of the embeddings: its sample, its rows, its figures, its picture."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import TINY_ENCODER, write_pictures

import train.embedding_map
from runtime.strict_json import from_jsonable, to_jsonable
from train.data import load_split
from train.embedding_map import (
    EmbeddingMap,
    EmbeddingRows,
    EmbeddingSet,
    check_mappable,
    embedding_map,
    embedding_map_section,
    embedding_rows,
    stratified_sample,
)
from train.embedding_map_figure import write_embedding_map
from train.encoder import Encoder
from train.errors import ReportError
from train.model import NTFDetector
from train.pictures import PictureRecord
from train.scoring import embed_pictures


def records_of(counts: dict[tuple[str, int], int]) -> list[PictureRecord]:
    """Records without files, set after set."""
    return [
        PictureRecord(Path(f"/{generator}/{label}/{n}.png"), label, generator, generator, f"{n}", "test")
        for (generator, label), count in counts.items()
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def detector() -> NTFDetector:
    torch.manual_seed(0)
    made = NTFDetector(Encoder(TINY_ENCODER), 16, "projection").eval()
    made.mean_trace.copy_(torch.randn(16))
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[PictureRecord, ...]:
    return load_split(write_pictures(tmp_path_factory.mktemp("map"), counts={"test": 8}), "test").records


def hand_made(monkeypatch: pytest.MonkeyPatch, rows: np.ndarray, similarity: np.ndarray) -> None:
    none = np.empty((0, rows.shape[1]), np.float32)
    space = EmbeddingRows(rows.astype(np.float32), none, none, similarity.astype(np.float32))
    monkeypatch.setattr(train.embedding_map, "embedding_rows", lambda *args, **options: space)


def test_sample_keeps_shares_and_leaves_no_set_out() -> None:
    counts = {("a", 0): 100, ("a", 1): 100, ("b", 0): 40, ("b", 1): 40, ("rare", 1): 1}
    records = records_of(counts)
    chosen = stratified_sample(records, 60, seed=3)
    drawn = Counter((records[row].generator, records[row].label) for row in chosen)
    assert len(chosen) == len(set(chosen)) == 60
    assert chosen == sorted(chosen)
    assert drawn["rare", 1] == 1
    assert all(abs(drawn[key] - 60 / 281 * size) <= 1 for key, size in counts.items())


def test_sample_follows_its_seed_and_may_be_everything() -> None:
    records = records_of({("a", 0): 50, ("a", 1): 50})
    assert stratified_sample(records, 20, seed=0) == stratified_sample(records, 20, seed=0)
    assert stratified_sample(records, 20, seed=0) != stratified_sample(records, 20, seed=1)
    assert stratified_sample(records, 1000, seed=0) == list(range(100))


@pytest.mark.parametrize(
    ("counts", "limit", "message"),
    [
        ({("a", 0): 5, ("a", 1): 5}, 1000, "--tsne: got 10 pictures, wanted more than 10"),
        ({("a", 0): 50, ("a", 1): 50}, 10, "--tsne-pictures 10: .* at least 11"),
        ({(f"g{n}", n % 2): 3 for n in range(20)}, 19, "--tsne-pictures 19: .* at least 20"),
    ],
)
def test_map_of_too_few_pictures_is_refused(counts: dict[tuple[str, int], int], limit: int, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        check_mappable(records_of(counts), limit)


def test_rows_are_z_and_the_traces_of_the_real_pictures(
    detector: NTFDetector, pictures: tuple[PictureRecord, ...]
) -> None:
    made = embedding_rows(detector, pictures, natural_traces=True)
    embeddings = embed_pictures(detector, pictures)
    reals = [number for number, record in enumerate(pictures) if record.label == 0]
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(made.rows), detector.projection(embeddings))
        torch.testing.assert_close(torch.from_numpy(made.traces), detector.head_hom(embeddings[reals]))
    mean = detector.mean_trace / detector.mean_trace.norm()
    np.testing.assert_allclose(made.mean_trace, mean[None], atol=1e-6)
    np.testing.assert_allclose(made.trace_similarity, made.rows @ mean.numpy(), atol=1e-6)


def test_method_without_traces_is_mapped_by_the_encoders_embeddings(
    detector: NTFDetector, pictures: tuple[PictureRecord, ...]
) -> None:
    ids = [record.path.name for record in pictures]
    made = embedding_map(
        detector, pictures, ids, natural_traces=False, train_generators=("halved",), limit=1000, seed=0
    )
    rows = embedding_rows(detector, pictures, natural_traces=False).rows
    embeddings = embed_pictures(detector, pictures).numpy()
    np.testing.assert_allclose(rows, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), atol=1e-6)
    assert (made.report.space, made.report.traces) == ("e", 0)
    assert {point.kind for point in made.points} == {"picture"}
    assert {s.trace_similarity for s in made.report.classes + made.report.generators} == {None}
    assert "this method trains no z and has no natural traces" in embedding_map_section(made.report)


@pytest.fixture(scope="module")
def mapped(detector: NTFDetector, pictures: tuple[PictureRecord, ...]) -> EmbeddingMap:
    ids = [f"{record.label}/{record.path.name}" for record in pictures]
    return embedding_map(detector, pictures, ids, natural_traces=True, train_generators=("halved",), limit=12, seed=5)


def test_map_holds_sample_traces_and_their_mean(mapped: EmbeddingMap) -> None:
    kinds = Counter(point.kind for point in mapped.points)
    assert kinds == {"picture": 12, "trace": 6, "mean trace": 1}
    shown = [point.id for point in mapped.points if point.kind == "picture" and point.label == 0]
    assert [point.id for point in mapped.points if point.kind == "trace"] == shown
    assert (mapped.report.pictures, mapped.report.pictures_scored, mapped.report.traces) == (12, 16, 6)
    assert mapped.report.perplexity == 6.0  # a third of the others, where there are fewer than 91


def test_same_seed_gives_the_same_map_and_its_file_gives_it_back(
    mapped: EmbeddingMap, detector: NTFDetector, pictures: tuple[PictureRecord, ...]
) -> None:
    ids = [f"{record.label}/{record.path.name}" for record in pictures]
    again = embedding_map(detector, pictures, ids, natural_traces=True, train_generators=("halved",), limit=12, seed=5)
    assert again == mapped
    assert from_jsonable(EmbeddingMap, json.loads(json.dumps(to_jsonable(mapped)))) == mapped


def test_figures_of_a_hand_made_space(monkeypatch: pytest.MonkeyPatch, detector: NTFDetector) -> None:
    records = records_of({("far", 0): 15, ("far", 1): 15, ("near", 1): 2})
    angle = np.array([0.0] * 15 + [np.pi] * 15 + [0.1] * 2) + np.linspace(0, 1e-3, 32)
    hand_made(monkeypatch, np.stack([np.cos(angle), np.sin(angle)], axis=1), np.cos(angle))
    made = embedding_map(
        detector, records, ["x"] * 32, natural_traces=True, train_generators=("far",), limit=100, seed=0
    ).report
    real, fake = made.classes
    far, near = made.generators
    assert (real.name, fake.name, far.name, near.name) == ("real", "fake", "far", "near")
    assert (far.seen_in_training, near.seen_in_training, real.seen_in_training) == (True, False, None)
    assert (far.same_label_neighbours, real.same_label_neighbours) == (1.0, 1.0)
    assert near.same_label_neighbours == pytest.approx(0.1)  # its twin, and nine real ones
    assert fake.same_label_neighbours == pytest.approx((15 * 1.0 + 2 * 0.1) / 17)
    assert (real.same_label_by_chance, fake.same_label_by_chance) == (14 / 31, 16 / 31)
    assert far.trace_similarity == pytest.approx(-1.0, abs=1e-3)
    assert made.silhouette is not None
    assert 0.5 < made.silhouette < 0.9  # 1 but for the two that lie among the real ones


def test_one_class_has_no_silhouette(monkeypatch: pytest.MonkeyPatch, detector: NTFDetector) -> None:
    hand_made(monkeypatch, np.eye(12), np.ones(12))
    made = embedding_map(
        detector, records_of({("a", 0): 12}), ["x"] * 12, natural_traces=True, train_generators=None, limit=50, seed=0
    ).report
    assert (made.silhouette, [s.name for s in made.classes], made.generators) == (None, ["real"], ())


def test_section_says_what_was_trained_on_or_that_it_is_not_known(mapped: EmbeddingMap) -> None:
    known = embedding_map_section(mapped.report)
    assert "12 of 16 scored pictures" in known
    assert "Filled circles are generators whose fakes the run was trained on" in known
    assert "| fake: halved | yes | 6 |" in known
    (halved,) = mapped.report.generators
    unknown = replace(
        mapped.report, training_generators_known=False, generators=(replace(halved, seen_in_training=None),)
    )
    assert "The run does not say which generators it was trained on" in embedding_map_section(unknown)
    assert "| fake: halved |  | 6 |" in embedding_map_section(unknown)


@pytest.mark.parametrize("generators", [1, 30])
def test_picture_is_drawn_for_few_and_many_generators_of_any_name(
    mapped: EmbeddingMap, tmp_path: Path, generators: int
) -> None:
    names = ["_$x^2$ <b>", *(f"g{n}" for n in range(1, generators))]
    sets = tuple(EmbeddingSet(name, n % 2 == 0, 6, 1.0, 0.5, 0.1) for n, name in enumerate(names))
    points = [replace(p, generator=names[n % generators]) for n, p in enumerate(mapped.points)]
    many = EmbeddingMap(replace(mapped.report, generators=sets), tuple(points))
    write_embedding_map(tmp_path / "map.png", many)
    with Image.open(tmp_path / "map.png") as figure:
        assert figure.size == (1320, 880)
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 20
