"""The loss benchmark: contenders agree, ratios are taken within rounds, memory is seen, checks can fail."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_loss, conftest, loss_contenders, loss_memory, loss_race, loss_results, roofline
from benchmarks.loss_checks import checks, unmet_of_some
from benchmarks.loss_contenders import (
    BLOCKWISE,
    DTYPES,
    FUSED,
    STRAIGHTFORWARD,
    SUPCON,
    TOLERANCES,
    Contest,
    LossBenchmarkError,
    check_agreement,
    contests,
    expected,
    matmul_precision,
    precisions_of,
    value_and_gradient,
)
from benchmarks.loss_memory import BOTH, FORWARD, MIB, extra_bytes, measured_elsewhere, resident_bytes
from benchmarks.loss_race import MATMUL_OPERATIONS, Clock, Race, clock_of
from benchmarks.tables import README, condensed
from cpp_ext.reference import soft_contrastive_loss

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stand_in(monkeypatch):
    """The contests with the reference in the fused loss's place, wherever the benchmark asks for them."""
    found = contests(fused_loss=soft_contrastive_loss)
    for module in (bench_loss, loss_memory):
        monkeypatch.setattr(module, "contests", lambda device="cpu": found)
    return found


# ---- Contenders ----


@pytest.mark.parametrize("n", [64, 100, 600])
@pytest.mark.parametrize("contest", ["with traces", "without traces"])
def test_all_contenders_return_the_oracles_loss_and_gradient(stand_in, contest, n):
    batch = stand_in[contest].batch(n)
    wanted = expected(stand_in[contest], batch)
    names = list(stand_in[contest].runners(n))
    assert names == {"with traces": [STRAIGHTFORWARD, BLOCKWISE, FUSED], "without traces": [SUPCON, FUSED]}[contest]
    for name in names:
        got = value_and_gradient(stand_in[contest].contenders[name], batch)
        check_agreement(name, got, wanted, TOLERANCES["float32"])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("contest", ["with traces", "without traces"])
def test_half_types_stay_within_their_tolerance(stand_in, contest, precision):
    batch = stand_in[contest].batch(256, dtype=DTYPES[precision])
    wanted = expected(stand_in[contest], batch)
    for name, loss in stand_in[contest].runners(256).items():
        check_agreement(name, value_and_gradient(loss, batch), wanted, TOLERANCES[precision])
        with pytest.raises(LossBenchmarkError, match=r"the (loss|gradient) of"):
            check_agreement(name, value_and_gradient(loss, batch), wanted, TOLERANCES["float32"])


def test_batch_has_the_stated_shapes_and_both_classes(stand_in):
    batch = stand_in["with traces"].batch(100)
    assert (batch.embeddings.shape, batch.traces.shape) == ((100, 128), (50, 128))
    assert batch.labels.sum() == 50
    torch.testing.assert_close(batch.embeddings.norm(dim=1), torch.ones(100))
    peer = stand_in["without traces"].batch(100)
    assert torch.equal(peer.traces, torch.zeros(1, 128))
    assert torch.equal(stand_in["with traces"].batch(100).embeddings, batch.embeddings)


def test_operations_are_counted_as_stated(stand_in):
    n, c, j = 4096, 128, 2048
    counted = stand_in["with traces"].counted_operations(n)
    assert counted["both"] == 2 * n * c * (3 * n + 2 * j)
    assert counted["both"] == counted["forward"] + counted["backward"]
    assert stand_in["without traces"].counted_operations(n)["both"] == 2 * n * c * 3 * n


def test_contenders_leave_where_n_by_n_arrays_no_longer_fit(stand_in):
    assert list(stand_in["with traces"].runners(32768)) == [FUSED]
    with pytest.raises(LossBenchmarkError, match="16384 rows, wanted at most 8192"):
        expected(stand_in["without traces"], stand_in["without traces"].batch(16384))


@pytest.mark.parametrize(
    ("value", "gradient", "what"),
    [
        (1.001, [1.0, 2.0], "loss"),
        (1.0, [1.0, 2.01], "gradient"),
        (float("nan"), [1.0, 2.0], "loss"),
        (1.0, [float("nan"), 2.0], "gradient"),
    ],
)
def test_wrong_result_is_refused(value, gradient, what):
    right = (torch.tensor(1.0), torch.tensor([1.0, 2.0]))
    check_agreement("right", right, right, (1e-6, 1e-5))
    with pytest.raises(LossBenchmarkError, match=f"the {what} of wrong: got an error of"):
        check_agreement("wrong", (torch.tensor(value), torch.tensor(gradient)), right, (1e-6, 1e-5))


def test_fused_loss_that_cannot_run_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(loss_contenders, "fused_problem", lambda device: RuntimeError(f"not built for {device}"))
    with pytest.raises(LossBenchmarkError, match="got this: not built for cuda, wanted the fused loss"):
        contests("cuda")


def test_precision_of_products_is_restored():
    before = torch.get_float32_matmul_precision()
    with matmul_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    with matmul_precision("float32"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


# ---- Time ----


@pytest.fixture
def small_product(monkeypatch):
    """A matrix product that takes no time; its operations are counted as ever."""
    monkeypatch.setattr(loss_race, "MATMUL_SIDE", 8)


def timed_rounds(contest, seconds, *, rounds, n=64):
    """A race whose clock moves only by what is written here: the matrix product, then each pass, round by round."""
    now = itertools.count()
    marks = {}
    readings = iter(seconds)

    def mark():
        marks[key := next(now)] = None
        return key

    race = Race(contest, n, "float32", "cpu", Clock(mark, lambda start, end: next(readings), lambda: None))
    one_round = race.run(rounds)
    for _ in range(rounds):
        one_round()
    assert next(readings, None) is None
    return race


def two_contenders(base, other):
    return Contest(
        "a contest", "log_sum", 0.5, "base", {"base": base, "other": other}, {"base": 999, "other": 999}, (64,)
    )


def passes(batch):
    return batch.embeddings.sum()


@pytest.mark.usefixtures("small_product")
def test_ratios_and_shares_are_medians_of_ratios_within_a_round():
    # Each round: matrix product, base forward, base backward, other forward, other backward. The second round is slow.
    rounds = [(2.0, 4.0, 5.0, 1.0, 2.0), (20.0, 40.0, 50.0, 10.0, 20.0), (2.0, 2.0, 4.0, 1.0, 3.0)]
    race = timed_rounds(two_contenders(passes, passes), itertools.chain(*rounds), rounds=3)
    rows = {(row["contender"], row["direction"]): row for row in race.rows()}
    assert len(rows) == 6
    other = rows["other", "both"]
    assert (other["median_ms"], other["rounds"], other["threads"]) == (4000.0, 3, torch.get_num_threads())
    assert other["times_faster"] == 3.0  # of 9/3, 90/30, 6/4; medians apart would give 9/4
    assert other["times_faster_quartiles"] == (2.25, 3.0)
    assert other["iqr_ms"] == 13500.0  # of 3, 30, 4: quartiles 3.5 and 17
    assert rows["other", "forward"]["times_faster"] == 4.0
    assert rows["other", "backward"]["times_faster"] == 2.5
    assert rows["base", "both"]["times_faster"] == 1.0
    operations = race.contest.counted_operations(64)["both"]
    assert other["matmul_share"] == pytest.approx(operations / MATMUL_OPERATIONS * 2 / 3, rel=1e-3)
    assert other["matmul_gflops"] == pytest.approx(MATMUL_OPERATIONS / 2 / 1e9, rel=1e-3)


@pytest.mark.usefixtures("small_product")
def test_row_without_its_baseline_has_no_ratio():
    contest = two_contenders(passes, passes)
    alone = Contest(**{**vars(contest), "largest_rows": {"base": 10, "other": 999}})
    (row, *_) = timed_rounds(alone, [1.0, 1.0, 1.0], rounds=1).rows()
    assert (row["contender"], row["times_faster"], row["times_faster_quartiles"]) == ("other", None, None)


@pytest.mark.usefixtures("small_product")
def test_contenders_take_turns():
    calls = []
    contest = two_contenders(
        lambda batch: calls.append("base") or passes(batch), lambda batch: calls.append("other") or passes(batch)
    )
    timed_rounds(contest, [1.0] * 15, rounds=3)
    assert calls == ["base", "other"] * 3


@pytest.mark.usefixtures("small_product")
def test_matrix_product_is_timed_five_times_in_a_row_at_most():
    race = timed_rounds(two_contenders(passes, passes), [2.0] + [1.0] * (3 + 12 * 4), rounds=12)
    assert race.matmul_seconds == [2.0] * 3 + [1.0] * 9


@pytest.mark.usefixtures("small_product")
def test_wrong_contender_is_not_timed():
    contest = two_contenders(passes, passes)
    with pytest.raises(LossBenchmarkError, match="the loss of base with N = 64"):
        Race(contest, 64, "float32", "cpu", clock_of("cpu")).check()


def test_clock_of_the_cpu_moves_forward():
    clock = clock_of("cpu")
    start = clock.mark()
    clock.settle()
    assert clock.seconds(start, clock.mark()) > 0


# ---- Memory ----


def test_memory_that_a_call_frees_again_is_seen():
    batch = SimpleNamespace(embeddings=torch.zeros(8, requires_grad=True))

    def hungry(batch):
        return batch.embeddings.sum() + torch.ones(16 * MIB).sum() * 0  # 64 MiB of float32

    assert 60 <= extra_bytes(hungry, batch, BOTH, "cpu") / MIB <= 80
    assert extra_bytes(lambda batch: batch.embeddings.sum(), batch, BOTH, "cpu") / MIB <= 8


def test_memory_of_a_forward_pass_alone_is_without_gradient():
    asked = []
    batch = SimpleNamespace(embeddings=torch.zeros(8, requires_grad=True))
    extra_bytes(lambda batch: asked.append(torch.is_grad_enabled()), batch, FORWARD, "cpu")
    assert asked == [False]


def test_resident_bytes_are_read_in_kibibytes_and_refused_elsewhere():
    assert resident_bytes("VmHWM", "Name:\tpython\nVmHWM:\t   12 kB\n") == 12 * 1024
    with pytest.raises(LossBenchmarkError, match="VmRSS of this process: got no such line"):
        resident_bytes("VmRSS", "Name:\tpython\n")


def test_memory_command_prints_the_row(stand_in, capsys):
    assert loss_memory.main(["--n", "128", "--contender", BLOCKWISE]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["whole_process_mib"] > 50
    assert (row["contest"], row["contender"], row["n"], row["calls"]) == ("with traces", BLOCKWISE, 128, BOTH)


def test_failed_memory_process_is_an_error_that_quotes_it(monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="KeyError: 'nobody'")
    monkeypatch.setattr(loss_memory, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    with pytest.raises(LossBenchmarkError, match=r"exit status 1 and \"KeyError: 'nobody'\""):
        measured_elsewhere("with traces", "nobody", 64)


# ---- Checks ----


def time_row(n, *, contender=FUSED, times_faster=10.0, share=1.0, seconds_per_row2=1e-9, contest="with traces"):
    common = {"contest": contest, "contender": contender, "n": n, "precision": "float32", "threads": 2, "rounds": 5}
    milliseconds = seconds_per_row2 * n * n * 1e3
    return [
        {
            **common,
            "direction": direction,
            "median_ms": milliseconds,
            "iqr_ms": milliseconds / 10,
            "times_faster": times_faster if n <= 8192 else None,
            "times_faster_quartiles": None,
            "matmul_share": share,
            "matmul_gflops": 180.0,
        }
        for direction in ("forward", "backward", "both")
    ]


def memory_row(n, mib, *, contender=FUSED, calls=BOTH, contest="with traces"):
    return {
        "contest": contest,
        "contender": contender,
        "n": n,
        "precision": "float32",
        "calls": calls,
        "extra_mib": mib,
        "whole_process_mib": 500 + mib,
    }


def good_run():
    rows = [row for n in (64, 1024, 8192, 32768) for row in time_row(n)]
    memory = [memory_row(8192, 25.0), memory_row(32768, 100.0), memory_row(65536, 90.0, calls=FORWARD)]
    return rows, memory


def test_run_within_its_bounds_meets_every_check():
    found = checks(*good_run())
    assert len(found) == 8
    assert all(check.met for check in found)


@pytest.mark.parametrize(
    ("missed", "spoil"),
    [
        (0, lambda rows, memory: rows.extend(replace_row(rows, 8192, times_faster=5.99))),
        (1, lambda rows, memory: rows.extend(replace_row(rows, 8192, matmul_share=0.799))),
        (2, lambda rows, memory: rows.extend(replace_row(rows, 1024, times_faster=1.9))),
        (3, lambda rows, memory: rows.extend(replace_row(rows, 64, times_faster=0.99))),
        (4, lambda rows, memory: memory[0].update(extra_mib=64.5)),
        (5, lambda rows, memory: memory[2].update(whole_process_mib=1025.0)),
        (6, lambda rows, memory: memory[1].update(extra_mib=125.0)),
        (7, lambda rows, memory: rows.extend(replace_row(rows, 32768, median_ms=1300.0))),
    ],
)
def test_each_check_can_be_missed_alone(missed, spoil):
    rows, memory = good_run()
    spoil(rows, memory)
    assert [number for number, check in enumerate(checks(rows, memory)) if not check.met] == [missed]
    sentence = checks(rows, memory)[missed].sentence()
    assert re.search(r": wanted at (least|most) [\d.]+, measured [\d.]+$", sentence)


def replace_row(rows, n, **changes):
    """Takes the row of both directions with N rows out, and returns it changed."""
    (row,) = (row for row in rows if row["n"] == n and row["direction"] == "both")
    rows.remove(row)
    return [{**row, **changes}]


def test_what_was_not_measured_is_not_met():
    found = checks([], [])
    assert not any(check.met for check in found)
    assert found[0].sentence().endswith("wanted at least 6, was not measured")
    assert unmet_of_some([], []) == []
    assert unmet_of_some(time_row(8192, times_faster=3.0), []) == [
        "N = 8192, times faster than straightforward PyTorch: wanted at least 6, measured 3"
    ]


def test_figure_that_is_not_a_number_is_not_met():
    assert len(unmet_of_some(time_row(8192, share=float("nan")), [])) == 1


def test_checks_look_at_the_fused_loss_with_traces_only():
    rows, memory = good_run()
    rows += time_row(8192, contender=BLOCKWISE, times_faster=0.1) + time_row(8192, contest="without traces", share=0.1)
    memory += [memory_row(8192, 999.0, contender=STRAIGHTFORWARD)]
    assert all(check.met for check in checks(rows, memory))


# ---- Results ----


def raw_run(names=("first", "second"), *, spoil=None):
    rows, memory = good_run()
    rows += time_row(256, contender=SUPCON, contest="without traces") + time_row(256, contest="without traces")
    memory.append(memory_row(256, 4.0, contender=SUPCON, contest="without traces"))
    if spoil:
        spoil(rows, memory)
    first = {"name": names[0], "group": "a", "extra_info": {"kept_elsewhere": True, "loss_rows": rows}}
    second = {"name": names[1], "group": "b", "extra_info": {"kept_elsewhere": True, "loss_memory": memory}}
    return {"benchmarks": [first, second]}


def test_run_is_condensed_with_its_machine_settings_and_checks():
    results = loss_results.condensed(raw_run(), "cpu", ["first", "second"])
    assert results["settings"]["threads"] == 2
    assert results["environment"]["versions"]["pytorch-metric-learning"]
    assert [check["met"] for check in results["checks"]] == [True] * 8
    assert (len(results["rows"]), len(results["memory"])) == (18, 4)


def test_run_with_a_figure_missing_is_refused():
    raw = raw_run()
    raw["benchmarks"][1]["extra_info"] = {}
    with pytest.raises(LossBenchmarkError, match="the run: got no figures from second, third, wanted all"):
        loss_results.condensed(raw, "cpu", ["first", "second", "third"])


def test_other_tables_leave_the_loss_to_its_own_file():
    assert condensed(raw_run()) == []


def test_tables_show_times_ratios_shares_memory_and_missed_checks():
    raw = raw_run(spoil=lambda rows, memory: rows.extend(replace_row(rows, 1024, times_faster=1.5)))
    shown = loss_results.markdown(loss_results.condensed(raw, "cpu", []))
    assert "| 8192 |  |  | 67.11 ± 3.4 ms | 10.00 | 10.00 | 10.00 |  | 100 % |" in shown
    assert "| 32768 |  |  | 1074 ± 54 ms |  |  |  |  | 100 % |" in shown
    assert "| 256 |  | 4.0 MiB |  |  |" in shown
    assert "| N = 1024, times faster than straightforward PyTorch | at least 2 | 1.5 | **not met** |" in shown


def run_command(monkeypatch, stand_in, folder, *arguments, spoil=None):
    """The command with a made-up run of pytest."""
    names = ("with traces, N = 64, float32", "the rest")
    monkeypatch.setattr(bench_loss, "time_cases", lambda device, largest: [("with traces", 64, "float32")])
    monkeypatch.setattr(bench_loss, "memory_cases", lambda device, largest: [])

    def run(command, **_):
        (raw,) = (part.partition("=")[2] for part in command if part.startswith("--benchmark-json="))
        Path(raw).write_text(json.dumps(raw_run(names, spoil=spoil)))
        return subprocess.CompletedProcess(command, 1 if spoil else 0)

    monkeypatch.setattr(bench_loss, "subprocess", SimpleNamespace(run=run))
    readme = folder / "README.md"
    readme.write_text(f"{loss_results.BEGIN}\n{loss_results.END}\n")
    options = arguments or ("--results", folder / "out" / "loss.json", "--readme", readme)
    return bench_loss.main([str(option) for option in ("--raw", folder / "raw.json", *options)])


def test_command_writes_results_picture_and_readme(monkeypatch, stand_in, tmp_path):
    assert run_command(monkeypatch, stand_in, tmp_path) == 0
    results = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert loss_results.markdown(results) in (tmp_path / "README.md").read_text()


def test_run_without_the_large_batches_leaves_the_committed_results_alone(monkeypatch, stand_in, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, stand_in, tmp_path, "--max-rows", 1024) == 0
    assert {path.name for path in (tmp_path / "build").iterdir()} == {"loss_partial.json", "loss_partial.png"}
    assert not (tmp_path / "benchmarks").exists()
    assert (tmp_path / "README.md").read_text() == f"{loss_results.BEGIN}\n{loss_results.END}\n"


def test_command_fails_after_writing_where_a_check_is_missed(monkeypatch, stand_in, tmp_path):
    assert run_command(monkeypatch, stand_in, tmp_path, spoil=lambda rows, memory: memory[0].update(extra_mib=99)) == 1
    results = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert [check["measured"] for check in results["checks"] if not check["met"]] == [99]


def test_command_without_timings_is_an_error_in_a_sentence(monkeypatch, stand_in, tmp_path, capsys):
    done = subprocess.CompletedProcess([], 4)
    monkeypatch.setattr(bench_loss, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    (tmp_path / "raw.json").write_text("of an older run")
    assert bench_loss.main(["--raw", str(tmp_path / "raw.json")]) == 2
    assert "pytest: got exit status 4 and no " in capsys.readouterr().err


def test_missed_check_fails_the_benchmark_of_its_row():
    bench_loss._refuse_unmet("cpu", *good_run())
    bench_loss._refuse_unmet("cuda", time_row(8192, times_faster=3.0), [])
    with pytest.raises(pytest.fail.Exception, match="wanted at least 6, measured 3"):
        bench_loss._refuse_unmet("cpu", time_row(8192, times_faster=3.0), [])


def test_limit_below_the_smallest_batch_is_refused_in_a_sentence(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(bench_loss, "subprocess", None)  # would fail if it were asked
    for rows in ("63", "10", "-1"):
        assert bench_loss.main(["--max-rows", rows]) == 2
        assert f"--max-rows: got {rows}, wanted 64 or more, the rows of the smallest batch" in capsys.readouterr().err
    assert bench_loss.time_cases("cpu", 64) == [("with traces", 64, "float32")]


def test_every_timed_size_has_its_number_of_rounds(stand_in):
    sizes = {n for _, n, _ in bench_loss.time_cases("cpu", bench_loss.LARGEST_FORWARD)}
    assert sizes == set(bench_loss.ROUNDS)
    assert {n for _, n, _ in bench_loss.time_cases("cpu", 1024)} == {n for n in sizes if n <= 1024}
    cases = bench_loss.memory_cases("cpu", bench_loss.LARGEST_FORWARD)
    assert ("with traces", FUSED, 65536, FORWARD, "float32") in cases
    assert ("with traces", STRAIGHTFORWARD, 8192, BOTH, "float32") in cases
    assert not [case for case in cases if case[1] in (STRAIGHTFORWARD, SUPCON) and case[2] > 8192]


# ---- Devices ----


def test_missing_gpu_is_refused_in_a_sentence(monkeypatch, stand_in, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LossBenchmarkError, match="device cuda: got a machine on which torch sees no CUDA device"):
        precisions_of("cuda")
    assert bench_loss.main(["--device", "cuda"]) == 2
    assert "run this on such a machine, or leave out --device cuda" in capsys.readouterr().err
    assert loss_memory.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
    config = SimpleNamespace(getoption=lambda name, default: "cuda")
    with pytest.raises(pytest.UsageError, match="torch sees no CUDA device"):
        conftest.pytest_configure(config)


def test_unknown_device_is_refused():
    with pytest.raises(LossBenchmarkError, match="device: got tpu, wanted cpu or cuda"):
        precisions_of("tpu")


@pytest.mark.parametrize(
    ("capability", "precisions"),
    [((7, 5), ("float32", "float16")), ((8, 0), ("float32", "tf32", "bfloat16", "float16"))],
)
def test_gpu_is_timed_in_what_its_tensor_cores_take(monkeypatch, capability, precisions):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert precisions_of("cuda") == precisions


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("REQUIRE_GPU") != "1", reason="torch sees no CUDA device"
)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_race_on_a_gpu_times_right_results(precision):
    race = Race(contests("cuda")["with traces"], 256, precision, "cuda", clock_of("cuda"))
    race.check()
    race.run(1)()
    assert all(row["median_ms"] > 0 for row in race.rows())


# ---- What is committed ----


def test_readme_shows_the_committed_loss_results():
    results = json.loads((ROOT / loss_results.RESULTS["cpu"]).read_text())
    readme = (ROOT / README).read_text()
    assert loss_results.markdown(results) in readme
    picture = loss_results.RESULTS["cpu"].with_suffix(".png")
    assert f"({picture})" in readme
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")


def test_committed_loss_results_meet_every_check_on_their_own_rows():
    results = json.loads((ROOT / loss_results.RESULTS["cpu"]).read_text())
    again = checks(results["rows"], results["memory"])
    assert [vars(check) for check in again] == results["checks"]
    assert not [check.sentence() for check in again if not check.met]


def test_committed_roofline_is_what_the_command_makes(tmp_path):
    committed = (ROOT / roofline.DOCUMENT).read_text()
    document = tmp_path / "README.md"
    document.write_text(committed)
    assert roofline.main(["--document", str(document)]) == 0
    assert document.read_text() == committed


def test_roofline_has_the_kernels_constants():
    tiles = (ROOT / "cpp_ext/csrc/soft_contrastive_tiles.cuh").read_text()
    assert f"kTile = sizeof(T) == 8 ? 32 : {roofline.TILE_ROWS};" in tiles
    assert f"kTile = {roofline.TILE_ROWS};" in tiles
    launches = (ROOT / "cpp_ext/csrc/soft_contrastive_cuda.h").read_text()
    assert f"kWeightedRowsBlocks = {roofline.WEIGHTED_ROWS_BLOCKS};" in launches
    assert f"kBlockSharedBytes = {roofline.BLOCK_SHARED_KIB} * 1024;" in launches


@pytest.mark.parametrize("n", [512, 32768])
def test_roofline_counts_the_operations_of_the_benchmark(stand_in, n):
    done = roofline.work(n, input_bytes=4)
    assert done.scores + done.rows == stand_in["with traces"].counted_operations(n)["both"]
    assert done.memory_bytes < done.tile_bytes
    assert roofline.work(n, input_bytes=2).memory_bytes < done.memory_bytes


def test_roofline_by_hand_for_one_size():
    h100 = roofline.GPUS[-1]
    found = roofline.estimate(h100, "float32", 8192)
    assert h100.clock_hz() == pytest.approx(1.983e9, rel=1e-3)
    assert found.products_s == pytest.approx(8 * 8192**2 * 128 / 67e12)
    # z twice and once its gradient, h once, the pull written and read, labels twice, 4 floats a row written and read
    each_array = 8192 * (3 * 512 + 256 + 2 * 512 + 16 + 32)
    assert found.memory_s == pytest.approx(each_array / 3350e9)
    assert found.exponentials_s == pytest.approx(3.5 * 8192**2 / (16 * 132 * h100.clock_hz()))
    # 128 row tiles in 3 splits of 43 tiles are 384 blocks: one wave of 396, or 3 on each of 132 multiprocessors.
    assert found.filled == pytest.approx((128 * 128 / (396 * 43), 128 * 128 / (396 * 43)))


@pytest.mark.parametrize("gpu", roofline.GPUS, ids=lambda gpu: gpu.name)
def test_expected_share_is_a_range_below_the_peak_that_grows_with_n(gpu):
    for precision in gpu.peaks:
        found = [roofline.estimate(gpu, precision, n) for n in roofline.SIZES]
        assert all(0 < one.low <= one.high <= 1 / roofline.MATMUL_EFFICIENCY for one in found)
        assert all(0 < one.filled[0] <= one.filled[1] <= 1 for one in found)
        assert found[-1].high > found[0].high
