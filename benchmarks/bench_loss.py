"""The soft contrastive loss against straightforward PyTorch and against SupConLoss: speed and memory.

    python -m benchmarks.bench_loss                   # CPU: results file, picture, README; exit 1 if a check is missed
    python -m benchmarks.bench_loss --device cuda     # GPU: float32, TF32, bfloat16, float16, into its own file
    pytest benchmarks/bench_loss.py [--device cuda]   # the same figures without writing; fails if a check is missed

A benchmark here is one round: every contender in turn, forward and backward timed apart, in `Race`. What
pytest-benchmark prints is the time of a round; the rows travel in its extra_info.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loss_results
from benchmarks.loss_checks import unmet_of_some
from benchmarks.loss_contenders import FUSED, LossBenchmarkError, contests, precisions_of
from benchmarks.loss_memory import BOTH, FORWARD, measured_elsewhere, measured_here
from benchmarks.loss_race import Race, clock_of
from benchmarks.tables import KEPT_ELSEWHERE, README

# As many rounds as make the median of a small batch steady, within about four minutes on two cores.
ROUNDS = {64: 200, 100: 200, 128: 200, 256: 80, 512: 40, 1024: 25, 2048: 11, 4096: 7, 8192: 5, 16384: 3, 32768: 3}
MEMORY_SIZES = (256, 1024, 4096, 8192, 16384, 32768)
LARGEST_FORWARD = 65536
RAW = Path("build/loss_benchmarks.json")
# Where a run with --max-rows goes: it is no replacement for the committed results.
PARTIAL = Path("build/loss_partial.json")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark for each row that the device can give."""
    device, largest = (
        metafunc.config.getoption("--device", "cpu"),
        metafunc.config.getoption("--max-rows", LARGEST_FORWARD),
    )
    try:
        if metafunc.function is bench_loss:
            metafunc.parametrize(("contest", "n", "precision"), time_cases(device, largest))
        if metafunc.function is bench_loss_memory:
            metafunc.parametrize(("contest", "contender", "n", "calls", "precision"), memory_cases(device, largest))
    except LossBenchmarkError as error:
        raise pytest.UsageError(str(error)) from None


def time_cases(device: str, largest: int) -> list[tuple[str, int, str]]:
    """(contest, N, precision) of every row of times.

    Raises:
        LossBenchmarkError: `largest` leaves nothing to time.
    """
    if largest < min(ROUNDS):
        raise LossBenchmarkError(
            "--max-rows",
            got=str(largest),
            wanted=f"{min(ROUNDS)} or more, the rows of the smallest batch",
            remedy="pass more, or leave it out for all batches",
        )
    return [
        (contest.name, n, precision)
        for precision in precisions_of(device)
        for contest in contests(device).values()
        for n in contest.sizes
        if n <= largest
    ]


def memory_cases(device: str, largest: int) -> list[tuple[str, str, int, str, str]]:
    """(contest, contender, N, calls, precision) of every row of memory."""
    cases = [
        (contest.name, contender, n, BOTH, precision)
        for precision in precisions_of(device)
        for contest in contests(device).values()
        for n in MEMORY_SIZES
        for contender in contest.runners(n)
        if n <= largest
    ]
    if largest >= LARGEST_FORWARD:
        cases.append(("with traces", FUSED, LARGEST_FORWARD, FORWARD, "float32"))
    return cases


def bench_loss(benchmark, device, contest, n, precision):
    race = Race(contests(device)[contest], n, precision, device, clock_of(device))
    race.check()
    benchmark.group = f"soft contrastive loss, {contest}, one round of all contenders"
    benchmark.name = f"{contest}, N = {n}, {precision}"
    benchmark.extra_info[KEPT_ELSEWHERE] = True
    benchmark.pedantic(race.run(ROUNDS[n]), rounds=ROUNDS[n])
    rows = race.rows()
    benchmark.extra_info[loss_results.TIME_ROWS] = rows
    _refuse_unmet(device, rows, [])


def bench_loss_memory(benchmark, device, contest, contender, n, calls, precision):
    # PyTorch counts a GPU's memory exactly; a CPU's peak needs a process that does nothing else.
    measure = measured_here if device == "cuda" else measured_elsewhere
    benchmark.group = "soft contrastive loss, memory: the time of its process says nothing"
    benchmark.name = f"{contest}, {contender}, N = {n}, {calls}, {precision}"
    benchmark.extra_info[KEPT_ELSEWHERE] = True
    options = {"calls": calls, "precision": precision, "device": device}
    row = benchmark.pedantic(measure, args=(contest, contender, n), kwargs=options, rounds=1)
    benchmark.extra_info[loss_results.MEMORY_ROWS] = [row]
    _refuse_unmet(device, [], [row])


def _refuse_unmet(device: str, rows: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    unmet = unmet_of_some(rows, memory) if device == "cpu" else []
    if unmet:
        pytest.fail("; ".join(unmet), pytrace=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything above, write the results and say which checks are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_loss", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--max-rows", type=int, default=LARGEST_FORWARD, help="leave out larger batches; into build/")
    parser.add_argument("--raw", type=Path, default=RAW, help="what pytest-benchmark writes")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/loss.json, loss_cuda.json for cuda")
    parser.add_argument("--readme", type=Path, help="default: README.md; a GPU's tables are printed only")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except LossBenchmarkError as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    device, largest = options.device, options.max_rows
    wanted = [f"{contest}, N = {n}, {precision}" for contest, n, precision in time_cases(device, largest)]
    wanted += [f"{c}, {who}, N = {n}, {calls}, {p}" for c, who, n, calls, p in memory_cases(device, largest)]
    options.raw.parent.mkdir(parents=True, exist_ok=True)
    options.raw.unlink(missing_ok=True)
    ours = ["--device", device, "--max-rows", str(largest), f"--benchmark-json={options.raw}"]
    # Its failures are missing rows, which are refused, and missed checks, which are written down first.
    command = [sys.executable, "-m", "pytest", __file__, "-q", "--benchmark-columns=median,iqr,rounds", *ours]
    status = subprocess.run(command, check=False).returncode
    if not options.raw.exists():
        raise LossBenchmarkError(
            "pytest", got=f"exit status {status} and no {options.raw}", wanted="timings", remedy="read it above"
        )
    results = loss_results.condensed(json.loads(options.raw.read_text(encoding="utf-8")), device, wanted)
    whole = largest >= LARGEST_FORWARD
    path = options.results or (loss_results.RESULTS[device] if whole else PARTIAL)
    readme = options.readme or (README if device == "cpu" and whole else None)
    loss_results.write(results, path, readme)
    print(loss_results.markdown(results))
    print(f"wrote {path}, {path.with_suffix('.png')}" + (f" and the tables in {readme}" if readme else ""))
    return 0 if all(check["met"] for check in results["checks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
