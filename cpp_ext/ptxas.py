"""What the CUDA kernels take of a device, read from what `ptxas -v` says: `python -m cpp_ext.ptxas`.

The command reads the log that `python -m cpp_ext.build` leaves; it writes JSON, and a table in Markdown beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpp_ext.library import BUILD_COMMAND, FOLDER, BuildError, read_record

LOG = FOLDER / "soft_contrastive.ptxas.log"
RESULTS = FOLDER.parent / "benchmarks" / "results" / "ptxas.json"

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """What one kernel takes on one target.

    Args:
        kernel: its name as in the source, without namespaces and arguments.
        target: for example "sm_90".
        registers: for each thread.
        shared_bytes: static shared memory of a block.
        stack_bytes: local memory of a thread.
        spill_store_bytes: registers written to local memory because there were too few.
        spill_load_bytes: and read back.
    """

    kernel: str
    target: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cpp_ext.ptxas", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; the table goes beside it as .md")
    options = parser.parse_args(arguments)
    record = read_record()
    if not LOG.is_file() or record is None or "nvcc" not in record.compilers:
        print(f"error: there is no {LOG}: run {BUILD_COMMAND} where nvcc is, then this", file=sys.stderr)
        return 1
    write_results(ptxas_table(LOG.read_text(encoding="utf-8")), record.compilers["nvcc"], options.results)
    print(f"wrote {options.results} and {options.results.with_suffix('.md')}")
    return 0


def ptxas_table(log: str) -> list[KernelResources]:
    """Resources of each kernel on each target, ordered by kernel, then target.

    Args:
        log: what nvcc printed with `-Xptxas -v`, of any number of targets.

    Raises:
        BuildError: the log names a kernel but not what it takes, or no kernel at all.
    """
    starts = list(_ENTRY.finditer(log))
    if not starts:
        raise BuildError(
            "the log of ptxas", got="no kernel", wanted="the output of nvcc -Xptxas -v", remedy="build with that option"
        )
    ends = [match.start() for match in starts[1:]] + [len(log)]
    names = _readable([match[1] for match in starts])
    found = [
        _resources(name, match[2], log[match.end() : end]) for name, match, end in zip(names, starts, ends, strict=True)
    ]
    return sorted(found, key=lambda row: (row.kernel, _number(row.target)))


def resource_table(log: str) -> str:
    """The log as a table in Markdown: registers by kernel and target, shared memory, and anything in local memory."""
    return _markdown(ptxas_table(log))


def write_results(table: list[KernelResources], nvcc_version: str, path: Path) -> None:
    """Write the table as JSON to `path` and as Markdown beside it."""
    results = {"environment": {"nvcc": nvcc_version}, "kernels": [dataclasses.asdict(row) for row in table]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(f"{_markdown(table)}\n\n{nvcc_version}\n", encoding="utf-8")


def _resources(kernel: str, target: str, text: str) -> KernelResources:
    spills, used, shared = _SPILLS.search(text), _USED.search(text), _SHARED.search(text)
    if spills is None or used is None:
        raise BuildError(
            f"the log of ptxas about {kernel}",
            got=repr(text[:200]),
            wanted="its registers and spills",
            remedy="build again; parallel compilations may have mixed their lines",
        )
    stack, stores, loads = (int(number) for number in spills.groups())
    return KernelResources(kernel, target, int(used[1]), int(shared[1]) if shared else 0, stack, stores, loads)


def _readable(mangled: list[str]) -> list[str]:
    """Names as in the source where there is a demangler, else as they are."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [_short(name) for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    """weighted_rows_kernel<Simt<float>, PullWeight<float>> from the full name with namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\bntf::cuda::|^void ", "", name)
    return name.partition("(")[0].replace("> >", ">>")


def _number(target: str) -> int:
    digits = re.search(r"\d+", target)
    return int(digits[0]) if digits else 0


def _markdown(table: list[KernelResources]) -> str:
    targets = sorted({row.target for row in table}, key=_number)
    lines = [
        f"| kernel, registers on | {' | '.join(targets)} | shared memory, bytes | local memory, bytes |",
        f"|---|{'---|' * (len(targets) + 2)}",
    ]
    for kernel in dict.fromkeys(row.kernel for row in table):
        rows = {row.target: row for row in table if row.kernel == kernel}
        registers = [str(rows[target].registers) if target in rows else "" for target in targets]
        shared = max(row.shared_bytes for row in rows.values())
        local = max(max(row.stack_bytes, row.spill_store_bytes, row.spill_load_bytes) for row in rows.values())
        lines.append(f"| `{kernel}` | {' | '.join(registers)} | {shared} | {local} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
