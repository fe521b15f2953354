"""Which pictures a collection names, and what of it is refused."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from runtime.errors import CollectionError, UsageError
from runtime.scoring.listing import lines_of, parts_of, picture_from_line, picture_to_line, write_listing
from runtime.scoring.sources import Picture, base_folder, pictures_of
from runtime.scoring.tar_shards import Member, member_part, pictures_in_shard


def names(source, **options):
    return [picture.name for picture in pictures_of(str(source), **options)]


def write_shard(path, members, **options):
    """A tar file; a member's content may be a TarInfo instead of bytes."""
    with tarfile.open(path, "w:", **options) as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_folder_gives_its_pictures_and_those_in_its_shards_sorted_and_without_hidden_ones(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.png", "a.JPG", "notes.txt", ".x.png", "deep/写真.webp", ".hidden/c.png"):
        (tmp_path / name).touch()
    write_shard(tmp_path / "c.tar", {"0.jpg": b"x", "0.json": b"{}", ".1.jpg": b"x"})
    found = names(tmp_path)
    assert [os.path.relpath(name, tmp_path) for name in found] == ["a.JPG", "b.png", "c.tar/0.jpg", "deep/写真.webp"]


def test_a_folder_that_cannot_be_read_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("gone"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match=r"gone: got a folder that cannot be read \(Permission denied\)"):
        names(tmp_path)


def test_a_list_gives_its_lines_relative_to_its_own_folder_whatever_bytes_they_hold(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa b.jpg\r\n\n/abs/ü.png\n".encode() + b"caf\xe9.jpg\na b.jpg")
    assert names(path) == ["a b.jpg", "/abs/ü.png", os.fsdecode(b"caf\xe9.jpg"), "a b.jpg"]
    assert base_folder(str(path)) == str(tmp_path)


def test_a_folder_with_the_name_of_a_list_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").mkdir()
    (tmp_path / "old.csv" / "a.png").touch()
    assert names("old.csv") == ["old.csv/a.png"]
    assert base_folder("old.csv") == str(tmp_path)


def test_a_csv_table_gives_its_column(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('label,file\n1,"a,\nb.jpg"\n0,c.jpg\n')
    assert names(path, column="file") == ["a,\nb.jpg", "c.jpg"]
    with pytest.raises(UsageError, match=r"--column path: got the columns 'label', 'file' in .*table\.csv"):
        names(path)


def test_a_parquet_table_gives_its_column(tmp_path):
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "path": ["a.jpg", "写真.png"]}), path)
    assert names(path) == ["a.jpg", "写真.png"]
    with pytest.raises(UsageError, match="--column image"):
        names(path, column="image")


def test_a_row_without_a_path_is_refused_with_its_number(tmp_path):
    (tmp_path / "table.csv").write_text("label,path\n1,a.jpg\n0\n")
    with pytest.raises(CollectionError, match=r"table\.csv, row 3: got None"):
        names(tmp_path / "table.csv")
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.jpg", None]}), tmp_path / "table.parquet")
    with pytest.raises(CollectionError, match=r"table\.parquet, row 2: got None"):
        names(tmp_path / "table.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"path": [7]}), tmp_path / "table.parquet")
    with pytest.raises(CollectionError, match="got 7, wanted the path of a picture"):
        names(tmp_path / "table.parquet")


@pytest.mark.parametrize(("name", "data"), [("t.parquet", b"PAR1 nonsense"), ("t.csv", b'path\n"' + b"x" * 200_000)])
def test_a_damaged_table_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CollectionError, match="a file that cannot be read"):
        names(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone", "nothing there"), ("a.tar.gz", "decompress them first"), ("a.jpg", "`ntf predict` scores single")],
)
def test_a_source_of_no_known_kind_is_refused(tmp_path, name, message):
    if name != "gone":
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"wanted a folder, list.*|{message}") as refused:
        names(tmp_path / name)
    assert message in str(refused.value)


# Shards


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_where_they_lie(tmp_path, form):
    content = {f"{'long/' * 30 if form != tarfile.USTAR_FORMAT else ''}{n}.png": bytes([n]) * n for n in range(1, 5)}
    shard = write_shard(tmp_path / "a.tar", {"folder": special("folder", tarfile.DIRTYPE), **content}, format=form)
    assert {m.name: member_part(str(shard), m).read() for m in pictures_in_shard(str(shard))} == content


def test_a_list_may_name_shards(tmp_path):
    write_shard(tmp_path / "a.tar", {"1.png": b"x"})
    (tmp_path / "list.txt").write_text("a.tar\nb.png\n")
    assert names(tmp_path / "list.txt") == ["a.tar/1.png", "b.png"]


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "a\\evil.png"])
def test_a_name_that_leaves_the_shard_is_refused(tmp_path, name):
    shard = write_shard(tmp_path / "a.tar", {name: b"x"})
    with pytest.raises(CollectionError, match="wanted names inside the archive"):
        list(pictures_in_shard(str(shard)))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_special_member_with_a_picture_s_name_is_refused(tmp_path, kind):
    shard = write_shard(tmp_path / "a.tar", {"a.png": special("a.png", kind, "/etc/passwd")})
    with pytest.raises(CollectionError, match=r"'a\.png', which is a link or another special file"):
        list(pictures_in_shard(str(shard)))


def test_a_shard_that_is_cut_short_or_damaged_is_refused_wherever_it_is(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {"1.png": b"x" * 700, "2.png": b"y"})
    whole = shard.read_bytes()
    cuts = [whole[:length] for length in (0, 100, 512, 800, 1536, 1800, 2560)]
    damaged = [whole[: at + 10] + b"\xff" + whole[at + 11 :] for at in (0, 1536)]  # in the headers
    for data in cuts + damaged:
        shard.write_bytes(data)
        with pytest.raises(CollectionError, match=r"a\.tar: got a file that"):
            list(pictures_in_shard(str(shard)))


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(CollectionError, match="wanted a whole, uncompressed tar file"):
        list(pictures_in_shard(str(tmp_path / "a.tar")))


def test_a_shard_that_changed_since_it_was_listed_is_refused(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {"1.png": b"x" * 700})
    (member,) = pictures_in_shard(str(shard))
    shard.write_bytes(shard.read_bytes()[:900])
    with pytest.raises(CollectionError, match=r"ends within '1\.png'"):
        member_part(str(shard), member)
    shard.unlink()
    with pytest.raises(CollectionError, match="cannot be read"):
        member_part(str(shard), member)


# Listings


def test_a_listing_comes_back_whatever_the_names_are(tmp_path):
    pictures = [
        Picture("a b.png"), Picture("line\nbreak\u2028.png"), Picture(os.fsdecode(b"caf\xe9.jpg")),
        Picture("s.tar/写真.png", "s.tar", Member("写真.png", 512, 7)),
    ]  # fmt: skip
    spec = write_listing(tmp_path / "listing", pictures)
    assert [picture_from_line(line) for line in lines_of(tmp_path / "listing")] == pictures
    assert spec.pictures == 4
    assert write_listing(tmp_path / "again", pictures).sha256 == spec.sha256
    assert write_listing(tmp_path / "again", pictures[::-1]).sha256 != spec.sha256


def test_parts_hold_every_line_once_in_order(tmp_path):
    write_listing(tmp_path / "listing", (Picture(str(n)) for n in range(7)))
    parts = {number: [*map(picture_from_line, lines)] for number, lines in parts_of(tmp_path / "listing", 3, {0, 2})}
    assert parts == {0: [Picture("0"), Picture("1"), Picture("2")], 2: [Picture("6")]}


def test_a_large_listing_is_never_in_memory(tmp_path):
    tracemalloc.start()
    try:
        write_listing(tmp_path / "listing", (Picture(f"folder/{n:060}.jpg") for n in range(10_000)))
        count = sum(1 for _, lines in parts_of(tmp_path / "listing", 1000, set(range(10))) for _ in lines)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert (tmp_path / "listing").stat().st_size > 700_000
    assert peak < 300_000


def test_a_line_is_ascii():
    assert picture_to_line(Picture("写真.png", "ü.tar", Member("x", 1, 2))).isascii()
