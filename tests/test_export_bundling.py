"""How a bundle is written: the same bytes each time, and whole whenever the program is killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_fixtures import tiny_graph, write_bundle

import export.bundling
import export.folder_swap
from export.bundling import existing_bundle, golden_content, golden_images
from export.errors import ExportError
from export.folder_swap import replaced_folder
from export.int8_kept import KEPT_FILE
from runtime.backends import open_backend
from runtime.bundle import newest_bundle, open_bundle

ROOT = Path(__file__).parents[1]
CHECKPOINT = "0" * 64


@pytest.fixture
def old_and_new(tmp_path):
    """Two bundles called "old" and "new", and the place where the old one stands as well."""
    short = {"embedding_dim": 2, "mean_trace": (0.6, 0.8)}  # manifests that are read hundreds of times
    write_bundle(tmp_path / "old", name="old", **short)
    write_bundle(tmp_path / "new", name="new", graphs={"fp32": tiny_graph(offset=1.0)}, **short)
    shutil.copytree(tmp_path / "old", tmp_path / "models" / "tiny")
    return tmp_path / "old", tmp_path / "new", tmp_path / "models" / "tiny"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(source, target):
    """The bundle in `source` written to `target`."""
    bundle = open_bundle(source)
    files = {spec.file: bundle.read(spec) for spec in bundle.manifest.files()}
    return export.bundling.write_bundle(target, bundle.manifest, files)


def states_after_kills(old_and_new, way):
    """After a kill at each line: whether it was killed, the bundle that stands there, what the next export finds."""
    command = [sys.executable, str(ROOT / "tests" / "killed_writer.py"), *map(str, old_and_new), way]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names are exchanged in one step on Linux only")
def test_killed_at_any_line_of_the_write_the_old_or_the_new_bundle_stands_there_whole(old_and_new):
    states = states_after_kills(old_and_new, "exchange")
    names = [seen for _, seen, _ in states]
    turn = names.index("new")
    assert names == ["old"] * turn + ["new"] * (len(names) - turn)
    assert len(states) > 40
    assert turn > 25
    assert [killed for killed, _, _ in states] == [True] * (len(states) - 1) + [False]


def test_where_names_cannot_be_exchanged_the_next_export_finds_the_old_bundle_again(old_and_new):
    states = states_after_kills(old_and_new, "twice")
    names = [seen for _, seen, _ in states]
    gap = [index for index, name in enumerate(names) if name.startswith("no bundle")]
    assert 1 <= len(gap) <= 4
    assert names == ["old"] * gap[0] + names[gap[0] : gap[-1] + 1] + ["new"] * (len(names) - gap[-1] - 1)
    assert [found for _, _, found in states] == ["old"] * (gap[-1] + 1) + ["new"] * (len(names) - gap[-1] - 1)


def test_an_error_in_the_middle_of_the_swap_puts_the_old_bundle_back(old_and_new, monkeypatch):
    old, new, target = old_and_new
    monkeypatch.setattr(export.folder_swap, "_exchange", lambda new, folder: False)
    real = type(target).rename

    def rename(self, to):
        if ".new-" in self.name:
            raise KeyboardInterrupt
        return real(self, to)

    monkeypatch.setattr(type(target), "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        rewrite(new, target)
    assert contents(target) == contents(old)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_a_folder_that_a_kill_left_under_its_other_name_is_back_even_when_the_next_write_fails(old_and_new):
    old, _, target = old_and_new
    target.rename(target.with_name(".tiny.old"))
    with pytest.raises(ZeroDivisionError), replaced_folder(target):
        raise ZeroDivisionError
    assert contents(target) == contents(old)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_what_is_written_wrongly_never_takes_the_place_of_the_old_bundle(old_and_new):
    old, new, target = old_and_new
    bundle = open_bundle(new)
    with pytest.raises(export.bundling.BundleError, match="SHA-256"):
        export.bundling.write_bundle(
            target, bundle.manifest, {s.file: bundle.read(s)[:-1] + b"?" for s in bundle.manifest.files()}
        )
    assert contents(target) == contents(old)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_a_full_disk_is_an_error_in_a_sentence_and_leaves_the_old_bundle(old_and_new, monkeypatch):
    old, new, target = old_and_new

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError, match="tiny: got No space left on device while it was written"):
        rewrite(new, target)
    assert contents(target) == contents(old)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_what_another_program_is_writing_is_left_alone_and_what_a_killed_one_left_is_removed(old_and_new):
    _, new, target = old_and_new
    abandoned = target.with_name(".tiny.new-abandoned")
    abandoned.mkdir()
    (abandoned / "half.onnx").write_text("half")
    mine = target.with_name(".tiny-notes")
    mine.mkdir()
    with replaced_folder(target) as held:
        (held / "manifest.json").write_text("by the other one")
        rewrite(new, target)
        assert (held / "manifest.json").read_text() == "by the other one"
        assert not abandoned.exists()
        assert mine.exists()
        shutil.copytree(new, held, dirs_exist_ok=True)
    assert sorted(path.name for path in target.parent.iterdir()) == [".tiny-notes", "tiny"]


def test_the_folder_that_a_link_leads_to_is_replaced_and_the_link_stays(old_and_new):
    _, new, target = old_and_new
    link = target.with_name("current")
    link.symlink_to(target)
    rewrite(new, link)
    assert link.is_symlink()
    assert contents(target) == contents(new)
    assert newest_bundle(target.parent).resolve() == target


def test_a_written_bundle_is_readable_for_everyone_and_has_the_same_bytes_each_time(old_and_new, tmp_path):
    _, new, target = old_and_new
    rewrite(new, target)
    rewrite(new, tmp_path / "elsewhere" / "tiny")
    assert contents(target) == contents(tmp_path / "elsewhere" / "tiny") == contents(new)
    assert target.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o444 for path in target.iterdir()} == {0o444}


def test_golden_inputs_and_outputs_have_the_same_bytes_each_time(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    backends = {"fp32": open_backend("onnxruntime", tiny_graph(), manifest, file="model.fp32.onnx")}
    first, again = (golden_content(golden_images(16, 16), backends) for _ in range(2))
    assert first == again
    assert np.load(io.BytesIO(first))["fp32.logits"].shape == (4,)


def test_an_existing_bundle_of_other_weights_is_not_kept(old_and_new):
    _, _, target = old_and_new
    assert existing_bundle(target, CHECKPOINT).manifest.name == "old"
    assert existing_bundle(target, "f" * 64) is None
    assert os.listdir(target.parent) == ["tiny"]


@pytest.mark.parametrize("manifest", ["as it is", "not one"])
def test_a_file_that_is_not_of_the_bundle_is_refused_early_and_late_and_stays(old_and_new, manifest):
    _, new, target = old_and_new
    if manifest == "not one":
        (target / "manifest.json").write_text("{}")
    (target / "MODEL_CARD.md").write_text("mine")
    before = contents(target)
    words = r"got MODEL_CARD\.md in it, .* wanted a bundle and nothing else: move that file elsewhere"
    with pytest.raises(ExportError, match=words):
        existing_bundle(target, CHECKPOINT)
    with pytest.raises(ExportError, match=words):
        rewrite(new, target)
    assert contents(target) == before
    assert os.listdir(target.parent) == ["tiny"]


def test_a_bundle_with_a_damaged_manifest_and_nothing_else_is_replaced(old_and_new):
    _, new, target = old_and_new
    (target / "manifest.json").write_text("{}")
    assert existing_bundle(target, CHECKPOINT) is None
    assert rewrite(new, target).manifest.name == "new"


_REWRITTEN = """
import hashlib, onnx
from bundle_fixtures import tiny_graph
from export.graph import float_tensors, model_bytes
from export.precision import fp16_from_fp32
from export.quantize import int8_from_fp32, plan_quantization

model = onnx.load_from_string(tiny_graph())
for index, node in enumerate(model.graph.node):
    node.name = f"{node.op_type}_{index}"
largest = dict.fromkeys(float_tensors(model), 3.0)
half = fp16_from_fp32(model, {node.name: "" for node in model.graph.node if node.op_type != "Conv"})
quantized = int8_from_fp32(model, plan_quantization(model, {}), largest)
assert [node.op_type for node in quantized.graph.node].count("QuantizeLinear") > 1
print(*(hashlib.sha256(model_bytes(graph)).hexdigest() for graph in (model, half, quantized)))
"""


def test_rewritten_graphs_have_the_same_bytes_whatever_the_order_of_sets():
    digests = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", _REWRITTEN], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.split())
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3


@pytest.mark.slow
def test_two_exports_in_fresh_processes_give_the_same_bytes_whatever_the_order_of_their_sets(tmp_path):
    from exported import EXPORT_OPTIONS, finished_run

    for seed in ("1", "2"):
        (finished_run() / KEPT_FILE).unlink(missing_ok=True)  # INT8 is searched each time
        command = ["-m", "export.trt", "--run", finished_run(), "--model", tmp_path / seed / "tiny", "--no-engine"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, *map(str, command), *EXPORT_OPTIONS], env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    first = contents(tmp_path / "1" / "tiny")
    assert {"golden.npz", "manifest.json", "model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx"} <= first.keys()
    assert first == contents(tmp_path / "2" / "tiny")
