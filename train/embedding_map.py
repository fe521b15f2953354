"""The map of an evaluation: t-SNE of the embeddings beside the natural traces, as Fig. 1 of Liang et al. 2024 has it.

A map in two dimensions cannot keep distances, so three figures of the embeddings themselves stand beside it: how far
real and fake lie apart, what a picture's nearest neighbours are, and how close each set lies to the natural traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from runtime.manifest import LABELS
from train.errors import ReportError
from train.markdown import decimal, markdown_table, percent
from train.model import NTFDetector
from train.pictures import PictureRecord
from train.scoring import embed_pictures

MAP_FILE, MAP_FIGURE_FILE = "embedding_map.json", "embedding_map.png"
NEIGHBOURS = 10
PERPLEXITY = 30.0  # of van der Maaten and Hinton 2008, who advise 5 to 50
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddingSet:
    """Where the pictures of one set lie.

    Attributes:
        name: of the class or the generator.
        seen_in_training: whether the run was trained on fakes of that generator; None where it is not known or not
            a question.
        pictures: how many of the set are mapped.
        same_label_neighbours: share of their nearest neighbours that have their label.
        same_label_by_chance: what that share is where neighbours do not depend on the label.
        trace_similarity: mean cosine with the mean natural trace; None for a method without natural traces.
    """

    name: str
    seen_in_training: bool | None
    pictures: int
    same_label_neighbours: float
    same_label_by_chance: float
    trace_similarity: float | None


@dataclass(frozen=True)
class EmbeddingMapReport:
    """What a map shows, in figures.

    Attributes:
        space: "z" for the projected rows; "e" for the encoder's embeddings, for a method that trains no z.
        pictures: mapped ones.
        pictures_scored: of which they are a sample.
        traces: natural traces of real pictures in the map.
        seed: of the sample and the map.
        perplexity: of t-SNE.
        neighbours: nearest neighbours that were looked at.
        silhouette: of real against fake, in -1..1; None where a class is missing.
        training_generators_known: whether the run says what it was trained on.
        classes: real and fake, those that there are.
        generators: the fakes of each.
    """

    space: Literal["z", "e"]
    pictures: int
    pictures_scored: int
    traces: int
    seed: int
    perplexity: float
    neighbours: int
    silhouette: float | None
    training_generators_known: bool
    classes: tuple[EmbeddingSet, ...]
    generators: tuple[EmbeddingSet, ...]


@dataclass(frozen=True)
class MapPoint:
    """One point of the map.

    Attributes:
        kind: an embedding of a picture, the natural trace of a real one, or the mean natural trace.
        id: path of the picture in its collection; empty for the mean trace.
        generator: of the picture; empty for the mean trace.
        label: 0 real, 1 fake.
        x: without unit, as y.
    """

    kind: Literal["picture", "trace", "mean trace"]
    id: str
    generator: str
    label: int
    x: float
    y: float


@dataclass(frozen=True)
class EmbeddingMap:
    """A map with everything that its figure is drawn from."""

    report: EmbeddingMapReport
    points: tuple[MapPoint, ...]


@dataclass(frozen=True)
class EmbeddingRows:
    """Unit rows that share one space, and what they say of the traces.

    Attributes:
        rows: (N, D) float32, of the pictures.
        traces: (R, D) float32, h = f_hom(E(x)) of the real ones among them; R = 0 without natural traces.
        mean_trace: (1, D) float32; (0, D) without natural traces.
        trace_similarity: (N,) float32; None without natural traces.
    """

    rows: Rows
    traces: Rows
    mean_trace: Rows
    trace_similarity: NDArray[np.float32] | None


def embedding_map(
    detector: NTFDetector,
    records: Sequence[PictureRecord],
    ids: Sequence[str],
    *,
    natural_traces: bool,
    train_generators: Sequence[str] | None,
    limit: int,
    seed: int,
    batch_size: int = 32,
    workers: int = 0,
) -> EmbeddingMap:
    """The map of a sample of the records.

    Args:
        detector: in eval mode.
        records: pictures that were scored.
        ids: what each is called in the map.
        natural_traces: whether the method trains z and its traces; without, the encoder's embeddings are mapped.
        train_generators: generators whose fakes the run was trained on; None where that is not known.
        limit: most pictures to map.
        seed: of the sample and of t-SNE; the same seed gives the same map.
        batch_size: pictures in a forward pass.
        workers: processes that decode.

    Raises:
        ReportError: too few pictures for a map, or a limit that leaves sets without a picture.
    """
    check_mappable(records, limit)
    chosen = stratified_sample(records, limit, seed)
    sample = [records[row] for row in chosen]
    labels = np.array([record.label for record in sample])
    space = embedding_rows(detector, sample, natural_traces=natural_traces, batch_size=batch_size, workers=workers)
    everything = np.concatenate([space.rows, space.traces, space.mean_trace])
    perplexity = min(PERPLEXITY, (len(everything) - 1) / 3)
    classes, generators = _sets(space, sample, train_generators)
    report = EmbeddingMapReport(
        space="z" if natural_traces else "e",
        pictures=len(sample),
        pictures_scored=len(records),
        traces=len(space.traces),
        seed=seed,
        perplexity=perplexity,
        neighbours=NEIGHBOURS,
        silhouette=_silhouette(space.rows, labels),
        training_generators_known=train_generators is not None,
        classes=classes,
        generators=generators,
    )
    names = [ids[row] for row in chosen]
    return EmbeddingMap(report, _points(_tsne(everything, perplexity, seed), sample, names, len(space.traces)))


def check_mappable(records: Sequence[PictureRecord], limit: int) -> None:
    """Refuse what no map can be made of, before anything is scored.

    Raises:
        ReportError: too few pictures for a map, or a limit that leaves sets without a picture.
    """
    if len(records) <= NEIGHBOURS:
        raise ReportError(
            "--tsne",
            got=f"{len(records)} pictures",
            wanted=f"more than {NEIGHBOURS}, the neighbours that are counted",
            remedy="leave it out, or score more pictures",
        )
    needed = max(NEIGHBOURS + 1, len({(record.generator, record.label) for record in records}))
    if limit < needed:
        raise ReportError(
            f"--tsne-pictures {limit}",
            got="fewer pictures than a map needs",
            wanted=f"at least {needed}, with one of each class of each generator",
            remedy="map more pictures",
        )


def stratified_sample(records: Sequence[PictureRecord], limit: int, seed: int) -> list[int]:
    """Indices of at most `limit` records, rising: each class of each generator by its share, at least once.

    Args:
        records: to draw from.
        limit: at least the number of classes of generators.
        seed: of the draw.
    """
    strata: dict[tuple[str, int], list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(records)):
        strata.setdefault((records[index].generator, records[index].label), []).append(int(index))
    # Rank over size runs from 0 to 1 in every set, so the smallest of all of them are the same share of each.
    placed = [(rank / len(members), index) for members in strata.values() for rank, index in enumerate(members)]
    return sorted(index for _, index in sorted(placed)[:limit])


@torch.inference_mode()
def embedding_rows(
    detector: NTFDetector,
    records: Sequence[PictureRecord],
    *,
    natural_traces: bool,
    batch_size: int = 32,
    workers: int = 0,
) -> EmbeddingRows:
    """Unit rows z and h of the records, or their unit embeddings e without natural traces."""
    device = next(detector.parameters()).device
    embeddings = embed_pictures(detector, records, batch_size=batch_size, workers=workers).to(device)
    if not natural_traces:
        none = np.empty((0, embeddings.shape[1]), np.float32)
        return EmbeddingRows(F.normalize(embeddings, dim=1).cpu().numpy(), none, none, None)
    projected = detector.projection(embeddings)
    reals = torch.tensor([record.label == 0 for record in records], device=device)
    return EmbeddingRows(
        rows=projected.cpu().numpy(),
        traces=detector.head_hom(embeddings[reals]).cpu().numpy(),
        mean_trace=F.normalize(detector.mean_trace, dim=0)[None].cpu().numpy(),
        trace_similarity=detector.similarity_to_traces(projected).cpu().numpy(),
    )


def _tsne(rows: Rows, perplexity: float, seed: int) -> NDArray[np.float32]:
    from sklearn.manifold import TSNE

    # Chords of unit rows: |a - b|^2 = 2 - 2 cos, so neighbours are those by cosine.
    map_: NDArray[np.float32] = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    return map_


def _silhouette(rows: Rows, labels: NDArray[np.int64]) -> float | None:
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(rows, labels)) if len(np.unique(labels)) == 2 else None


def _sets(
    space: EmbeddingRows, sample: Sequence[PictureRecord], train_generators: Sequence[str] | None
) -> tuple[tuple[EmbeddingSet, ...], tuple[EmbeddingSet, ...]]:
    """Both classes, and the fakes of each generator."""
    from sklearn.neighbors import NearestNeighbors

    labels = np.array([record.label for record in sample])
    generators = np.array([record.generator for record in sample])
    index = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(space.rows).kneighbors(return_distance=False)
    same = (labels[index] == labels[:, None]).mean(axis=1)

    def of(name: str, members: NDArray[np.bool_], seen: bool | None = None) -> EmbeddingSet:
        label = labels[members][0]
        similarity = space.trace_similarity
        return EmbeddingSet(
            name=name,
            seen_in_training=seen,
            pictures=int(members.sum()),
            same_label_neighbours=float(same[members].mean()),
            same_label_by_chance=float((labels == label).sum() - 1) / (len(labels) - 1),
            trace_similarity=None if similarity is None else float(similarity[members].mean()),
        )

    classes = tuple(of(name, labels == n) for n, name in enumerate(LABELS) if (labels == n).any())
    return classes, tuple(
        of(name, (labels == 1) & (generators == name), None if train_generators is None else name in train_generators)
        for name in dict.fromkeys(generators[labels == 1].tolist())
    )


def _points(
    coordinates: NDArray[np.float32], sample: Sequence[PictureRecord], names: Sequence[str], traces: int
) -> tuple[MapPoint, ...]:
    """The map's points in the order of its rows: pictures, traces of the real ones, the mean trace."""
    pictures = [("picture", name, r.generator, r.label) for name, r in zip(names, sample, strict=True)]
    of_traces = [("trace", name, generator, label) for _, name, generator, label in pictures if label == 0]
    known = [*pictures, *of_traces[:traces], ("mean trace", "", "", 0)][: len(coordinates)]
    return tuple(
        MapPoint(kind, name, generator, label, float(x), float(y))
        for (kind, name, generator, label), (x, y) in zip(known, coordinates, strict=True)
    )


def embedding_map_section(report: EmbeddingMapReport) -> str:
    """The report's section."""
    what = (
        "projected rows z with the natural traces h = f_hom(E(x)) of the real pictures among them and the mean trace "
        "of the run's training pictures"
        if report.space == "z"
        else "encoder's embeddings e: this method trains no z and has no natural traces"
    )
    known = (
        "Filled circles are generators whose fakes the run was trained on, hollow triangles those it never saw."
        if report.training_generators_known
        else "The run does not say which generators it was trained on, so they are not told apart."
    )
    rows = [
        (
            name,
            {True: "yes", False: "no", None: ""}[s.seen_in_training],
            f"{s.pictures:,}",
            percent(s.same_label_neighbours),
            percent(s.same_label_by_chance),
            decimal(s.trace_similarity),
        )
        for name, s in [(s.name, s) for s in report.classes] + [(f"fake: {s.name}", s) for s in report.generators]
    ]
    head = ("set", "trained on", "pictures", "neighbours alike", "by chance", "trace similarity")
    together = "together, with the traces," if report.space == "z" else "together"
    return "\n\n".join(
        (
            f"![t-SNE of {report.space}]({MAP_FIGURE_FILE})",
            f"t-SNE of the {what}; {report.pictures:,} of {report.pictures_scored:,} scored pictures, each class of "
            f"each generator by its share, perplexity {report.perplexity:.3g}, seed {report.seed}. To be seen: whether "
            f"real pictures lie {together} and fakes apart from them, those of unseen generators too. {known} A map in "
            "two dimensions keeps neighbours, not distances: gaps between groups, their sizes and the axes mean "
            "little, and another sample gives another map.",
            "The figures below are of the rows, not of the map. Silhouette of real against fake: "
            f"**{decimal(report.silhouette)}** (1 far apart, 0 mixed, below 0 nearer to the other class). "
            f"Neighbours alike: share of a picture's {report.neighbours} nearest that have its label, in percent, "
            "beside what chance gives. Trace similarity: mean cosine with the mean natural trace.",
            markdown_table(head, rows),
        )
    )
