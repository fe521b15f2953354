"""A written repository in a real Triton on the CPU; skipped without nvidia-pytriton, which brings one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bundle_fixtures import CALIBRATION, numpy_outputs, random_images, write_bundle

pytest.importorskip("pytriton", reason="nvidia-pytriton is not installed; CONTRIBUTING says how this test is run")
grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

from pytriton.utils.distribution import get_libs_path, get_root_module_path, get_stub_path  # noqa: E402

from export.triton import main  # noqa: E402
from export.triton_config import CONFIG_FILE, config_text, parsed_config  # noqa: E402

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60


def stand_in(model, bundle):
    """Let the Python backend serve a model of the repository; everything else of its configuration stays."""
    config = parsed_config((model / CONFIG_FILE).read_text())
    config.backend, config.platform, config.default_model_filename = "python", "", "model.py"
    config.parameters["test_bundle"].string_value = str(bundle)
    (model / CONFIG_FILE).write_text(config_text(config))
    shutil.copy(ROOT / "tests" / "triton_stand_in.py", model / "1" / "model.py")
    return config


def python_backend(folder):
    """Triton's backends with the program that runs model.py in this Python."""
    shutil.copytree(get_root_module_path() / "tritonserver" / "backends", folder)
    shutil.copy(get_stub_path(f"{sys.version_info.major}.{sys.version_info.minor}"), folder / "python")
    return folder


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A client of a running server, and the configurations that it was given, by model."""
    folder = tmp_path_factory.mktemp("served")
    write_bundle(folder / "tiny")
    batching = ["--max-batch-size", "16", "--preferred-batch-sizes", "4", "--max-queue-delay-us", "200000"]
    assert main(["--model", str(folder / "tiny"), "--out", str(folder / "repo"), *batching]) == 0
    configs = {model.name: stand_in(model, folder / "tiny") for model in sorted((folder / "repo").iterdir())}
    port = free_port()
    command = [
        get_root_module_path() / "tritonserver" / "bin" / "tritonserver",
        f"--model-repository={folder / 'repo'}",
        f"--backend-directory={python_backend(folder / 'backends')}",
        f"--grpc-port={port}",
        "--grpc-address=127.0.0.1",
        "--allow-http=false",
        "--allow-metrics=false",
        "--disable-auto-complete-config",
    ]
    # The Python in the backend takes its packages from where the first python3 in PATH lies.
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(get_libs_path()),
        "PATH": f"{Path(sys.exec_prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        client = grpc.InferenceServerClient(f"127.0.0.1:{port}")
        wait_until_ready(client, process, folder / "log.txt")
        yield client, configs
        client.close()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def wait_until_ready(client, process, log):
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE_S and process.poll() is None:
        try:
            if client.is_server_ready():
                return
        except grpc.InferenceServerException:
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text())


def infer(client, model, images):
    request = grpc.InferInput("images", images.shape, "UINT8")
    request.set_data_from_numpy(images)
    result = client.infer(model, [request])
    return {name: result.as_numpy(name) for name in ("logits", "trace_similarity", "embeddings", "evidence")}


def test_triton_loads_every_model_warms_it_up_and_keeps_its_configuration(served):
    client, configs = served
    assert set(configs) == {"tiny_fp32_onnxruntime", "tiny_fp32_openvino"}
    for name, given in configs.items():
        config = client.get_model_config(name).config
        for field in (
            "max_batch_size",
            "input",
            "output",
            "instance_group",
            "version_policy",
            "model_warmup",
            "dynamic_batching",
        ):
            kept, wanted = getattr(config, field), getattr(given, field)
            if field == "instance_group":
                kept, wanted = ([(g.kind, g.count) for g in groups] for groups in (kept, wanted))
            assert kept == wanted, field
        assert float(config.parameters["ntf_fake_threshold"].string_value) == CALIBRATION.fake_threshold


@pytest.mark.parametrize("model", ["tiny_fp32_onnxruntime", "tiny_fp32_openvino"])
@pytest.mark.parametrize("pictures", [1, 3, 16])
def test_served_scores_are_those_of_the_graph(served, model, pictures):
    client, _ = served
    images = random_images(pictures, seed=pictures)
    outputs = infer(client, model, images)
    for name, expected in numpy_outputs(images).items():
        wanted = expected.reshape(pictures, -1) if expected.ndim == 1 else expected
        assert outputs[name].shape == wanted.shape
        np.testing.assert_allclose(outputs[name], wanted, atol=1e-5, err_msg=name)


def test_requests_are_joined_to_one_batch_and_answered_each_with_its_own_scores(served):
    client, _ = served
    images = random_images(4, seed=9)
    before = client.get_inference_statistics("tiny_fp32_onnxruntime").model_stats[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: infer(client, "tiny_fp32_onnxruntime", image[None]), images))
    after = client.get_inference_statistics("tiny_fp32_onnxruntime").model_stats[0]
    assert after.inference_count - before.inference_count == 4
    assert after.execution_count - before.execution_count < 4
    logits = np.concatenate([outputs["logits"][:, 0] for outputs in found])
    np.testing.assert_allclose(logits, numpy_outputs(images)["logits"], atol=1e-5)


def test_a_batch_that_is_larger_than_configured_is_refused(served):
    client, _ = served
    with pytest.raises(grpc.InferenceServerException, match="batch-size must be <= 16"):
        infer(client, "tiny_fp32_onnxruntime", random_images(17))


def test_pictures_of_another_size_are_refused(served):
    client, _ = served
    with pytest.raises(grpc.InferenceServerException, match="unexpected shape for input 'images'"):
        infer(client, "tiny_fp32_onnxruntime", np.zeros((1, 16, 17, 3), np.uint8))
