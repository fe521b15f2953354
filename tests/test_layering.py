"""Who may import whom, read off the syntax trees; and the deploy side without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("runtime", "cpp_ext", "train", "export", "benchmarks", "tests")
# train reads what both sides of the product must agree on: errors, formats, decoding and preprocessing.
SHARED_RUNTIME = {"runtime.errors", "runtime.manifest", "runtime.strict_json", "runtime.preprocess", "runtime.decode"}
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "openvino",
    "pyarrow",
    "ray",
    "tensorrt",
    "tensorrt_rtx",
    "pycuda",
    "cuda",
}


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path, *, only_at_import_time=False):
    """Absolute names that a file imports, submodules spelled out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _import_time_nodes(tree) if only_at_import_time else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" if node.module in OURS else node.module for a in node.names}
    return found


def _import_time_nodes(tree):
    """Nodes that run when the module is imported: not inside functions, nor under `if TYPE_CHECKING`."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def top(name):
    return name.partition(".")[0]


def our_imports(path):
    return {name for name in imports(path) if top(name) in OURS}


def test_runtime_imports_nothing_of_ours_and_no_back_end_at_import():
    for path in modules("runtime"):
        assert {top(name) for name in our_imports(path)} <= {"runtime"}, path
        assert not {top(name) for name in imports(path, only_at_import_time=True)} & HEAVY, path
        assert "torch" not in {top(name) for name in imports(path)}, path


def test_cpp_ext_is_a_leaf():
    for path in modules("cpp_ext"):
        assert {top(name) for name in our_imports(path)} <= {"cpp_ext"}, path


def test_train_imports_cpp_ext_and_the_shared_part_of_runtime_only():
    for path in modules("train"):
        for name in our_imports(path):
            assert top(name) in {"train", "cpp_ext"} or name in SHARED_RUNTIME, f"{path} imports {name}"


def test_export_imports_train_and_runtime_only():
    for path in modules("export"):
        assert {top(name) for name in our_imports(path)} <= {"export", "train", "runtime"}, path


def test_the_check_sees_a_forbidden_import(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from train.data import scan_pictures\n\n\nimport torch\n")
    assert our_imports(path) == {"train.data"}
    assert imports(path, only_at_import_time=True) == {"torch"}


def test_every_runtime_module_imports_with_torch_and_back_ends_blocked():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("runtime")]
    names = [name.removesuffix(".__init__") for name in names]
    assert "runtime.detector" in names
    program = (
        f"import sys\nfor name in {sorted(HEAVY)!r}:\n    sys.modules[name] = None\n"
        f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\nprint('imported')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "imported", done.stderr


@pytest.mark.parametrize("package", ["runtime", "train", "export", "cpp_ext"])
def test_no_module_is_a_drawer_for_everything(package):
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not {path.name for path in modules(package)} & drawers
