"""Crops handed to a service as they are: raw outputs of the graph, in batches with pictures."""

from __future__ import annotations

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images

from runtime.errors import ClosedError, QueueFullError, UsageError
from runtime.manifest import OUTPUTS
from runtime.service import DetectorService


class Batches:
    """An observer that keeps the sizes."""

    def __init__(self):
        self.sizes = []

    def batch(self, size, wait_s, infer_s):
        self.sizes.append(size)


def _service(bundle, **options):
    return DetectorService.load(bundle, backend="onnxruntime", threads=1, **options)


def test_crops_give_raw_outputs_and_share_batches_with_pictures(tiny_bundle):
    images, observer = random_images(6), Batches()
    with _service(tiny_bundle, max_wait_ms=500, max_batch_size=6, observer=observer) as service:
        crops = service.submit_crops(images[:3])
        pictures = [service.submit(image) for image in images[3:]]
        outputs, detections = [future.result(20) for future in crops], [future.result(20) for future in pictures]
    wanted = numpy_outputs(images)
    for name in OUTPUTS:
        found = np.concatenate([getattr(row, name) for row in outputs])
        np.testing.assert_allclose(found, wanted[name][:3], atol=1e-5)
    probabilities = CALIBRATION.fake_probability(wanted["logits"][3:]).tolist()
    assert [detection.fake_probability for detection in detections] == pytest.approx(probabilities, abs=1e-5)
    assert observer.sizes == [6]


def test_crops_may_be_overwritten_once_they_are_submitted(tiny_bundle):
    images = random_images(2)
    wanted = numpy_outputs(images)["logits"]
    with _service(tiny_bundle, max_wait_ms=50) as service:
        futures = service.submit_crops(images)
        images[:] = 0
        assert [float(f.result(20).logits[0]) for f in futures] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 15, 16, 3), np.uint8), ((1, 16, 16, 3), np.float32), ((16, 16, 3), np.uint8)]
)
def test_crops_of_another_shape_or_type_are_refused(tiny_bundle, shape, dtype):
    with _service(tiny_bundle) as service, pytest.raises(UsageError, match=r"wanted uint8 \(16, 16, 3\)"):
        service.submit_crops(np.zeros(shape, dtype))


def test_where_there_is_no_room_for_all_crops_none_stays_in_the_queue(tiny_bundle):
    with _service(tiny_bundle, max_queue=2, max_wait_ms=10_000, max_batch_size=8) as service:
        with pytest.raises(QueueFullError):
            service.submit_crops(random_images(3))
        assert service.queue_length == 0
        service.submit_crops(random_images(2))


def test_closed_service_takes_no_crops(tiny_bundle):
    service = _service(tiny_bundle)
    service.close()
    with pytest.raises(ClosedError):
        service.submit_crops(random_images(1))
