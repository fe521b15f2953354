"""Pictures, bundles and shards that somebody made wrong on purpose: refused by name, in bounded time and memory."""

from __future__ import annotations

import ast
import io
import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest
from bundle_fixtures import tiny_graph, write_bundle
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from benchmarks import fuzz
from benchmarks.fuzz_targets import sealed_manifest, targets
from benchmarks.mutation import mutated_bytes, mutated_json, mutated_zip, with_png_checksums
from runtime import Detector
from runtime.bundle import open_bundle
from runtime.decode import decode_picture
from runtime.errors import BundleError, PictureError
from runtime.golden import check_golden
from runtime.manifest import manifest_from_json
from runtime.onnx_guard import require_self_contained

ROOT = Path(__file__).parents[1]
TARGETS = ("pictures", "manifest", "bundle-zip", "bundle-folder", "graph", "golden", "shard", "server")
# What one input may take in a test, however busy the machine is; the slowest of a fuzz run is in its report.
LONGEST_S = 10
NUMBERS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    by_name = {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}
    yield by_name
    by_name["server"].read.close()


@pytest.mark.parametrize("name", TARGETS)
def test_every_valid_seed_is_read(fuzzed, name):
    target = fuzzed[name]
    # What is read from the folder is chosen by a hash; its own seed has a link in the place of the graph.
    expected = "BundleError" if name == "bundle-folder" else "accepted"
    assert {target.outcome(seed) for seed in target.seeds} == {expected}


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=NUMBERS, place=NUMBERS)
def test_whatever_is_made_wrong_is_read_or_refused_by_name(fuzzed, name, seed, place):
    target = fuzzed[name]
    mutant = target.mutate(target.seeds[place % len(target.seeds)], Random(seed))
    started = time.monotonic()
    target.outcome(mutant)  # raises whatever is no refusal
    assert time.monotonic() - started < LONGEST_S


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.binary(max_size=200))
@example(b"\x89PNG\r\n\x1a\n")
@example(b"GIF89a\xff\xff\xff\xff\x80\x00\x00")
@example(b"BM" + b"\xff" * 60)
@example(b"II*\0\x08\0\0\0\xff\xff")
@example(b"RIFF\xff\xff\xff\x7fWEBPVP8X")
@example(b"P6 99999999999999999999 1 255\n")
def test_any_bytes_are_no_picture(data):
    with pytest.raises(PictureError):
        decode_picture(data)


# Pictures


def png(width, height, *chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in [(b"IHDR", header), *chunks, (b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_picture_whose_text_inflates_without_end_takes_no_memory(kind):
    bomb = zlib.compress(bytes(20_000_000), 1)
    data = png(4, 4, (kind, b"a\0\0" + bomb), (b"IDAT", zlib.compress(bytes(4 * 13))))
    tracemalloc.start()
    try:
        with pytest.raises(PictureError, match="damaged data"):
            decode_picture(data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_pixels_that_inflate_beyond_the_picture_are_not_kept():
    data = png(4, 4, (b"IDAT", zlib.compress(bytes(20_000_000), 1)))
    assert decode_picture(data).shape == (4, 4, 3)


# Bundles


def resealed(folder, change):
    """Changes what a manifest says and gives it the hash that it should have."""
    plain = json.loads((folder / "manifest.json").read_text())
    change(plain)
    (folder / "manifest.json").write_bytes(sealed_manifest(plain))
    return folder


@pytest.mark.parametrize("size", [0, -16, 4097, 10**30])
def test_a_manifest_with_an_input_of_an_impossible_size_is_refused(tiny_bundle, size):
    resealed(tiny_bundle, lambda plain: plain["preprocess"].update(height=size))
    with pytest.raises(BundleError, match=r"manifest\.preprocess: got an input of .* wanted height and width of 1 to"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("size", [10**15, 10**30])
def test_a_file_that_claims_to_be_huge_is_not_given_the_memory(tiny_bundle, size):
    resealed(tiny_bundle, lambda plain: plain["artifacts"][0].update(size_bytes=size))
    with pytest.raises(BundleError, match=rf"model\.fp32\.onnx: got at least \d+ bytes, wanted {size} bytes"):
        open_bundle(tiny_bundle)


def test_a_manifest_with_half_a_surrogate_pair_is_refused():
    with pytest.raises(BundleError, match="does not match its own manifest_sha256"):
        write_and_read_name("\ud800")


def write_and_read_name(name):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_bundle(folder)
        plain = json.loads((Path(folder) / "manifest.json").read_text()) | {"name": name}
        return manifest_from_json(json.dumps(plain, sort_keys=True, indent=1) + "\n")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
@pytest.mark.parametrize("name", ["manifest.json", "golden.npz"])
def test_what_is_no_plain_file_in_a_folder_is_refused_without_opening_it(tiny_bundle, tmp_path, name, kind):
    path = tiny_bundle / name
    path.rename(tmp_path / name)
    {"link": lambda: path.symlink_to(tmp_path / name), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(BundleError, match=rf"{name}: got something that is no regular file"):
        open_bundle(tiny_bundle)


def test_an_archive_that_is_made_of_next_to_nothing_is_refused(tiny_bundle, tmp_path):
    resealed(tiny_bundle, lambda plain: plain["artifacts"][0].update(size_bytes=50_000_000))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tiny_bundle / "manifest.json", "manifest.json")
        archive.writestr("model.fp32.onnx", bytes(50_000_000))
    with pytest.raises(BundleError, match=r"model\.fp32\.onnx: got \d+ bytes that inflate to 50000000"):
        open_bundle(tmp_path / "bomb.zip")


def golden_bundle(folder, entries, *, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    from dataclasses import replace
    from hashlib import sha256

    from runtime.manifest import save_manifest

    manifest = write_bundle(folder)
    data = stream.getvalue()
    (folder / "golden.npz").write_bytes(data)
    golden = replace(manifest.golden, sha256=sha256(data).hexdigest(), size_bytes=len(data))
    save_manifest(replace(manifest, golden=golden), folder)
    return open_bundle(folder)


def npy(header, data=b""):
    text = header.encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': ({},), }}"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"images.npy": bytes(3_000_000)}, "3000000 bytes of arrays, more than 2000000"),
        ({"images.npy": npy(HEADER.format("|u1", "10**15"))}, "cannot be read"),
        ({"images.npy": npy(HEADER.format("|u1", "9999999999999"))}, "0 bytes for an"),
        ({"images.npy": npy(HEADER.format("|O", "1"), b"cos\nsystem\n")}, "type object"),
        ({"images.npy": npy("{'descr': ('a', [")}, "cannot be read"),
        ({"images.npy": b"no array"}, "magic string is not correct"),
        ({"images.npy": npy(HEADER.format("<U1", "4"), bytes(16)),
          "fp32.logits.npy": npy(HEADER.format("<U1", "4"), bytes(16))}, "type <U1"),
    ],
)  # fmt: skip
def test_golden_inputs_that_are_made_to_do_harm_are_refused(tmp_path, monkeypatch, entries, message):
    monkeypatch.setattr("runtime.golden._MAX_INFLATED_BYTES", 2_000_000)
    bundle = golden_bundle(tmp_path / "m", entries)
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=message):
            check_golden(bundle, None, "fp32")
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_golden_inputs_are_stored_or_deflated(tmp_path, method):
    bundle = golden_bundle(tmp_path / "m", {"images.npy": bytes(1000)}, method=method)
    with pytest.raises(BundleError, match="neither stored nor deflated"):
        check_golden(bundle, None, "fp32")


def outside(model, place):
    """Moves the data of a tensor into another file, as far as the graph says."""
    places = {
        "initializer": lambda: model.graph.initializer,
        "attribute": lambda: [_constant(model)],
        "default of a function": lambda: [_default_of_a_function(model)],
    }
    for tensor in places[place]():
        if tensor.raw_data:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            entry = tensor.external_data.add()
            entry.key, entry.value = "location", "secret.bin"
            return model.SerializeToString()
    raise AssertionError("no tensor with raw data")


def _constant(model):
    node = helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(np.ones(3, np.float32)))
    inner = helper.make_graph([node], "inner", [], [])
    branch = helper.make_node("If", ["c"], ["d"], then_branch=inner, else_branch=inner)
    model.graph.node.append(branch)
    return model.graph.node[-1].attribute[0].g.node[0].attribute[0].t


def _default_of_a_function(model):
    function = model.functions.add(name="f", domain="ours")
    value = helper.make_attribute("value", onnx.numpy_helper.from_array(np.ones(3, np.float32)))
    function.attribute_proto.append(value)
    return function.attribute_proto[0].t


@pytest.mark.parametrize("place", ["initializer", "attribute", "default of a function"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_asks_for_another_file_is_refused_before_a_back_end_sees_it(tmp_path, monkeypatch, place, backend):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(4 * 8 * 3 * 4 * 4))
    graph = outside(onnx.load_from_string(tiny_graph()), place)
    write_bundle(tmp_path / "m", graphs={"fp32": graph})
    with pytest.raises(BundleError, match=r"model\.fp32\.onnx: got a graph that has data in another file"):
        Detector.load(tmp_path / "m", backend=backend)


def test_a_graph_that_wraps_a_compiled_one_is_refused():
    graph = helper.make_graph([helper.make_node("EPContext", [], ["a"], domain="com.microsoft")], "g", [], [])
    with pytest.raises(BundleError, match="what another program compiled"):
        require_self_contained(helper.make_model(graph).SerializeToString(), "m.onnx")


@pytest.mark.parametrize(
    "data",
    [b"\x3a", b"\x3a\xff", b"\x3a\x05abc", b"\x38\x01", b"\x3b", b"\xff" * 11, b"\xba\x80\x80\x80\x10\x00", b"<?xml "],
)
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(BundleError, match="a file that is no ONNX graph"):
        require_self_contained(data, "m.onnx")


def test_nothing_in_the_runtime_unpickles_or_evaluates():
    forbidden_modules = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
    forbidden_calls = {"eval", "exec", "compile", "__import__"}
    files = sorted((ROOT / "runtime").rglob("*.py"))
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not imported(node) & forbidden_modules, path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in forbidden_calls, f"{path}: {name}"
                assert not name.endswith("torch.load"), path
                if name in ("np.load", "numpy.load"):
                    assert "allow_pickle=False" in ast.unparse(node), path


def imported(node):
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    return {(node.module or "").partition(".")[0]} if isinstance(node, ast.ImportFrom) else set()


# What makes inputs wrong, and the run


def test_the_same_state_gives_the_same_mutant_and_most_mutants_differ_from_their_seed():
    data = bytes(range(256))
    assert [mutated_bytes(data, Random(n)) for n in range(50)] == [mutated_bytes(data, Random(n)) for n in range(50)]
    assert sum(mutated_bytes(data, Random(n)) != data for n in range(100)) > 90
    value = {"a": [1, {"b": "text"}], "c": None}
    assert mutated_json(value, Random(3)) == mutated_json(value, Random(3))
    assert sum(mutated_json(value, Random(n)) != value for n in range(100)) > 80
    assert value == {"a": [1, {"b": "text"}], "c": None}


def test_checksums_of_a_changed_png_are_put_right():
    data = png(3, 2, (b"IDAT", zlib.compress(bytes(2 * 10))))
    changed = bytearray(data)
    changed[19] = 4  # the width
    assert with_png_checksums(bytes(changed)) == png(4, 2, (b"IDAT", zlib.compress(bytes(2 * 10))))
    assert with_png_checksums(data) == data
    assert with_png_checksums(b"BM" + data) == b"BM" + data


def test_wrong_archives_are_wrong_in_every_way(tiny_bundle):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in sorted(tiny_bundle.iterdir()):
            archive.write(path, path.name)
    found = set()
    for seed in range(80):
        with zipfile.ZipFile(io.BytesIO(mutated_zip(stream.getvalue(), Random(seed)))) as archive:
            infos = archive.infolist()
            found |= {"leaves" for info in infos if ".." in info.filename or info.filename.startswith("/")}
            found |= {"link" for info in infos if (info.external_attr >> 16) & 0o170000 == 0o120000}
            found |= {"method" for info in infos if info.compress_type > 8}
            found |= {"huge" for info in infos if info.file_size > 1 << 19}
            found |= {"twice"} if len({info.filename for info in infos}) < len(infos) else set()
    assert found == {"leaves", "link", "method", "huge", "twice"}


class Ended(Exception):
    pass


def test_a_run_counts_every_input_and_ends_at_a_finding(tmp_path, fuzzed, monkeypatch):
    def end(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    options = fuzz.Options(inputs=3, out=tmp_path / "result.json", target="graph")
    tally = fuzz._Tally(fuzzed["graph"], options)
    tally(fuzzed["graph"].seeds[0])
    tally(b"no graph")
    with pytest.raises(Ended, match="0"):
        tally(b"no graph")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["inputs"], result["outcomes"]) == (3, {"accepted": 1, "BundleError": 2})
    monkeypatch.setattr("benchmarks.fuzz_targets.require_self_contained", lambda data, file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tally(b"no graph")


@pytest.mark.slow
def test_the_command_writes_a_report_of_what_it_did(tmp_path):
    out = tmp_path / "fuzz.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", "--inputs", "300", "--target", "graph", "--out", str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert (report["inputs"], report["findings"]) == (300, 0)
    assert sum(report["targets"][0]["outcomes"].values()) == 300
    assert "300 inputs, 0 findings" in done.stdout
