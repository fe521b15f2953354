"""The build: what it chooses, what it refuses, and that an earlier library survives whatever goes wrong."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cpp_ext import build as builder
from cpp_ext import ops
from cpp_ext import toolchain as toolchains
from cpp_ext.build import build, compile_steps, main
from cpp_ext.library import (
    FOLDER,
    LIBRARY_FILE,
    RECORD_FILE,
    BuildError,
    BuildRecord,
    library_problem,
    loadable_record,
    read_record,
    source_hashes,
)
from cpp_ext.toolchain import DEFAULT_CUDA_ARCHS, NoCompilerError, Toolchain, find_toolchain

ROOT = Path(__file__).parents[1]
FIELDS = [field.name for field in dataclasses.fields(BuildRecord)]
VARIABLES = ("CXX", "CUDACXX", "NVCC", "CUDA_HOME", "NTF_CUDA_ARCHS")

# Stands in for a C++ compiler: writes the name of each source, or of all objects, into its output.
COMPILER = """#!/bin/sh
echo run >> {calls}
for word in "$@"; do
  case "$word" in *.cpp) grep -q BROKEN "$word" && {{ echo "error: expected unqualified-id" >&2; exit 1; }} ;; esac
  [ "$before" = -o ] && output="$word"
  before="$word"
done
echo "$@" > "$output"
"""
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "nvcc: NVIDIA (R) Cuda compiler driver"; echo "Cuda compilation tools, release {release}, V1" ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
esac
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def calls(tmp_path):
    return tmp_path / "calls"


@pytest.fixture
def package(tmp_path):
    """A folder like the package's, with sources of every kind."""
    folder = tmp_path / "package"
    (folder / "csrc").mkdir(parents=True)
    (folder / "build.py").write_text("flags")
    (folder / "toolchain.py").write_text("targets")
    for name in ("loss.h", "loss.cpp", "loss_cpu_tiles.cpp", "loss_cuda.cpp", "loss.cu", "loss_tiles.cuh"):
        (folder / "csrc" / name).write_text(f"// {name}")
    return folder


@pytest.fixture
def toolchain(tmp_path, calls, monkeypatch):
    """The real torch and a compiler that only pretends; no CUDA."""
    monkeypatch.setenv("CXX", str(executable(tmp_path / "bin" / "pretending-c++", COMPILER.format(calls=calls))))
    monkeypatch.setattr(toolchains, "_first_line", lambda command: "pretending 1.0")
    return find_toolchain(cpu_only=True)


def with_cuda(toolchain, monkeypatch, nvcc, archs=None):
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(toolchains, "find_torch", lambda: dataclasses.replace(toolchain.torch, cuda="13.0"))
    return find_toolchain(cuda_archs=archs)


def test_compiled_library_has_a_record_and_leaves_nothing_else(package, toolchain, calls):
    record = build(toolchain, package)
    assert library_problem(package) is None
    assert read_record(package) == record
    assert record.sources_sha256 == source_hashes(package)
    assert set(record.sources_sha256) == {
        "build.py",
        "toolchain.py",
        *(f"csrc/{p.name}" for p in (package / "csrc").iterdir()),
    }
    assert record.cpu_only_reason == "--cpu-only"
    assert {path.name for path in package.iterdir()} == {"build.py", "toolchain.py", "csrc", LIBRARY_FILE, RECORD_FILE}
    # loss.cpp, the tiles once for each instruction set, and the link.
    assert len(calls.read_text().splitlines()) == 2 + len(toolchain.instruction_sets)


def test_second_build_does_nothing_and_says_so(package, toolchain, calls, capsys):
    build(toolchain, package)
    before = calls.read_text()
    capsys.readouterr()
    build(toolchain, package)
    assert calls.read_text() == before
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda package: (package / "csrc" / "loss.h").write_text("// other"),
        lambda package: (package / "csrc" / "new.h").write_text("// new"),
        lambda package: (package / "csrc" / "loss_tiles.cuh").unlink(),
        lambda package: (package / "build.py").write_text("other flags"),
        lambda package: (package / "toolchain.py").write_text("other targets"),
    ],
    ids=["changed", "added", "removed", "flags", "targets"],
)
def test_library_of_other_sources_is_stale_and_built_again(package, toolchain, change):
    build(toolchain, package)
    change(package)
    assert "a stale library" in library_problem(package)
    build(toolchain, package)
    assert library_problem(package) is None


@pytest.mark.parametrize("name", [".loss.cpp.swp", "loss.cpp~", "#loss.cu#", "loss.txt"])
def test_file_that_is_no_source_changes_nothing(package, toolchain, name):
    build(toolchain, package)
    (package / "csrc" / name).write_text("what an editor leaves")
    assert library_problem(package) is None
    assert f"csrc/{name}" not in source_hashes(package)


@pytest.mark.parametrize(
    "change", [{"cxx_version": "pretending 2.0"}, {"instruction_sets": {"generic": ()}}], ids=["version", "targets"]
)
def test_other_compiler_or_target_builds_again(package, toolchain, calls, change):
    build(toolchain, package)
    before = len(calls.read_text())
    build(dataclasses.replace(toolchain, **change), package)
    assert len(calls.read_text()) > before


def test_other_words_of_the_compilers_command_build_again(package, toolchain, calls):
    build(toolchain, package)
    before = len(calls.read_text())
    other = dataclasses.replace(toolchain, cxx=(*toolchain.cxx, "-ffast-math"))
    assert build(other, package).cxx == other.cxx
    assert len(calls.read_text()) > before
    assert read_record(package).cxx == other.cxx


def test_missing_damaged_and_foreign_files_are_told_apart(package, toolchain):
    assert library_problem(package) == "no library, it has not been built"
    build(toolchain, package)
    library, record = package / LIBRARY_FILE, package / RECORD_FILE
    whole, text = library.read_bytes(), record.read_text()
    library.write_bytes(whole[:-1])
    assert library_problem(package) == "a damaged library, it is not the file that was built"
    library.write_bytes(whole)
    of_older_versions = [{key: value for key, value in json.loads(text).items() if key != gone} for gone in FIELDS]
    of_newer_version = json.loads(text) | {"new": 1}
    without_hashes = json.loads(text) | {"sources_sha256": None}
    for other in ("{}", "[]", "{", *map(json.dumps, [*of_older_versions, of_newer_version, without_hashes])):
        record.write_text(other)
        assert library_problem(package) == "a stale library, its record is of another version"
    record.write_text(text)
    assert library_problem(package) is None
    record.unlink()
    assert library_problem(package) == "no library, it has not been built"


def test_failed_compilation_shows_the_message_and_keeps_the_old_library(package, toolchain, capsys):
    build(toolchain, package)
    library = (package / LIBRARY_FILE).read_bytes()
    (package / "csrc" / "loss.cpp").write_text("BROKEN")
    with pytest.raises(BuildError, match=r"loss.cpp: got exit status 1 from .*correct what the message names"):
        build(toolchain, package)
    assert "error: expected unqualified-id" in capsys.readouterr().err
    assert (package / LIBRARY_FILE).read_bytes() == library
    assert {path.name for path in package.iterdir()} == {"build.py", "toolchain.py", "csrc", LIBRARY_FILE, RECORD_FILE}
    (package / "csrc" / "loss.cpp").write_text("// loss.cpp")
    assert library_problem(package) is None


def test_interrupted_build_keeps_the_old_library(package, toolchain, monkeypatch):
    build(toolchain, package)
    library = (package / LIBRARY_FILE).read_bytes()
    (package / "csrc" / "loss.h").write_text("// other")

    def interrupted(step, verbose):
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(toolchain, package)
    assert (package / LIBRARY_FILE).read_bytes() == library
    assert {path.name for path in package.iterdir()} == {"build.py", "toolchain.py", "csrc", LIBRARY_FILE, RECORD_FILE}


def test_library_whose_record_was_not_written_is_refused(package, toolchain, monkeypatch):
    build(toolchain, package)
    (package / "csrc" / "loss.h").write_text("// other")
    plain = Path.replace

    def dying(path, target):
        if Path(target).name == RECORD_FILE:
            raise OSError("the disk is gone")
        return plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(OSError, match="the disk is gone"):
            build(toolchain, package)
    assert library_problem(package) is not None
    build(toolchain, package)
    assert library_problem(package) is None


def test_two_builds_at_once_compile_once(package, toolchain, calls):
    threads = [threading.Thread(target=build, args=(toolchain, package)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library_problem(package) is None
    assert len(calls.read_text().splitlines()) == 2 + len(toolchain.instruction_sets)


def test_folder_that_cannot_be_written_to_is_refused(package, toolchain, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # root, as whom tests may run, writes anywhere
    with pytest.raises(BuildError, match="got a folder that cannot be written to"):
        build(toolchain, package)


def test_tiles_are_compiled_for_each_instruction_set_and_linked_after_code_for_any_processor(
    package, toolchain, tmp_path
):
    x86 = dataclasses.replace(toolchain, instruction_sets=dict(toolchains.X86_INSTRUCTION_SETS))
    steps = compile_steps(x86, package / "csrc", tmp_path)
    assert [step.output.name for step in steps] == [
        "loss.cpp.o",
        "loss_cpu_tiles.cpp.sse2.o",
        "loss_cpu_tiles.cpp.avx2.o",
        "loss_cpu_tiles.cpp.avx512.o",
    ]
    plain, sse2, avx2, avx512 = (step.command for step in steps)
    assert not any(word.startswith(("-mavx", "-mfma", "-DNTF_ISA")) for word in plain)
    assert "-DNTF_ISA=sse2" in sse2
    assert not any(word.startswith("-m") for word in sse2)
    assert {"-DNTF_ISA=avx2", "-mavx2", "-mfma", "-ffp-contract=fast"} <= set(avx2)
    assert {"-DNTF_ISA=avx512", "-mavx512f", "-mavx512bw"} <= set(avx512)
    for command in (plain, sse2, avx2, avx512):
        assert {"-O3", "-std=c++20", "-fvisibility=hidden"} <= set(command)
        assert "-ffast-math" not in command


def test_cuda_sources_are_compiled_for_every_target_with_ptx_of_the_newest(package, toolchain, tmp_path, monkeypatch):
    nvcc = executable(tmp_path / "cuda" / "bin" / "nvcc", NVCC.format(release="13.0"))
    chain = with_cuda(toolchain, monkeypatch, nvcc, "90 75")
    if chain.cuda is None:
        pytest.skip(f"there are no CUDA headers and libraries here: {chain.cpu_only_reason}")
    assert chain.cuda.targets == ("75", "90")
    steps = {step.output.name: step.command for step in compile_steps(chain, package / "csrc", tmp_path)}
    assert "-DUSE_CUDA" in steps["loss_cuda.cpp.o"]
    assert [word for word in steps["loss.cu.o"] if word.startswith("-gencode")] == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert {"-std=c++17", "-Xptxas", "-v"} <= set(steps["loss.cu.o"])


def test_default_targets_are_those_that_nvcc_knows(toolchain, tmp_path, monkeypatch):
    nvcc = executable(tmp_path / "cuda" / "bin" / "nvcc", NVCC.format(release="13.0"))
    assert toolchains._known_targets(str(nvcc), toolchains.parse_targets(DEFAULT_CUDA_ARCHS, ""), "") == (
        "75",
        "80",
        "90",
    )
    for source, targets, subject in (
        ("NTF_CUDA_ARCHS", ("75", "120"), "NTF_CUDA_ARCHS"),
        ("--cuda-archs", ("75", "120"), "--cuda-archs"),
        ("", ("120",), "the default CUDA targets"),
    ):
        with pytest.raises(
            BuildError, match=rf"^{subject}: got 120, which .*nvcc does not know, wanted some of 75 80 90"
        ):
            toolchains._known_targets(str(nvcc), targets, source)


@pytest.mark.parametrize(
    ("release", "reason"), [("12.8", "nvcc is of CUDA 12 and torch"), ("", "does not say its release")]
)
def test_nvcc_that_does_not_fit_leaves_cuda_out_and_says_why(toolchain, tmp_path, monkeypatch, release, reason):
    nvcc = executable(tmp_path / "cuda" / "bin" / "nvcc", NVCC.format(release=release))
    chain = with_cuda(toolchain, monkeypatch, nvcc)
    assert chain.cuda is None
    assert reason in chain.cpu_only_reason


def test_torch_for_the_cpu_and_a_machine_without_nvcc_leave_cuda_out(toolchain, monkeypatch):
    torch = toolchain.torch
    assert "is a CPU build" in toolchains._find_cuda(dataclasses.replace(torch, cuda=None), ("90",), "")[1]
    monkeypatch.setattr(toolchains, "find_nvcc", lambda: None)
    reason = toolchains._find_cuda(dataclasses.replace(torch, cuda="13.0"), ("90",), "")[1]
    assert reason == "no nvcc in CUDACXX, NVCC, CUDA_HOME, PATH or /usr/local/cuda"


def test_nvcc_is_looked_for_in_the_environment_first(tmp_path, monkeypatch):
    here, home = (executable(tmp_path / name / "bin" / "nvcc", NVCC) for name in ("here", "home"))
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    assert toolchains.find_nvcc() == str(home)
    monkeypatch.setenv("NVCC", str(here))
    assert toolchains.find_nvcc() == str(here)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "none"))
    with pytest.raises(BuildError, match=r"CUDACXX: got .*none, which is not there, wanted the path of nvcc"):
        toolchains.find_nvcc()


def test_cuda_home_without_nvcc_is_refused_though_the_path_has_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(executable(tmp_path / "bin" / "nvcc", NVCC).parent))
    assert toolchains.find_nvcc() == str(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    with pytest.raises(BuildError, match=r"^CUDA_HOME: got .*none, in which there is no bin/nvcc.*--cpu-only$"):
        toolchains.find_nvcc()


@pytest.mark.parametrize(("text", "targets"), [("75", ("75",)), ("120;80, 90\n", ("80", "90", "120"))])
def test_targets_are_read_and_sorted(text, targets):
    assert toolchains.parse_targets(text, "NTF_CUDA_ARCHS") == targets


@pytest.mark.parametrize("text", [",", "8.0", "sm_90", "90+PTX", "9"])
def test_senseless_targets_are_refused_and_whoever_names_them_is_named(text, monkeypatch, capsys):
    assert main(["--cuda-archs", text]) == 1
    assert "error: --cuda-archs: got " in capsys.readouterr().err
    monkeypatch.setenv("NTF_CUDA_ARCHS", text)
    assert main([]) == 1
    assert "error: NTF_CUDA_ARCHS: got " in capsys.readouterr().err
    assert find_toolchain(cpu_only=True).cuda is None


@pytest.mark.parametrize("text", ["", " "])
def test_empty_targets_are_the_default(text, monkeypatch):
    monkeypatch.setenv("NTF_CUDA_ARCHS", text)
    default = tuple(DEFAULT_CUDA_ARCHS.split())
    assert toolchains._wanted_targets(None) == toolchains._wanted_targets(text) == (default, "")
    monkeypatch.setenv("NTF_CUDA_ARCHS", "90")
    assert toolchains._wanted_targets("") == (("90",), "NTF_CUDA_ARCHS")
    assert toolchains._wanted_targets("75") == (("75",), "--cuda-archs")


def test_machine_without_compiler_gets_status_2_and_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([]) == 2
    assert "got none of c++, g++ and clang++, wanted a compiler for C++20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("my-c++ -m64", "my-c++, which is not on the path, wanted a compiler for C++20: correct it, or unset it"),
        (
            "'",
            "', which cannot be split into words (No closing quotation), wanted a command as a shell reads it: close",
        ),
    ],
)
def test_compiler_that_is_named_and_not_there_gets_status_1_and_a_sentence(text, got, monkeypatch, capsys):
    monkeypatch.setenv("CXX", text)
    assert main([]) == 1
    assert f"error: CXX: got {got}" in capsys.readouterr().err


def test_first_compiler_of_the_path_is_taken_unless_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    executable(tmp_path / "clang++", "")
    assert toolchains.find_cxx() == ("clang++",)
    executable(tmp_path / "g++", "")
    assert toolchains.find_cxx() == ("g++",)
    monkeypatch.setenv("CXX", "clang++ -m64")
    assert toolchains.find_cxx() == ("clang++", "-m64")


def test_old_torch_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(BuildError, match=r"torch: got 2.9.1\+cu128, wanted 2.10 or newer, for its stable ABI"):
        toolchains.find_torch()


def test_system_without_a_build_is_refused_like_one_without_compiler(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NoCompilerError, match="got the system win32, wanted Linux"):
        find_toolchain()


def real_toolchain() -> Toolchain:
    try:
        return dataclasses.replace(find_toolchain(cpu_only=True), instruction_sets={"generic": ()})
    except NoCompilerError as error:
        pytest.skip(f"nothing can be compiled here: {error}")


def test_real_compiler_makes_a_library_that_loads(package):
    (package / "csrc" / "loss.cpp").write_text(
        "#include <torch/headeronly/core/ScalarType.h>\n"
        'extern "C" __attribute__((visibility("default"))) int twice(int x) { return 2 * x; }\n'
    )
    build(real_toolchain(), package)
    assert ctypes.CDLL(str(package / LIBRARY_FILE)).twice(21) == 42


def test_what_the_real_compiler_says_is_shown(package, capsys):
    (package / "csrc" / "loss.cpp").write_text("int twice(int x) { return 2 * y; }\n")
    with pytest.raises(BuildError, match=r"loss.cpp: got exit status 1"):
        build(real_toolchain(), package)
    assert "loss.cpp:1:" in capsys.readouterr().err


def test_c_driver_that_cannot_link_is_told_apart_from_a_source_that_does_not_compile(package, monkeypatch):
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc here")
    (package / "csrc" / "loss.cpp").write_text("#include <iostream>\nvoid say(int x) { std::cout << x; }\n")
    monkeypatch.setenv("CXX", "gcc")
    with pytest.raises(BuildError, match=rf"{LIBRARY_FILE}: got exit status 1 from gcc.*name the C\+\+ driver in CXX"):
        build(real_toolchain(), package)


def check_in_a_new_process(folder):
    """`--check` of a package's copy."""
    command = [sys.executable, "-m", "cpp_ext.build", "--check"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_check_builds_nothing_and_tells_by_its_status():
    done = check_in_a_new_process(ROOT)
    assert done.returncode == (1 if ops.fused_problem("cpu") else 0), done.stderr
    if done.returncode == 0:
        assert f"loads: {read_record().describe()}" in done.stdout
    else:
        assert f"error: {ops.fused_problem('cpu')}" in done.stderr


def forge(package, **changes):
    """The record of the package's library with other values."""
    record = dataclasses.replace(read_record(package), **changes)
    (package / RECORD_FILE).write_text(record.to_json())


def test_check_and_loading_give_the_same_answer_about_whatever_is_wrong(tmp_path, toolchain):
    package = tmp_path / "cpp_ext"
    (package / "csrc").mkdir(parents=True)
    for path in FOLDER.glob("*.py"):
        shutil.copy(path, package)
    (package / "csrc" / "loss.cpp").write_text("// loss.cpp")
    program = "from cpp_ext import ops; print(f'error: {ops.fused_problem(\"cpu\")}')"
    state = {
        "no library, it has not been built": lambda: None,
        # What pretends to be a compiler makes no library.
        "a library that does not load": lambda: build(toolchain, package),
        "a library for CUDA 11 beside torch": lambda: forge(package, cuda_targets=("90",), torch_cuda="11.8"),
        "a damaged library": lambda: (package / LIBRARY_FILE).write_text("half"),
        "a stale library": lambda: (package / "csrc" / "loss.cpp").write_text("// other"),
    }
    for got, change in state.items():
        change()
        done = check_in_a_new_process(tmp_path)
        assert done.returncode == 1, got
        assert done.stderr.startswith(f"error: the fused loss: got {got}")
        assert done.stderr.endswith("wanted a current library: run python -m cpp_ext.build\n")
        loading = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert loading.stdout == done.stderr


def test_library_without_a_cuda_part_may_be_loaded_by_every_torch(package, toolchain):
    build(toolchain, package)
    for cuda in (None, "12.8", "13.0"):
        assert loadable_record(package, torch_version="2.10.0", torch_cuda=cuda) == read_record(package)
    forge(package, cuda_targets=("90",), torch_cuda="13.0")
    assert loadable_record(package, torch_version="2.10.0", torch_cuda="13.2") == read_record(package)
    for cuda in (None, "12.8"):
        with pytest.raises(
            BuildError, match=r"got a library for CUDA 13 beside torch 2.10.0, .*: run python -m cpp_ext"
        ):
            loadable_record(package, torch_version="2.10.0", torch_cuda=cuda)


def test_check_without_torch_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["--check"]) == 1
    assert "error: torch: got " in capsys.readouterr().err
