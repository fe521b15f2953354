"""The CUDA kernels through nvcc: no spills, no local memory, registers within the limit, on every target."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from cpp_ext import ptxas
from cpp_ext.library import BuildError
from cpp_ext.toolchain import DEFAULT_CUDA_ARCHS, find_nvcc

CSRC = Path(ptxas.__file__).parent / "csrc"
# kBlockSharedBytes of soft_contrastive_cuda.h without the device's own 1 KiB; static shared memory ends at 48 KiB.
LARGEST_STATIC_SHARED_BYTES = 45 * 1024
REGISTERS_OF_A_MULTIPROCESSOR = 65536
TARGETS = DEFAULT_CUDA_ARCHS.split()
FAST_TARGET = "80"

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc to compile the kernels with")

SPILLING_KERNEL = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* data) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = data[i * 1024 + threadIdx.x];
#pragma unroll
  for (int k = 1; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 64; ++i) values[i] += values[(i * 7 + k) % 64] * values[(i + k) % 64];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) data[i * 1024 + threadIdx.x] = values[i];
}
"""


def register_limit(kernel):
    """What the launch bounds beside the kernels leave each thread, in the steps of 8 that a device deals out."""
    text = "".join((CSRC / name).read_text() for name in ("soft_contrastive_tiles.cuh", "soft_contrastive_cuda.h"))
    constant = "kStatisticsBlocks" if kernel.startswith("statistics_kernel") else "kWeightedRowsBlocks"
    threads, blocks = (int(re.search(rf"{name} = (\d+);", text)[1]) for name in ("kThreads", constant))
    return REGISTERS_OF_A_MULTIPROCESSOR // (threads * blocks) // 8 * 8


def compiled(source, target, folder):
    command = [find_nvcc(), "-O3", "-std=c++17", "-Xptxas", "-v", f"-gencode=arch=compute_{target},code=sm_{target}"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(folder / "kernels.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def offences(table):
    """Every kernel that takes more than it may, with what it takes."""
    return [
        row
        for row in table
        if row.registers > register_limit(row.kernel)
        or row.stack_bytes
        or row.spill_store_bytes
        or row.spill_load_bytes
        or row.shared_bytes > LARGEST_STATIC_SHARED_BYTES
    ]


@needs_nvcc
@pytest.mark.parametrize(
    "target", [t if t == FAST_TARGET else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)
def test_no_kernel_spills_or_takes_too_many_registers(tmp_path, target):
    log = compiled(CSRC / "soft_contrastive.cu", target, tmp_path)
    assert "warning" not in log, log[-4000:]
    table = ptxas.ptxas_table(log)
    assert {row.target for row in table} == {f"sm_{target}"}
    # Five kinds of numbers and tiles: statistics and three weighted sums each.
    heavy = [row for row in table if "_rows_kernel<" in row.kernel or "statistics_kernel<" in row.kernel]
    assert len(heavy) == 5 * 4
    assert offences(table) == []


@needs_nvcc
def test_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING_KERNEL)
    (row,) = offences(ptxas.ptxas_table(compiled(source, FAST_TARGET, tmp_path)))
    assert row.kernel == "spilling_kernel"
    assert row.spill_store_bytes > 0


LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_100'
ptxas info    : Function properties for _Z5firstPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 90 registers, used 1 barriers, 29952 bytes smem, 456 bytes cmem[0]
ptxas info    : Compile time = 12.0 ms
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_75'
ptxas info    : Function properties for _Z5firstPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 456 bytes cmem[0]
"""


def test_log_is_read_number_by_number():
    newer, older = ptxas.ptxas_table(LOG)[::-1]
    assert (newer.target, newer.registers, newer.shared_bytes) == ("sm_100", 90, 29952)
    assert (newer.stack_bytes, newer.spill_store_bytes, newer.spill_load_bytes) == (16, 8, 4)
    assert (older.target, older.registers, older.shared_bytes, older.stack_bytes) == ("sm_75", 32, 0, 0)


def test_each_excess_is_an_offence():
    sound = ptxas.KernelResources("statistics_kernel<Simt<float>>", "sm_90", 128, LARGEST_STATIC_SHARED_BYTES, 0, 0, 0)
    larger = dataclasses.replace(sound, kernel="weighted_rows_kernel<Simt<float>, PullWeight<float>>", registers=168)
    assert offences([sound, larger]) == []
    for field, value in (
        ("registers", 129),
        ("shared_bytes", LARGEST_STATIC_SHARED_BYTES + 1),
        ("stack_bytes", 8),
        ("spill_store_bytes", 4),
        ("spill_load_bytes", 4),
    ):
        assert len(offences([dataclasses.replace(sound, **{field: value})])) == 1, field
    assert len(offences([dataclasses.replace(larger, registers=169)])) == 1


def test_table_has_a_column_for_each_target():
    lines = ptxas.resource_table(LOG).splitlines()
    assert lines[0].startswith("| kernel, registers on | sm_75 | sm_100 | shared memory")
    assert lines[2].endswith(" | 32 | 90 | 29952 | 16 |")


def test_results_are_written_as_json_and_markdown(tmp_path):
    ptxas.write_results(ptxas.ptxas_table(LOG), "release 13.0", tmp_path / "new" / "ptxas.json")
    assert '"nvcc": "release 13.0"' in (tmp_path / "new" / "ptxas.json").read_text()
    assert "release 13.0" in (tmp_path / "new" / "ptxas.md").read_text()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("nothing", "got no kernel, wanted the output of nvcc"),
        ("Compiling entry function 'f' for 'sm_75'\n", "wanted its registers and spills"),
    ],
)
def test_log_that_lacks_the_numbers_is_refused(log, message):
    with pytest.raises(BuildError, match=message):
        ptxas.ptxas_table(log)


def test_command_without_a_log_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ptxas, "LOG", tmp_path / "none.log")
    assert ptxas.main(["--results", str(tmp_path / "ptxas.json")]) == 1
    assert "run python -m cpp_ext.build where nvcc is" in capsys.readouterr().err
