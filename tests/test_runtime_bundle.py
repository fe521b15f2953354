"""Bundles as folders and .zip files: what is found and refused when they are opened, and the packed form."""

from __future__ import annotations

import os
import random
import shutil
import stat
import struct
import zipfile
from contextlib import contextmanager

import pytest
from bundle_fixtures import write_bundle, zip_bundle
from PIL import Image

from runtime import Detector
from runtime.bundle import newest_bundle, open_bundle, pack_bundle
from runtime.cli import main
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


@contextmanager
def changed_byte(path, place):
    """The file with one byte changed, in a way that depends on the place alone."""
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, place)[0]
        os.pwrite(file.fileno(), bytes([byte ^ random.Random(place).randrange(1, 256)]), place)
        yield
        os.pwrite(file.fileno(), bytes([byte]), place)


def some_places(data):
    """First, middle, last and a dozen drawn places of a file."""
    return sorted({0, len(data) // 2, len(data) - 1, *random.Random(1).sample(range(len(data)), 12)})


def assert_every_flip_is_found(path, places, target):
    """`open_bundle(target)` fails with each of these bytes of `path` changed, and works again without."""
    for place in places:
        with changed_byte(path, place):
            try:
                open_bundle(target)
            except BundleError:
                continue
            pytest.fail(f"byte {place} of {path.name} was changed and the bundle opened")
    open_bundle(target)


def test_every_single_changed_byte_of_the_manifest_is_found(tmp_path):
    # A trace of two values: digits are digits, and a hundred more of them take seconds.
    write_bundle(tmp_path / "tiny", embedding_dim=2, mean_trace=(0.6, 0.8))
    path = tmp_path / "tiny" / "manifest.json"
    assert_every_flip_is_found(path, range(path.stat().st_size), tmp_path / "tiny")


def test_a_changed_byte_in_any_file_of_the_folder_is_found(tiny_bundle):
    listed = {spec.file for spec in open_bundle(tiny_bundle).manifest.files()}
    assert {path.name for path in tiny_bundle.iterdir()} == {"manifest.json", *listed}
    for name in listed:
        path = tiny_bundle / name
        assert_every_flip_is_found(path, some_places(path.read_bytes()), tiny_bundle)


def test_a_changed_byte_anywhere_in_a_packed_bundle_is_found_headers_included(tiny_bundle, tmp_path):
    packed = pack_bundle(tiny_bundle, tmp_path / "tiny.zip").location
    data = packed.read_bytes()
    with zipfile.ZipFile(packed) as archive:
        starts = [info.header_offset for info in archive.infolist()]
        directory = archive.start_dir
    headers = {place for start in starts for place in range(start, start + 60)} | set(range(directory, len(data)))
    assert_every_flip_is_found(packed, sorted(headers | set(some_places(data))), packed)


def test_a_changed_byte_of_any_file_in_a_zip_made_by_hand_is_found(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "tiny.zip")
    content = zipped.read_bytes()
    places = []
    for path in tiny_bundle.iterdir():
        data = path.read_bytes()
        places += [content.index(data) + place for place in some_places(data)]
    assert_every_flip_is_found(zipped, places, zipped)


@pytest.mark.parametrize("name", ["manifest.json", "model.fp32.onnx", "golden.npz"])
def test_the_error_for_a_changed_byte_names_the_file(tiny_bundle, name):
    with (
        changed_byte(tiny_bundle / name, (tiny_bundle / name).stat().st_size // 3),
        pytest.raises(BundleError, match=name.removesuffix(".json")),
    ):
        open_bundle(tiny_bundle)


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


def bomb(bundle, target):
    """A .zip of the bundle in which zeros that inflate to 50 MB stand for the graph."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(bundle / "manifest.json", "manifest.json")
        archive.write(bundle / "golden.npz", "golden.npz")
        archive.writestr("model.fp32.onnx", bytes(50_000_000))
    return target


def claim_size(zipped, name, size):
    """Change what the archive's directory says of the size of an entry."""
    data = bytearray(zipped.read_bytes())
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(name.encode()))
    struct.pack_into("<I", data, start + 24, size)
    zipped.write_bytes(data)


def test_an_entry_that_claims_more_than_the_manifest_says_is_refused_unread(tiny_bundle, tmp_path, monkeypatch):
    size = (tiny_bundle / "model.fp32.onnx").stat().st_size
    zipped = bomb(tiny_bundle, tmp_path / "bomb.zip")
    opened = []
    real = zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, name, *a: opened.append(name) or real(self, name, *a))
    with pytest.raises(BundleError, match=f"got an entry of 50000000 bytes, wanted at most {size} bytes"):
        open_bundle(zipped)
    assert {"manifest.json"} <= set(opened) <= {"manifest.json", "golden.npz"}


def test_an_entry_that_inflates_beyond_what_it_claims_is_refused(tiny_bundle, tmp_path):
    zipped = bomb(tiny_bundle, tmp_path / "bomb.zip")
    claim_size(zipped, "model.fp32.onnx", (tiny_bundle / "model.fp32.onnx").stat().st_size)
    with pytest.raises(BundleError, match="damaged data"):
        open_bundle(zipped)


def test_an_entry_that_claims_gigabytes_is_refused_even_if_nothing_asks_for_it(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "huge.zip")
    with zipfile.ZipFile(zipped, "a") as archive:
        info = zipfile.ZipInfo("notes.txt")
        archive.writestr(info, "x")
        info.file_size = 5 << 30
    with pytest.raises(BundleError, match=r"'notes.txt', which claims 5368709120 bytes"):
        open_bundle(zipped)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_an_unusual_compression_is_refused(tiny_bundle, tmp_path, method):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", method) as archive:
        for path in tiny_bundle.iterdir():
            archive.write(path, path.name)
    with pytest.raises(BundleError, match="stored or deflated"):
        open_bundle(tmp_path / "odd.zip")


def test_a_zip_with_a_device_in_it_is_refused(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "device.zip")
    info = zipfile.ZipInfo("null")
    info.external_attr = (stat.S_IFCHR | 0o666) << 16
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.writestr(info, "")
    with pytest.raises(BundleError, match="'null', which is no regular file"):
        open_bundle(zipped)


def test_a_zip_with_more_behind_its_end_is_refused(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "more.zip")
    zipped.write_bytes(zipped.read_bytes() + b"and more")
    with pytest.raises(BundleError, match="bytes behind the end"):
        open_bundle(zipped)


def test_a_zip_with_a_comment_that_is_no_seal_is_refused(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "comment.zip")
    with zipfile.ZipFile(zipped, "a") as archive:
        archive.comment = b"made by hand"
    with pytest.raises(BundleError, match="a comment that is no seal"):
        open_bundle(zipped)


def test_an_encrypted_entry_is_refused(tiny_bundle, tmp_path):
    zipped = zip_bundle(tiny_bundle, tmp_path / "locked.zip")
    data = bytearray(zipped.read_bytes())
    with zipfile.ZipFile(zipped) as archive:
        info, directory = archive.infolist()[0], archive.start_dir
    data[info.header_offset + 6] |= 1
    data[directory + 8] |= 1
    zipped.write_bytes(data)
    with pytest.raises(BundleError, match=r"no sound \.zip"):
        open_bundle(zipped)


def test_packing_gives_the_same_bytes_whatever_the_age_and_order_of_the_files(tiny_bundle, tmp_path):
    first = pack_bundle(tiny_bundle, tmp_path / "first.zip").location
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(tiny_bundle.iterdir(), reverse=True):
        shutil.copyfile(path, copy / path.name)
        os.utime(copy / path.name, (1_000_000_000, 1_000_000_000))
        (copy / path.name).chmod(0o600)
    (copy / "NOTES.txt").write_text("mine")
    again = pack_bundle(copy, tmp_path / "again.zip").location
    repacked = pack_bundle(first, tmp_path / "repacked.zip").location
    assert first.read_bytes() == again.read_bytes() == repacked.read_bytes()
    assert first.stat().st_mode & 0o777 == 0o644
    with zipfile.ZipFile(first) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_packed_bundle_scores_like_its_folder_and_leaves_nothing_beside_it(tiny_bundle, tmp_path):
    (tmp_path / "out").mkdir()
    packed = pack_bundle(tiny_bundle, tmp_path / "out" / "tiny.zip").location
    picture = [tmp_path / "picture.png"]
    Image.new("RGB", (20, 20), (200, 90, 30)).save(picture[0])
    with Detector.load(packed, backend="onnxruntime") as zipped, Detector.load(tiny_bundle, backend="onnxruntime") as d:
        assert zipped.predict(picture)[0].fake_probability == d.predict(picture)[0].fake_probability
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.zip"]


def test_packing_replaces_an_older_bundle_even_a_damaged_one(tiny_bundle, tmp_path):
    packed = pack_bundle(tiny_bundle, tmp_path / "tiny.zip").location
    whole = packed.read_bytes()
    packed.write_bytes(whole.replace(b"0", b"1", 1))
    assert pack_bundle(tiny_bundle, packed).location.read_bytes() == whole


def test_packing_does_not_overwrite_what_is_no_bundle(tiny_bundle, tmp_path):
    (tmp_path / "notes.zip").write_text("mine")
    with pytest.raises(BundleError, match=r"no sound \.zip.* wanted a new name, or an earlier bundle"):
        pack_bundle(tiny_bundle, tmp_path / "notes.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("thesis.txt", "mine")
    with pytest.raises(BundleError, match="an archive that is no bundle"):
        pack_bundle(tiny_bundle, tmp_path / "other.zip")
    with pytest.raises(BundleError, match=r"a name that ends in \.zip"):
        pack_bundle(tiny_bundle, tmp_path / "tiny.tar")
    assert (tmp_path / "notes.zip").read_text() == "mine"


def test_a_packing_that_fails_leaves_the_older_bundle_and_nothing_else(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    packed = pack_bundle(tiny_bundle, tmp_path / "out" / "tiny.zip").location
    whole = packed.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left on device"):
        pack_bundle(tiny_bundle, packed)
    assert packed.read_bytes() == whole
    assert [path.name for path in packed.parent.iterdir()] == ["tiny.zip"]


def test_ntf_pack_writes_the_zip_and_says_where(tiny_bundle, tmp_path, capsys):
    assert main(["pack", str(tiny_bundle)]) == 0
    packed = tiny_bundle.with_name("tiny.zip")
    assert str(packed) in capsys.readouterr().out
    assert open_bundle(packed).manifest == open_bundle(tiny_bundle).manifest
    assert main(["pack", str(tiny_bundle), str(tmp_path / "elsewhere.zip")]) == 0
    assert (tmp_path / "elsewhere.zip").read_bytes() == packed.read_bytes()
    assert main(["pack", str(tmp_path / "none")]) == 2
    assert "nothing there" in capsys.readouterr().err


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


def test_what_a_killed_export_left_is_not_the_newest_bundle(tiny_bundle, tmp_path):
    write_bundle(tmp_path / "models" / "whole")
    write_bundle(tmp_path / "models" / ".whole-a1b2c3")
    zip_bundle(tiny_bundle, tmp_path / "models" / ".m.zip")
    assert newest_bundle(tmp_path / "models") == tmp_path / "models" / "whole"


def test_no_bundle_at_all_is_an_error(tmp_path):
    with pytest.raises(BundleError, match="name one with --model"):
        newest_bundle(tmp_path / "models")
