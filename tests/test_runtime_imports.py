from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

ROOT = Path(runtime.__file__).parent.parent
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "rich",
    "tyro",
    "pyarrow",
    "ray",
)
MODULES = sorted(module.name for module in pkgutil.walk_packages(runtime.__path__, "runtime."))

_BLOCK = "import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"


def _python(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_modules_to_look_at():
    assert {"runtime.detector", "runtime.cli", "runtime.backends.ort", "runtime.backends.openvino"} <= set(MODULES)


def test_importing_runtime_needs_and_loads_nothing_heavy():
    loaded = _python(
        _BLOCK.format(blocked=HEAVY) + "import runtime; print(*(m for m in sys.modules if sys.modules[m]))"
    )
    assert not {"numpy", "PIL"} & {name.split(".")[0] for name in loaded.split()}


def test_importing_what_most_programs_use_leaves_out_what_costs_most():
    loaded = _python("import sys\nfrom runtime import Detector, DetectorService\nprint(*sys.modules)").split()
    assert "runtime.service" in loaded
    assert not {"asyncio", "importlib.metadata", "email", "ssl", "multiprocessing", "http", "tempfile"} & set(loaded)


def test_every_module_imports_and_every_public_name_resolves_without_a_backend():
    code = "import importlib, runtime\n" + _BLOCK.format(blocked=HEAVY)
    code += f"for name in {MODULES!r}: importlib.import_module(name)\n"
    code += "for name in runtime.__all__: getattr(runtime, name)\nprint('fine')"
    assert _python(code) == "fine\n"


def test_importing_every_module_loads_no_backend():
    code = f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\nprint(*sys.modules)"
    assert not set(HEAVY) & set(_python(code).split())


def test_public_names_are_listed_once_and_resolve_to_what_they_say():
    assert len(set(runtime.__all__)) == len(runtime.__all__)
    assert set(runtime.__all__) == {*runtime._HOME, "__version__"}
    for name in runtime._HOME:
        assert getattr(runtime, name).__name__ == name
    assert set(runtime.__all__) <= set(dir(runtime))


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'runtime' has no attribute 'Detektor'"):
        _ = runtime.Detektor


def test_version_is_that_of_the_distribution(monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: {"ntf-toolkit": "9.8.7"}[name])
    assert runtime._version() == "9.8.7"


def test_version_of_a_checkout_that_was_never_installed_is_not_made_up(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert runtime._version() == "0+unknown"


def test_opening_one_backend_does_not_import_the_other(tiny_bundle):
    code = (
        "import sys\nfrom runtime import Detector\n"
        f"with Detector.load({str(tiny_bundle)!r}, backend='onnxruntime') as d: print(d.info.backend)\n"
        "print('openvino' in sys.modules, 'torch' in sys.modules)"
    )
    assert _python(code).split() == ["onnxruntime", "False", "False"]
