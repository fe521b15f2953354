"""Features that have nothing to do with synthesis: read off files, and what they reach."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.pictures import PictureRecord
from train.trivial_features import GROUPS, Traits, auc_error, cross_validated_auc, set_auc, traits_of

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encoded(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 92, 100])
def test_jpeg_quality_is_read_off_the_tables(quality: int) -> None:
    assert traits_of(encoded("JPEG", quality=quality)).jpeg_quality == quality


def test_tables_of_other_encoders_get_the_nearest_quality_and_a_hash_of_their_own() -> None:
    with Image.open(io.BytesIO(encoded("JPEG", quality=80))) as picture:
        tables = {number: [min(255, value + 1) for value in table] for number, table in picture.quantization.items()}
    other, usual = traits_of(encoded("JPEG", qtables=tables)), traits_of(encoded("JPEG", quality=80))
    assert other.jpeg_tables != usual.jpeg_tables
    assert 70 <= other.jpeg_quality < 80


def test_traits_say_what_the_file_says() -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    jpeg = traits_of(encoded("JPEG", exif=exif, progressive=True, subsampling="4:4:4", icc_profile=b"profile"))
    assert (jpeg.format, jpeg.mode, jpeg.width_px, jpeg.height_px) == ("JPEG", "RGB", 32, 24)
    assert (jpeg.exif, jpeg.jpeg_progressive, jpeg.jpeg_subsampling, jpeg.icc_profile) == (True, True, 0, True)
    png = traits_of(encoded("PNG"))
    assert (png.format, png.jpeg_quality, png.jpeg_tables, png.jpeg_subsampling, png.exif) == ("PNG", 0, "", -1, False)
    assert png.file_bytes == len(encoded("PNG"))


def traits(**changes: object) -> Traits:
    return Traits(**({**traits_of(encoded("PNG")).__dict__, **changes}))


def records(labels: list[int]) -> list[PictureRecord]:
    return [PictureRecord(Path(f"{i}.png"), label, "g", "g", f"o{i}", None) for i, label in enumerate(labels)]


LABELS = [0, 1] * 40


@pytest.mark.parametrize(
    ("group", "of_fakes"),
    [
        ("file format", {"format": "JPEG"}),
        ("picture size", {"width_px": 512}),
        ("JPEG tables", {"jpeg_tables": "beef"}),
        ("metadata", {"exif": True}),
        ("file length", {"file_bytes": 1}),
    ],
)
def test_each_group_alone_is_enough_where_it_differs(group: str, of_fakes: dict[str, object]) -> None:
    found = set_auc([traits(**of_fakes) if label else traits() for label in LABELS], records(LABELS))
    assert found is not None
    assert found.auc == 1.0
    assert {name for name in GROUPS if found.by_group[name] == 1.0} >= {group}
    assert all(found.by_group[name] == 0.5 for name in GROUPS if name not in (group, "file length"))


def test_one_size_among_many_is_found_though_it_lies_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    shapes = [traits(width_px=512) if label else traits(width_px=int(rng.integers(200, 900))) for label in LABELS]
    auc, low = cross_validated_auc(shapes, records(LABELS), groups=("picture size",))
    assert auc > 0.9
    assert low > 0.8


def test_features_without_a_connection_are_at_chance() -> None:
    rng = np.random.default_rng(1)
    shapes = [traits(width_px=int(rng.integers(200, 900)), file_bytes=int(rng.integers(1000, 9000))) for _ in LABELS]
    found = set_auc(shapes, records(LABELS))
    assert found is not None
    assert abs(found.auc - 0.5) < 0.15
    assert found.low < 0.5


def test_pictures_of_one_original_are_in_one_fold() -> None:
    # Twenty originals, forty copies each, whose neighbours in size have the other label: learnt by heart if copies of
    # one are in two folds, and misleading otherwise.
    many = [(200 + 10 * i, i % 2, i) for i in range(20) for _ in range(40)]
    shapes = [traits(width_px=w) for w, _, _ in many]
    owners = [PictureRecord(Path("a.png"), label, "g", "g", f"o{i}", None) for _, label, i in many]
    strangers = records([label for _, label, _ in many])
    assert cross_validated_auc(shapes, strangers, groups=("picture size",))[0] > 0.8
    assert cross_validated_auc(shapes, owners, groups=("picture size",))[0] < 0.6


@pytest.mark.parametrize("labels", [[0] * 40, [0] * 40 + [1] * 9])
def test_too_few_pictures_of_a_class_give_no_figure(labels: list[int]) -> None:
    assert set_auc([traits() for _ in labels], records(labels)) is None


def test_error_of_an_auc_is_that_of_hanley_and_mcneil() -> None:
    # Worked by hand: A = 0.8, Q1 = A / (2 - A) = 2/3, Q2 = 2 A^2 / (1 + A) = 0.7111, 51 pictures of each class.
    variance = (0.8 * 0.2 + 50 * (2 / 3 - 0.64) + 50 * (2 * 0.64 / 1.8 - 0.64)) / 51**2
    assert auc_error(0.8, 51, 51) == pytest.approx(variance**0.5)
    assert auc_error(0.2, 51, 51) == auc_error(0.8, 51, 51)
    assert auc_error(1.0, 10, 10) == 0
