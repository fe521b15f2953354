"""Wrong pictures, bundles, shards and requests by the hundred thousand: `python -m benchmarks.fuzz --inputs 100000`.

Each target runs in a process of its own, which libFuzzer (by atheris) leads to inputs that reach new lines of `runtime`
and of Pillow; half of the mutants are libFuzzer's, half are made of valid seeds by `benchmarks.mutation`. Where atheris
is not installed, all are of the second kind, and the report says so. A finding is any exception but the documented
refusals, a crash, an input that takes longer than --timeout-s, and more memory than --memory-mb. The first one ends
its target; the input is kept beside the report, and the exit status is 1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import tyro

from runtime.strict_json import canonical_json
from train.provenance import machine, package_versions, tool_commit

PACKAGES = ["atheris", "fastapi", "numpy", "pillow", "pydantic", "python-multipart", "starlette"]
# libFuzzer's own exit statuses, for messages.
_MEANING = {70: "it took too long", 71: "it took too much memory", 77: "an exception that is no refusal, or a crash"}
_CHECK_EVERY = 500


@dataclass(frozen=True)
class Options:
    """Feed mutants of valid inputs to everything that reads what others send."""

    inputs: int = 100_000
    """How many, over all targets."""
    out: Path = Path("benchmarks/results/fuzz.json")
    """Report to write; inputs that were not refused as they should be are kept beside it."""
    seed: int = 0
    """Of the mutations."""
    timeout_s: int = 60
    """Time that one input may take, by the clock on the wall: a busy machine needs more."""
    memory_mb: int = 2048
    """Memory that a process may hold."""
    target: str | None = None
    """Only this one."""
    worker: bool = False
    """Used by the command itself: run the target in this process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = tyro.cli(Options, prog="python -m benchmarks.fuzz", args=arguments)
    if options.worker:
        _work(options)
    results = [_result(options, name, inputs) for name, inputs in _plan(options)]
    report = {
        "engine": _engine(),
        "inputs": sum(result["inputs"] for result in results),
        "findings": sum(result["finding"] is not None for result in results),
        "settings": {"seed": options.seed, "timeout_s": options.timeout_s, "memory_mb": options.memory_mb},
        "environment": {"machine": machine(), "versions": package_versions(PACKAGES), "commit": tool_commit()},
        "targets": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(canonical_json(report))
    print(f"{report['inputs']:,} inputs, {report['findings']} findings ({report['engine']}): {options.out}")
    return int(report["findings"] > 0)


def _engine() -> str:
    if importlib.util.find_spec("atheris") is None:
        return "seeded mutations without feedback: atheris is not installed"
    return "atheris: libFuzzer with coverage of runtime and Pillow"


def _plan(options: Options) -> list[tuple[str, int]]:
    from benchmarks.fuzz_targets import targets

    with tempfile.TemporaryDirectory() as folder:
        shares = {target.name: target.share for target in targets(Path(folder))}
    if options.target is not None:
        if options.target not in shares:
            raise SystemExit(f"--target: got {options.target}, wanted one of {', '.join(shares)}")
        return [(options.target, options.inputs)]
    return [(name, round(share * options.inputs)) for name, share in shares.items()]


def _result(options: Options, name: str, inputs: int) -> dict[str, Any]:
    """What a process found that runs one target."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ntf-fuzz-") as folder, open(f"{folder}/log", "w+") as log:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.fuzz", "--worker", "--target", name, "--inputs", str(inputs)]
        command += ["--out", str(out), "--seed", str(options.seed)]
        command += ["--timeout-s", str(options.timeout_s), "--memory-mb", str(options.memory_mb)]
        status = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"inputs": 0}
        finding = None
        if status != 0 or result["inputs"] < inputs:
            log.seek(0)
            kept = [_kept(path, options.out) for path in Path(folder).glob("finding-*")]
            finding = {
                "status": status,
                "meaning": _MEANING.get(status, "the process ended"),
                "kept": kept,
                "log": log.read()[-4000:],
            }
    result |= {"target": name, "seconds": round(time.perf_counter() - started, 1), "finding": finding}
    told = f"{result['inputs']:,} inputs, {result.get('outcomes')}, slowest {result.get('slowest_cpu_ms')} ms"
    print(f"{name:<14}{told}" + (f"\nFINDING {finding}" if finding else ""), flush=True)
    return result


def _kept(path: Path, out: Path) -> str:
    target = out.with_name(f"fuzz-{path.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())
    return str(target)


# In the process of a target


def _work(options: Options) -> None:
    """Runs a target and ends the process: with 0 after the last input, with another status at a finding."""
    if importlib.util.find_spec("atheris") is None:
        _run_seeded(options)
    else:
        _run_atheris(options)


class _Tally:
    """Counts outcomes and times, and writes them to a file now and then, so that a crash leaves what was before it."""

    def __init__(self, target: Any, options: Options) -> None:
        self._target, self._options = target, options
        self._outcomes: Counter[str] = Counter()
        self._slowest_s, self._slowest_bytes = 0.0, 0

    def __call__(self, data: bytes) -> None:
        started = time.process_time()  # of this process: the machine may be busy with others
        outcome = self._target.outcome(data)
        seconds = time.process_time() - started
        self._outcomes[outcome] += 1
        if seconds > self._slowest_s:
            self._slowest_s, self._slowest_bytes = seconds, len(data)
        done = sum(self._outcomes.values())
        if done % _CHECK_EVERY == 0 or done >= self._options.inputs:
            self._save(done)
        if done >= self._options.inputs:
            os._exit(0)

    def _save(self, done: int) -> None:
        import resource

        result = {
            "inputs": done,
            "outcomes": dict(self._outcomes),
            "slowest_cpu_ms": round(1000 * self._slowest_s, 1),
            "slowest_bytes": self._slowest_bytes,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        unfinished = self._options.out.with_suffix(".new")
        unfinished.write_text(canonical_json(result))
        unfinished.replace(self._options.out)  # a crash leaves the report before it


def _run_atheris(options: Options) -> None:
    import atheris

    with atheris.instrument_imports(include=["runtime", "PIL"]):
        from benchmarks.fuzz_targets import targets
    folder = options.out.parent
    target = next(target for target in targets(folder) if target.name == options.target)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            # Of what libFuzzer keeps, most is far from valid: a mutant of a seed comes further.
            return target.mutate(random.choice(target.seeds), random)[:max_size]
        mutant: bytes = atheris.Mutate(data, max_size)
        return mutant

    flags = {
        "seed": options.seed + 1,  # 0 would take the time
        "runs": 10 * options.inputs,  # the tally ends the process, by its own count
        "timeout": options.timeout_s,
        "rss_limit_mb": options.memory_mb,
        "max_len": 1 << 16,
        "artifact_prefix": f"{folder}/finding-",
    }
    program = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), str(corpus)]
    atheris.Setup(program, _Tally(target, options), custom_mutator=mutate)
    atheris.Fuzz()


def _run_seeded(options: Options) -> None:
    import faulthandler
    import resource

    from benchmarks.fuzz_targets import targets

    folder = options.out.parent
    target = next(target for target in targets(folder) if target.name == options.target)
    random, tally = Random(options.seed), _Tally(target, options)
    resource.setrlimit(resource.RLIMIT_AS, (options.memory_mb << 20,) * 2)
    while True:
        data = target.mutate(random.choice(target.seeds), random)
        (folder / "finding-input").write_bytes(data)
        # Ends the process from outside of Python's loop, which a decoder in C does not come back to.
        faulthandler.dump_traceback_later(options.timeout_s, exit=True)
        tally(data)


if __name__ == "__main__":
    sys.exit(main())
