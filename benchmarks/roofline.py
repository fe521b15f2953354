"""What the CUDA kernels of the loss can reach, on paper: `python -m benchmarks.roofline` writes benchmarks/README.md.

Nothing here was measured on a GPU. The formulas are those in the comments of cpp_ext/csrc/soft_contrastive_pairs.cuh,
for form log_sum, C = 128, J = N / 2, forward (with what the backward pass needs) and backward, counted as in the
benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loss_contenders import WIDTH
from benchmarks.tables import with_tables

DOCUMENT = Path("benchmarks/README.md")
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)

# From cpp_ext/csrc: kTile of soft_contrastive_tiles.cuh, kWeightedRowsBlocks and kBlockSharedBytes of
# soft_contrastive_cuda.h.
TILE_ROWS = 64
WEIGHTED_ROWS_BLOCKS = 3
BLOCK_SHARED_KIB = 46
# Forward: labels counted, statistics, pull, class sums (2), finish. Backward: the same with row terms and the gradient
# in place of statistics and pull.
LAUNCHES = 12

# CUDA C++ Programming Guide, "Throughput of native arithmetic instructions": 16 exponentials a clock and
# multiprocessor for 7.5 to 9.0; and shared memory gives 32 banks x 4 bytes a clock.
EXPONENTIALS_A_CLOCK = 16
SHARED_BYTES_A_CLOCK = 128

# Estimates, not data: what a launch costs the stream, and what cuBLAS reaches of the peak with a 4096^3 product.
LAUNCH_S = 4e-6
MATMUL_EFFICIENCY = 0.85
# Share of its arithmetic peak that a well-fed inner loop of plain multiply-adds reaches beside its own addressing and
# barriers: an estimate, in line with hand-written SGEMM kernels.
LOOP_EFFICIENCY = 0.8


@dataclass(frozen=True)
class GPU:
    """Peaks of a device; tensor core figures are dense ones (data sheets from Ampere on print them with sparsity).

    Attributes:
        name: with its form factor.
        source: where the figures are printed.
        multiprocessors: how many.
        cores: FP32 lanes of a multiprocessor.
        shared_kib: shared memory of a multiprocessor (CUDA C++ Programming Guide, technical specifications).
        memory_bytes_s: bandwidth of device memory.
        peaks: operations a second by precision; only what the kernels use on this device.
        mma_share: share of the tensor core peak that mma.sync can issue.
    """

    name: str
    source: str
    multiprocessors: int
    cores: int
    shared_kib: int
    memory_bytes_s: float
    peaks: dict[str, float]
    mma_share: float

    def clock_hz(self) -> float:
        """The clock at which the FP32 peak is stated: two operations a core and clock."""
        return self.peaks["float32"] / (2 * self.cores * self.multiprocessors)

    def slots(self) -> int:
        """Blocks that the device holds at a time."""
        return self.multiprocessors * min(WEIGHTED_ROWS_BLOCKS, self.shared_kib // BLOCK_SHARED_KIB)


GPUS = (
    GPU("T4", "NVIDIA T4 data sheet", 40, 64, 64, 320e9, {"float32": 8.1e12}, 1.0),
    GPU(
        "L4",
        "NVIDIA L4 data sheet, tensor core figures halved: they are stated with sparsity",
        58,
        128,
        100,
        300e9,
        {"float32": 30.3e12, "tf32": 60e12, "bfloat16": 121e12},
        1.0,
    ),
    GPU(
        "A100 SXM 80 GB",
        "NVIDIA A100 data sheet",
        108,
        64,
        164,
        2039e9,
        {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12},
        1.0,
    ),
    # An estimate: on Hopper only wgmma reaches the tensor cores' peak, and the kernels use mma.sync.
    GPU(
        "H100 SXM",
        "NVIDIA H100 data sheet, tensor core figures halved: they are stated with sparsity",
        132,
        128,
        228,
        3350e9,
        {"float32": 67e12, "tf32": 494.7e12, "bfloat16": 989.4e12},
        0.63,
    ),
)


@dataclass(frozen=True)
class Work:
    """What the kernels of one forward and one backward call do.

    Attributes:
        scores: operations of products that give scores, in the inputs' precision.
        rows: operations of products of weights and rows; in TF32 for half inputs too.
        exponentials: how many.
        memory_bytes: each array once from or to device memory.
        tile_bytes: what the blocks ask of the L2 cache.
    """

    scores: float
    rows: float
    exponentials: float
    memory_bytes: float
    tile_bytes: float


def work(n: int, *, input_bytes: int, width: int = WIDTH) -> Work:
    """Forward: z z^T, and z h^T with its product for the pull. Backward: z z^T again, and its product.

    The kernels do not use the symmetry of z z^T: a block walks over all columns for its own rows.
    """
    traces = n // 2
    row, wide_row = width * input_bytes, width * 4
    blocks = n / TILE_ROWS
    forward_bytes = (n + traces) * row + 8 * n + 4 * 4 * n + n * wide_row
    backward_bytes = 2 * n * row + 8 * n + 4 * 4 * n + n * wide_row
    return Work(
        scores=2.0 * n * width * (2 * n + traces),
        rows=2.0 * n * width * (n + traces),
        exponentials=3.0 * n * n + n * traces,
        memory_bytes=forward_bytes + backward_bytes,
        tile_bytes=blocks * (n * (2 * row + 8) + traces * 3 * row + n * 3 * row),
    )


@dataclass(frozen=True)
class Estimate:
    """Times in seconds, and the share of the matrix product's rate that is to be expected.

    Attributes:
        products_s: products at the peak.
        memory_s: each array once at the bandwidth of device memory.
        exponentials_s: at the peak of the special function units.
        shared_s: reading the products' factors from shared memory.
        filled: share of the device that works, on average: (if a block alone on a multiprocessor is as slow as one
            of several, if it is as fast as all of them together).
        low: share if products, shared memory and exponentials never overlap, and `filled` is the smaller.
        high: share if they overlap perfectly, and `filled` is the larger.
        l2_bytes_s: rate at which the L2 cache has to deliver for `high`.
    """

    products_s: float
    memory_s: float
    exponentials_s: float
    shared_s: float
    filled: tuple[float, float]
    low: float
    high: float
    l2_bytes_s: float


def estimate(gpu: GPU, precision: str, n: int) -> Estimate:
    """The roofline of one size on one device."""
    done = work(n, input_bytes=2 if precision == "bfloat16" else 4)
    score_peak = gpu.peaks[precision]
    row_peak = gpu.peaks["tf32" if precision == "bfloat16" else precision]
    products = done.scores / score_peak + done.rows / row_peak
    clocks = gpu.clock_hz() * gpu.multiprocessors
    exponentials = done.exponentials / (EXPONENTIALS_A_CLOCK * clocks)
    shared = _shared_bytes(precision, done, n) / (SHARED_BYTES_A_CLOCK * clocks)
    memory = done.memory_bytes / gpu.memory_bytes_s
    usable = LOOP_EFFICIENCY * (1.0 if precision == "float32" else gpu.mma_share)
    filled = _filled(gpu, n)
    issued = products / usable
    slow = (issued + exponentials + shared) / filled[0] + memory + LAUNCHES * LAUNCH_S
    fast = max(max(issued, exponentials, shared) / filled[1], memory) + LAUNCHES * LAUNCH_S
    # Share of a matrix product in the inputs' precision, with all operations counted at its rate.
    matmul = (done.scores + done.rows) / (score_peak * MATMUL_EFFICIENCY)
    return Estimate(
        products, memory, exponentials, shared, filled, matmul / slow, matmul / fast, done.tile_bytes / fast
    )


def _shared_bytes(precision: str, done: Work, n: int) -> float:
    """Bytes through shared memory: tiles on their way in, factors of the products, and the scores.

    Simt: a warp reads 8 x 2 rows and 4 x 16 columns of 16 bytes for 32 x 128 multiply-adds of scores; for rows, 8 x 2
    weights of 4 bytes and 2 x 16 packs of 16 for 32 x 64. TensorCore: a lane reads 16 words for 8 products of
    16 x 8 x 16 (half) or 16 x 8 x 8 (TF32), and 24 for 16 of 16 x 8 x 8 with the weights. A score is written once,
    read once or twice, and turned into a weight in two of the three walks: 32 bytes a pair, with J = N / 2.
    """
    if precision == "float32":
        scores = (8 * 2 * 16 + 4 * 16 * 16) / (2 * 32 * 128)
        rows = (8 * 2 * 4 + 2 * 16 * 16) / (2 * 32 * 64)
    else:
        depth = 16 if precision == "bfloat16" else 8
        scores = 16 * 32 * 4 / (8 * 2 * 16 * 8 * depth)
        rows = 24 * 32 * 4 / (16 * 2 * 16 * 8 * 8)
    return done.scores * scores + done.rows * rows + done.tile_bytes + 32.0 * n * n


def _filled(gpu: GPU, n: int) -> tuple[float, float]:
    """How much of the device works, on average, with rows and columns dealt out as Launcher does."""
    tiles, slots = -(-n // TILE_ROWS), gpu.slots()
    # As splits_of in soft_contrastive.cu: the number of splits whose waves of walks are over first.
    walks = [-(-tiles // splits) for splits in range(1, min(2 * -(-slots // tiles), tiles) + 1)]
    walk = min(walks, key=lambda walk: -(-tiles * -(-tiles // walk) // slots) * walk)
    blocks = tiles * -(-tiles // walk)
    # Every block walks as many tiles. In whole waves of the device, or as evenly as blocks can be dealt.
    waves, most = -(-blocks // slots), -(-blocks // gpu.multiprocessors)
    return tiles * tiles / (waves * slots * walk), tiles * tiles / (most * gpu.multiprocessors * walk)


def markdown() -> str:
    """One table a device and precision."""
    lines = []
    for gpu in GPUS:
        for precision in gpu.peaks:
            peak = gpu.peaks[precision] / 1e12
            lines += [
                *([""] if lines else []),
                f"{gpu.name}, {precision}: {peak:g} TFLOP/s, {gpu.memory_bytes_s / 1e9:g} GB/s ({gpu.source})",
                "",
                "| N | GFLOP | each array once | time of products | time of memory | exponentials | shared memory | "
                "through L2 | rate of L2 for the higher share | device filled | expected share of a matrix product |",
                "|" + "---:|" * 11,
                *(_line(gpu, precision, n) for n in SIZES),
            ]
    return "\n".join(lines)


def _line(gpu: GPU, precision: str, n: int) -> str:
    done, found = work(n, input_bytes=2 if precision == "bfloat16" else 4), estimate(gpu, precision, n)
    cells = [
        str(n),
        f"{(done.scores + done.rows) / 1e9:.4g}",
        f"{done.memory_bytes / 1e6:.3g} MB",
        *(_time(s) for s in (found.products_s, found.memory_s, found.exponentials_s, found.shared_s)),
        f"{done.tile_bytes / 1e9:.3g} GB",
        f"{found.l2_bytes_s / 1e12:.2g} TB/s",
        " to ".join(f"{100 * share:.0f}" for share in found.filled) + " %",
        f"{100 * found.low:.0f} to {100 * found.high:.0f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables into benchmarks/README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args(arguments)
    document = options.document.read_text(encoding="utf-8")
    options.document.write_text(with_tables(document, markdown(), begin=BEGIN, end=END), encoding="utf-8")
    print(f"wrote the tables in {options.document}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
