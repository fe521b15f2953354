"""The table of what each TensorRT has, against the modules themselves where they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorrt_fakes import fake_tensorrt

import export
from export.engine import EngineSettings, check_settings
from export.engine_flavours import FLAVOURS, INSTALL, TensorRT, find_tensorrt, flavour_of, flavours_markdown
from export.errors import ExportError
from runtime.errors import BackendError

DEPLOY = Path(export.__file__).parents[1] / "docs" / "deploy.md"


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match=r"no module that imports .*tensorrt_rtx") as caught:
        find_tensorrt()
    assert caught.value.remedy == INSTALL


def test_a_stub_of_tensorrt_is_passed_over(monkeypatch):
    class Stub:
        pass

    class Working:
        __version__ = "1.9"

    monkeypatch.setitem(sys.modules, "tensorrt", Stub())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Working())
    found = find_tensorrt()
    assert (found.flavour.kind, found.version, found.builder) == ("rtx", "1.9", "tensorrt_rtx 1.9")


@pytest.mark.parametrize("version", ["8.6.1", "12.0", "1.0"])
def test_a_version_that_the_table_does_not_have_is_refused(version):
    with pytest.raises(ExportError, match=rf"tensorrt: got version {version}, .* one of TensorRT 10, TensorRT 11"):
        flavour_of("tensorrt", version)


@pytest.mark.parametrize("major", [10, 11])
def test_the_rows_of_tensorrt_say_what_its_module_has(major):
    trt = fake_tensorrt(major)
    row = flavour_of("tensorrt", trt.__version__)
    assert (row.major, row.kind, row.lacks) == (major, "trt", {})
    assert row.typing_flag == ("STRONGLY_TYPED" in trt.NetworkDefinitionCreationFlag.__members__)
    assert row.precision_flags == ("FP16" in trt.BuilderFlag.__members__)


def test_the_row_of_tensorrt_rtx_says_what_its_module_has():
    rtx = pytest.importorskip("tensorrt_rtx")
    row = flavour_of("tensorrt_rtx", rtx.__version__)
    assert row.kind == "rtx"
    assert row.typing_flag == ("STRONGLY_TYPED" in rtx.NetworkDefinitionCreationFlag.__members__)
    assert row.precision_flags == ("FP16" in rtx.BuilderFlag.__members__)
    assert row.validity_check == hasattr(rtx.Runtime, "get_engine_validity")


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        (
            EngineSettings(version_compatible=True),
            "--version-compatible: got .*1.7, where its engines fit one release",
        ),
        (EngineSettings(hardware_compatible=True), "--hardware-compatible: got .*--target portable covers every GPU"),
        (EngineSettings(timing_cache=Path("times")), "--timing-cache: got .*it times nothing when it builds"),
    ],
)
def test_what_a_flavour_lacks_is_refused_with_the_reason(settings, option):
    with pytest.raises(ExportError, match=option):
        check_settings(TensorRT(None, FLAVOURS[-1], "1.7"), settings)
    check_settings(TensorRT(None, FLAVOURS[0], "10.9"), settings)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_workspace_of_nothing_is_refused(flavour):
    with pytest.raises(ExportError, match="--workspace-mib: got 0 MiB, wanted at least 1 MiB"):
        check_settings(TensorRT(None, flavour, "1"), EngineSettings(workspace_mib=0))


def test_the_document_shows_the_table_as_it_is():
    assert flavours_markdown() in DEPLOY.read_text(encoding="utf-8")
