"""Run by test_runtime_scoring_work: scores a collection and is killed over and over, until the results are there.

    killed_scorer.py lines OUT
    killed_scorer.py random MODEL SOURCE OUT KILLS SEED

"lines": each time a child keeps and merges made-up rows and kills itself at one more line of runtime/scoring/work.py
than the child before; then another one goes on undisturbed. One line of JSON each: whether it was killed, what stands
in the results file and beside it, and which parts were scored, in order. "random": children run `ntf score` and are
killed at random moments; one line of JSON: how many parts each child left behind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from runtime.cli import main as ntf
from runtime.scoring import work as work_module
from runtime.scoring.listing import picture_from_line
from runtime.scoring.results import require_results_path
from runtime.scoring.rows import Row
from runtime.scoring.sources import Picture
from runtime.scoring.work import Configuration, Work, is_begun

PICTURES, PART_SIZE = 3, 2
# To load takes a child about 0.3 s, and to score about 0.7 s.
LONGEST_S = 1.0


def kill_at_each_line(out):
    os.fsync = lambda handle: None  # a kill takes nothing from the kernel; power failures are not tested here
    log = out.with_name("scored")
    lines, killed = 0, True
    while killed:
        log.write_text("")
        killed = os.WIFSIGNALED(os.waitpid(forked(lambda lines=lines: traced(out, log, lines)), 0)[1])
        if killed and (is_begun(out) or not out.exists()):
            score_made_up(out, log)
        print(json.dumps([killed, out.read_text(), sorted(os.listdir(out.parent)), log.read_text().split()]))
        for path in out.parent.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        lines += 1


def traced(out, log, lines):
    sys.settrace(killer(lines))
    score_made_up(out, log)
    sys.settrace(None)


def killer(lines):
    """A trace function that kills the process when it comes to the line after these many of work.py."""

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename != work_module.__file__:
            return None
        if event == "line":
            lines -= 1
        if lines < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def score_made_up(out, log):
    """What the command does, with rows that need no model; `log` gets the number of each part that is kept."""
    require_results_path(out, overwrite=is_begun(out))
    with Work(out) as work:
        spec = work.list_pictures(Picture(f"{number}.png") for number in range(PICTURES))
        configuration = Configuration(
            "/made-up", spec.pictures, spec.sha256, PART_SIZE, "model", "0" * 64, "none", "fp32", "0"
        )
        work.begin(configuration)
        for number, lines in work.listed(work.missing()):
            work.commit(number, [Row(picture_from_line(line).name, "real", 0.5, 0.25, None) for line in lines])
            with log.open("a") as file:
                file.write(f"{number}\n")
        work.finish()


def kill_at_random(model, source, out, kills, seed):
    moments = random.Random(seed)
    left = []
    while len(left) < kills:
        child = forked(lambda: score_with_model(model, source, out))
        while not is_begun(out):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, LONGEST_S))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):  # it had ended: begin another one
            out.unlink()
            continue
        left.append(len(list(out.parent.glob("*.parts/part-*.jsonl"))))
    print(json.dumps(left))
    return score_with_model(model, source, out)


def score_with_model(model, source, out):
    arguments = ["--model", model, "--out", str(out), "--part-size", "8", "--batch-size", "8"]
    return ntf(["score", source, *arguments, "--backend", "onnxruntime", "--threads", "1"])


def forked(function):
    """Id of a child that does this and ends; nothing has to be imported again."""
    child = os.fork()
    if child == 0:
        os._exit(function() or 0)
    return child


if __name__ == "__main__":
    if sys.argv[1] == "lines":
        kill_at_each_line(Path(sys.argv[2]))
    else:
        model, source, out, kills, seed = sys.argv[2:]
        sys.exit(kill_at_random(model, source, Path(out), int(kills), int(seed)))
