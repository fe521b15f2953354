from __future__ import annotations

import io

import numpy as np
import pytest
from bundle_fixtures import numpy_outputs, random_images
from PIL import Image

from runtime import Detector
from runtime.errors import UsageError
from runtime.file_part import FilePart
from runtime.sources import is_array, is_file, require_many


class Foreign:
    """An array of another library, which is iterated along its first axis as PyTorch's are."""

    def __init__(self, values):
        self.values, self.shape, self.ndim = values, values.shape, values.ndim

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()

    def __iter__(self):
        return map(Foreign, self.values)


def test_only_paths_bytes_and_parts_of_files_may_be_decoded_twice_at_once():
    assert all(is_file(source) for source in ("a.png", b"bytes", FilePart("a", "a.tar", 0, 1)))
    assert not any(is_file(source) for source in (io.BytesIO(b"x"), Image.new("RGB", (2, 2)), random_images(1)[0]))


def test_pixels_in_memory_are_told_from_files():
    assert all(is_array(source) for source in (random_images(1)[0], Foreign(random_images(1)[0])))
    assert not any(is_array(source) for source in ("a.png", b"bytes", io.BytesIO(b"x"), Image.new("RGB", (2, 2))))


def test_batch_of_another_library_is_many_pictures_and_one_picture_of_it_is_one(tiny_bundle):
    images = random_images(5)
    with Detector.load(tiny_bundle, backend="onnxruntime", threads=1) as detector:
        detections = detector.predict(Foreign(images), batch_size=2)
        with pytest.raises(UsageError, match="got one Foreign"):
            detector.predict(Foreign(images[0]))
    logits = numpy_outputs(images)["logits"]
    scores = [detection.fake_probability for detection in detections]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-(logits / 0.5 - 0.5))), atol=1e-6)
    assert detections[3].source == "#3 (Foreign (16, 16, 3))"


@pytest.mark.parametrize(("many", "count"), [([], 0), ((), 0), (iter("ab"), 2), ({"a.png"}, 1), (random_images(2), 2)])
def test_collections_and_batches_are_many_and_nothing_is_taken_from_them(many, count):
    require_many(many)
    assert len(list(many)) == count


@pytest.mark.parametrize("single", ["a.png", b"x", memoryview(b"x"), io.BytesIO(b"x"), random_images(1)[0], None, 5])
def test_one_picture_and_what_cannot_be_iterated_are_refused(single):
    with pytest.raises(UsageError, match="wanted a list, or another iterable, of pictures"):
        require_many(single)
