"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set of this machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpp_ext.build import build
from cpp_ext.library import FOLDER
from cpp_ext.toolchain import find_toolchain

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# Rows that fill no strip, one strip, several blocks on two threads; widths of one column and of no whole vector.
PROGRAM = """
import itertools, sys
from pathlib import Path
import torch
from cpp_ext.ops import fused_soft_contrastive_loss, load_library

load_library(Path(sys.argv[1]))
torch.set_num_threads(2)
batches = [(0, 3, 1), (1, 3, 1), (2, 1, 0), (33, 17, 16), (127, 130, 5), (257, 4, 128), (700, 128, 300)]
for name in torch.ops.ntf.instruction_sets().split(","):
    torch.ops.ntf.use_instruction_set(name)
    for (n, c, j), form, dtype in itertools.product(
        batches, ("log_sum", "log_mean", "literal"), (torch.float32, torch.float64, torch.bfloat16)
    ):
        for denominator, temperature in itertools.product(("all", "negatives"), (0.07, 0.005)):
            z = torch.nn.functional.normalize(torch.randn(n, c), dim=1).to(dtype).requires_grad_()
            h = torch.nn.functional.normalize(torch.randn(j, c), dim=1).to(dtype).requires_grad_()
            loss = fused_soft_contrastive_loss(
                z, torch.randint(0, 2, (n,)), h, temperature=temperature, eta=0.5, form=form, denominator=denominator,
                trace_gradient=True,
            )
            torch.autograd.grad(loss, (z, h))
    print(name)
"""


def sanitized_run(folder: Path, defect: tuple[str, str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What the program says with kernels compiled with sanitizers, after `defect` (file, old, new) if there is one."""
    shutil.copytree(FOLDER / "csrc", folder / "csrc")
    for name in ("build.py", "toolchain.py"):
        shutil.copy(FOLDER / name, folder)
    if defect is not None:
        path = folder / "csrc" / defect[0]
        text = path.read_text()
        assert text.count(defect[1]) == 1
        path.write_text(text.replace(defect[1], defect[2]))
    toolchain = find_toolchain(cpu_only=True)
    build(dataclasses.replace(toolchain, cxx=(*toolchain.cxx, *SANITIZERS)), folder)
    libraries = [
        subprocess.run([*toolchain.cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are not ours
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    return subprocess.run(
        command, env=environment, cwd=FOLDER.parent, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
def test_cpu_kernels_run_clean_on_every_instruction_set(tmp_path):
    done = sanitized_run(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()


@pytest.mark.slow
def test_write_behind_a_packed_block_is_caught(tmp_path):
    defect = (
        "soft_contrastive_cpu_rows.cpp",
        "packed.left_size = rounded_up(most, mr) * width;",
        "packed.left_size = most * width;",
    )
    done = sanitized_run(tmp_path, defect)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
