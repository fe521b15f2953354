"""model.py of a served test: Triton's Python backend in the place of the backend that a configuration names.

The Triton that can be installed with pip has no other backend. What it serves is the file that the repository holds,
opened by the runtime; names, types, shapes, batching and warm-up are those of the configuration.
"""

from __future__ import annotations

import json
from pathlib import Path

import openvino
import triton_python_backend_utils as triton

from runtime.backends import open_backend
from runtime.bundle import open_bundle
from runtime.manifest import OUTPUTS


class TritonPythonModel:
    """Called by Triton."""

    def initialize(self, arguments):
        config = json.loads(arguments["model_config"])
        version = Path(arguments["model_repository"]) / arguments["model_version"]
        if (version / "model.xml").exists():
            compiled = openvino.Core().compile_model(version / "model.xml", "CPU")
            self.infer = lambda images: {name: compiled(images)[name] for name in OUTPUTS}
            return
        manifest = open_bundle(config["parameters"]["test_bundle"]["string_value"]).manifest
        content = (version / "model.onnx").read_bytes()
        backend = open_backend("onnxruntime", content, manifest, file="model.onnx")
        self.infer = lambda images: backend.infer(images)._asdict()

    def execute(self, requests):
        responses = []
        for request in requests:
            outputs = self.infer(triton.get_input_tensor_by_name(request, "images").as_numpy())
            tensors = [triton.Tensor(name, outputs[name]) for name in OUTPUTS]
            responses.append(triton.InferenceResponse(output_tensors=tensors))
        return responses
