from __future__ import annotations

import os
import stat
import zipfile

import pytest
from bundle_fixtures import write_bundle, zip_bundle

from runtime.bundle import newest_bundle, open_bundle
from runtime.errors import BundleError


def test_folder_and_zip_hold_the_same_model(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "tiny.zip")
    from_folder, from_zip = open_bundle(tiny_bundle), open_bundle(zipped)
    artifact = from_folder.manifest.artifacts[0]
    assert from_folder.manifest == from_zip.manifest
    assert from_folder.read(artifact) == from_zip.read(artifact)
    assert from_folder.path(artifact) == tiny_bundle / "model.fp32.onnx"
    assert from_zip.path(artifact) is None


def test_zip_of_the_folder_itself_is_accepted(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "tiny.zip", inside="tiny/")
    assert open_bundle(zipped).inside == "tiny/"


def test_zip_is_never_unpacked(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "only.zip")
    before = sorted(tmp_path.rglob("*"))
    bundle = open_bundle(zipped)
    bundle.read(bundle.manifest.artifacts[0])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("name", ["manifest.json", "model.fp32.onnx", "golden.npz"])
def test_flipped_byte_in_every_file_is_found(tiny_bundle, tmp_path, name, form):
    pristine = (tiny_bundle / name).read_bytes()
    for place in (0, len(pristine) // 3, len(pristine) - 1):
        damaged = bytearray(pristine)
        damaged[place] ^= 0x01
        (tiny_bundle / name).write_bytes(damaged)
        target = tiny_bundle if form == "folder" else zip_bundle(tiny_bundle, tmp_path / "damaged.zip")
        with pytest.raises(BundleError, match=name.removesuffix(".json")):
            open_bundle(target)


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("name", ["manifest.json", "model.fp32.onnx", "golden.npz"])
def test_missing_file_is_named(tiny_bundle, tmp_path, name, form):
    (tiny_bundle / name).unlink()
    target = tiny_bundle if form == "folder" else zip_bundle(tiny_bundle, tmp_path / "incomplete.zip")
    with pytest.raises(BundleError, match=name):
        open_bundle(target)


@pytest.mark.parametrize("change", [b"", b"longer"])
def test_file_of_another_size_is_refused(tiny_bundle, change):
    path = tiny_bundle / "model.fp32.onnx"
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.fp32\.onnx: got .* bytes, wanted"):
        open_bundle(tiny_bundle)


def test_file_changed_after_opening_is_found_when_read(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    path = tiny_bundle / "model.fp32.onnx"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.read(bundle.manifest.artifacts[0])


def test_link_out_of_the_folder_is_refused(tiny_bundle, tmp_path):
    path = tiny_bundle / "model.fp32.onnx"
    path.rename(tmp_path / "elsewhere.onnx")
    path.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="no regular file"):
        open_bundle(tiny_bundle)


def test_unlisted_file_is_ignored(tiny_bundle):
    (tiny_bundle / "NOTES.txt").write_text("mine")
    assert open_bundle(tiny_bundle).manifest.name == "tiny"


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "a\\..\\evil.txt", "C:/evil.txt"])
def test_zip_with_a_name_that_leaves_it_is_refused(tiny_bundle, tmp_path, name):
    zipped = zip_bundle(tiny_bundle, tmp_path / "evil.zip")
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(BundleError, match="names inside the archive"):
        open_bundle(zipped)


def test_zip_with_a_link_is_refused(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "link.zip")
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BundleError, match="the link 'link'"):
        open_bundle(zipped)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_one_name_twice_is_refused(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "twice.zip")
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr("model.fp32.onnx", "x")
    with pytest.raises(BundleError, match="one name twice"):
        open_bundle(zipped)


def test_compressed_zip_is_read(tiny_bundle, tmp_path):
    with zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in tiny_bundle.iterdir():
            archive.write(path, path.name)
    assert open_bundle(tmp_path / "small.zip").manifest.name == "tiny"


def test_entry_that_inflates_far_beyond_its_listed_size_is_not_read_whole(tiny_bundle, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tiny_bundle / "manifest.json", "manifest.json")
        archive.write(tiny_bundle / "golden.npz", "golden.npz")
        archive.writestr("model.fp32.onnx", bytes(50_000_000))
    size = (tiny_bundle / "model.fp32.onnx").stat().st_size
    with pytest.raises(BundleError, match=f"got at least {size + 1} bytes, wanted {size} bytes"):
        open_bundle(tmp_path / "bomb.zip")


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x03\x04 truncated"])
def test_file_that_is_no_zip_is_refused(tmp_path, data):
    (tmp_path / "model.zip").write_bytes(data)
    with pytest.raises(BundleError, match=r"no sound \.zip"):
        open_bundle(tmp_path / "model.zip")


def test_zip_of_two_bundles_is_refused(tiny_bundle, tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for folder in ("a", "b"):
            for path in tiny_bundle.iterdir():
                archive.write(path, f"{folder}/{path.name}")
    with pytest.raises(BundleError, match="got 2 of them"):
        open_bundle(tmp_path / "two.zip")


def test_missing_bundle_says_so(tmp_path):
    with pytest.raises(BundleError, match="nothing there"):
        open_bundle(tmp_path / "no-such")


def test_manifest_that_is_not_utf8_is_refused(tiny_bundle):
    (tiny_bundle / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleError, match="not UTF-8"):
        open_bundle(tiny_bundle)


def test_newest_bundle_is_the_one_whose_manifest_was_written_last(tmp_path):
    for age, name in enumerate(["old", "new", "older"]):
        write_bundle(tmp_path / name)
        os.utime(tmp_path / name / "manifest.json", (1000 - 100 * (age % 2), 1000 + 100 * (age % 2)))
    (tmp_path / "no-bundle").mkdir()
    assert newest_bundle(tmp_path) == tmp_path / "new"


def test_newest_bundle_may_be_a_zip(tiny_bundle, tmp_path):
    (tmp_path / "models").mkdir()
    zipped = zip_bundle(tiny_bundle, tmp_path / "models" / "m.zip")
    assert newest_bundle(tmp_path / "models") == zipped


def test_no_bundle_at_all_is_an_error(tmp_path):
    with pytest.raises(BundleError, match="name one with --model"):
        newest_bundle(tmp_path / "models")
