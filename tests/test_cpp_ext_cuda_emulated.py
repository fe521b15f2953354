"""The CUDA kernels, run on the CPU by tests/cuda_emulation, against the reference in float64.

The same source that nvcc compiles is compiled by the host compiler; barriers, shuffles and tensor core instructions
come from the emulation. What this cannot show is what only a device has: its own scheduling and its own arithmetic.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import cuda_emulated
import pytest
import torch
from cuda_emulated import DENOMINATORS, FORMS, Case, Result

from cpp_ext.reference import soft_contrastive_loss

GOLDEN = json.loads((Path(__file__).parent / "data" / "soft_contrastive.json").read_text())["cases"]
KINDS = list(itertools.product(FORMS, DENOMINATORS))

pytestmark = pytest.mark.skipif(bool(cuda_emulated.reason_to_skip()), reason=cuda_emulated.reason_to_skip())


@dataclasses.dataclass(frozen=True)
class KernelPath:
    """One way through the kernels, and the largest error allowed, relative to the largest number of the array."""

    dtype: torch.dtype
    tf32: bool
    loss: float
    gradient: float


# The largest errors measured over the ladder, the widths and the splits stand beside each: loss, gradients. Gradients
# of a half type carry its rounding (half a unit: 4.9e-4, 3.9e-3); TF32 rounds the rows and the weights to 11 bits.
PATHS = {
    "float64": KernelPath(torch.float64, False, 2e-14, 2e-14),  # 2.7e-15, 3.7e-15
    "float32": KernelPath(torch.float32, False, 1e-5, 1e-5),  # 1.3e-6, 1.3e-6
    "tf32": KernelPath(torch.float32, True, 5e-3, 5e-3),  # 1.3e-3, 1.8e-3
    "float16": KernelPath(torch.float16, False, 1e-5, 2e-3),  # 1.6e-6, 6.3e-4
    "bfloat16": KernelPath(torch.bfloat16, False, 1e-5, 8e-3),  # 1.3e-6, 3.5e-3
}
# The golden gradients are central differences.
GOLDEN_VALUE_TOLERANCE = 1e-13
GOLDEN_GRADIENT_TOLERANCE = 1e-8


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    return cuda_emulated.build(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="session")
def address_harness(tmp_path_factory):
    """AddressSanitizer and UndefinedBehaviorSanitizer, with a forbidden gap behind each piece of the workspace."""
    return build_with_gaps(tmp_path_factory.mktemp("address"))


@pytest.fixture(scope="session")
def thread_harness(tmp_path_factory):
    return cuda_emulated.build(tmp_path_factory.mktemp("thread"), sanitizer="thread")


def build_with_gaps(folder, file="soft_contrastive.cu", old="}", new="}"):
    """The harness under AddressSanitizer; `old` and `new` as in `patched_sources`, or nothing."""
    take = "    used_ += (bytes + 255) / 256 * 256;\n"
    gap = (
        "    used_ += (bytes + 255) / 256 * 256 + 4096;\n"
        "    if (piece) __asan_poison_memory_region(reinterpret_cast<char*>(piece) + bytes,\n"
        "                                           base_ + used_ - reinterpret_cast<char*>(piece) - bytes);\n"
    )
    csrc = cuda_emulated.patched_sources(folder, "soft_contrastive.cu", take, gap)
    source = csrc / "soft_contrastive.cu"
    source.write_text("#include <sanitizer/asan_interface.h>\n" + source.read_text())
    if old != new:
        cuda_emulated.replace_once(csrc / file, old, new)
    return cuda_emulated.build(folder, csrc=csrc, sanitizer="address")


def rows(count, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=1).to(dtype)


def case_of(path, n, j, c, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    grad_loss = torch.randn(n, generator=generator, dtype=torch.float64).to(cuda_emulated.wide_of(path.dtype))
    case = Case(rows(n, c, seed + 1, path.dtype), labels, rows(j, c, seed + 2, path.dtype), grad_loss, tf32=path.tf32)
    return dataclasses.replace(case, **options)


def expected_of(case):
    """Loss and both gradients by the reference, in float64."""
    z, h = case.embeddings.double().requires_grad_(), case.traces.double().requires_grad_()
    loss = soft_contrastive_loss(
        z,
        case.labels,
        h,
        temperature=case.temperature,
        eta=case.eta,
        form=case.form,
        denominator=case.denominator,
        reduction="none",
        trace_gradient=True,
    )
    grad_z, grad_h = torch.autograd.grad(loss, (z, h), case.grad_loss.double(), allow_unused=True)
    return loss.detach(), *(torch.zeros_like(x) if g is None else g for x, g in ((z, grad_z), (h, grad_h)))


def error(actual, expected):
    """Largest difference over the largest expected number; of zeros, the largest number itself."""
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    difference = (actual.double() - expected).abs().nan_to_num(nan=math.inf).max()
    return float(difference) / (scale if scale > 0 else 1.0)


def errors_of(case: Case, result: Result):
    assert result.errors == (0, 0, 0)
    loss, grad_z, grad_h = expected_of(case)
    return {
        "loss": error(result.loss, loss),
        "embeddings": error(result.grad_embeddings, grad_z),
        "traces": error(result.grad_traces, grad_h),
    }


def assert_equal_reference(executable, path, cases, folder, *, factor=1.0):
    for case, result in zip(cases, cuda_emulated.run(executable, cases, folder), strict=True):
        found = errors_of(case, result)
        where = f"{tuple(case.embeddings.shape)} x {len(case.traces)} {case.form} {case.denominator}: {found}"
        assert found["loss"] <= factor * path.loss, where
        assert found["embeddings"] <= factor * path.gradient, where
        assert found["traces"] <= factor * path.gradient, where


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("n", "c"), [(0, 3), (1, 1), (2, 3), (33, 130), (127, 64), (257, 128)])
def test_ladder_equals_reference(harness, tmp_path, name, n, c):
    cases = [
        case_of(PATHS[name], n, j, c, form=form, denominator=denominator)
        for j in ((0, n // 2, 40) if n < 257 else (n // 2,))
        for form, denominator in KINDS
    ]
    assert_equal_reference(harness, PATHS[name], cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_thousand_rows_equal_reference(harness, tmp_path, name):
    cases = [
        case_of(PATHS[name], 1000, j, c, form=form, denominator=denominator)
        for j, c in ((500, 128), (1300, 3))
        for form, denominator in KINDS
    ]
    assert_equal_reference(harness, PATHS[name], cases, tmp_path)


@pytest.mark.parametrize("name", PATHS)
def test_every_width_equals_reference(harness, tmp_path, name):
    cases = [
        case_of(PATHS[name], 40, 20, c, form=form)
        for c in (0, 1, 3, 64, 128, 130, 300)
        for form in ("log_sum", "literal")
    ]
    assert_equal_reference(harness, PATHS[name], cases, tmp_path)


@pytest.mark.parametrize("name", PATHS)
def test_columns_split_over_blocks_equal_reference(harness, tmp_path, name):
    """The same batch with one block a row tile and with as many as there are column tiles."""
    sizes = []
    for multiprocessors in (1, 100):
        cases = [
            case_of(PATHS[name], 200, 150, 40, form=form, denominator=denominator, multiprocessors=multiprocessors)
            for form, denominator in KINDS
        ]
        assert_equal_reference(harness, PATHS[name], cases, tmp_path)
        sizes.append(cuda_emulated.run(harness, cases[:1], tmp_path)[0].workspace_bytes)
    assert all(many > few for few, many in zip(*sizes, strict=True)), sizes


@pytest.mark.parametrize("name", PATHS)
def test_equal_inputs_give_equal_bits(harness, tmp_path, name):
    case = case_of(PATHS[name], 130, 70, 20, multiprocessors=100)
    first, second = cuda_emulated.run(harness, [case, case], tmp_path)
    for field in dataclasses.fields(Result)[:7]:
        assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name


# Exponents up to 1000: measured 5.7e-14 in float64; 8.3e-6 in the gradients of float32, the others as above.
@pytest.mark.parametrize(("name", "factor"), [("float64", 10), ("float32", 10), ("float16", 1), ("bfloat16", 1)])
def test_temperature_of_a_thousandth_equals_reference(harness, tmp_path, name, factor):
    # float32 has no room for the literal form here: its loss is an exponential of hundreds.
    forms = FORMS if name == "float64" else ("log_sum", "log_mean")
    cases = [
        case_of(PATHS[name], 90, 45, 32, temperature=1e-3, form=form, denominator=denominator)
        for form in forms
        for denominator in DENOMINATORS
    ]
    assert_equal_reference(harness, PATHS[name], cases, tmp_path, factor=factor)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 100.0}, {"eta": -2.0, "temperature": 0.5}, {"eta": 0.0}, {"eta": 7.0, "temperature": 0.5}],
    ids=["temperature 100", "eta -2", "eta 0", "eta 7"],
)
def test_odd_settings_equal_reference(harness, tmp_path, name, options):
    cases = [case_of(PATHS[name], 70, 30, 16, form=form, **options) for form in FORMS]
    # At temperature 100 gradients of float16 come near its smallest numbers: measured 2.9e-3; the others as above.
    assert_equal_reference(harness, PATHS[name], cases, tmp_path, factor=4 if name == "float16" else 1)


def test_tf32_stays_finite_at_extreme_temperatures(harness, tmp_path):
    cases = [case_of(PATHS["tf32"], 70, 30, 16, temperature=temperature) for temperature in (1e-3, 100.0)]
    for result in cuda_emulated.run(harness, cases, tmp_path):
        for field in dataclasses.fields(Result)[:7]:
            assert torch.isfinite(getattr(result, field.name)).all(), field.name


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_equals_reference(harness, tmp_path, name, label):
    cases = [
        case_of(PATHS[name], 66, 30, 8, labels=torch.full((66,), label), form=form, denominator=denominator)
        for form, denominator in KINDS
    ]
    assert_equal_reference(harness, PATHS[name], cases, tmp_path)


@pytest.mark.parametrize("name", PATHS)
def test_duplicates_and_rows_that_are_not_normalised_equal_reference(harness, tmp_path, name):
    case = case_of(PATHS[name], 80, 20, 12)
    z = case.embeddings.clone()
    z[5] = z[70] = z[6]
    scaled = (rows(80, 12, 1) * torch.linspace(0.1, 3, 80)[:, None]).to(z.dtype)
    cases = [dataclasses.replace(case, embeddings=x, temperature=0.5, form=form) for x in (z, scaled) for form in FORMS]
    assert_equal_reference(harness, PATHS[name], cases, tmp_path)


def test_a_single_row_of_a_class_contributes_nothing(harness, tmp_path):
    labels = torch.tensor([0, 0, 1, 0])
    for form, denominator in KINDS:
        case = case_of(PATHS["float64"], 4, 3, 5, labels=labels, form=form, denominator=denominator)
        (result,) = cuda_emulated.run(harness, [case], tmp_path)
        found = [result.loss[2], result.log_keys[2], result.log_positives[2], result.log_traces[2]]
        assert found == [0.0] * 4
        assert not result.pull[2:3].any()


def test_statistics_are_what_they_are_called(harness, tmp_path):
    case = case_of(PATHS["float64"], 50, 30, 7, form="literal")
    (result,) = cuda_emulated.run(harness, [case], tmp_path)
    s = case.embeddings @ case.embeddings.T / case.temperature
    t = case.embeddings @ case.traces.T / case.temperature * case.eta * (1 - 2 * case.labels)[:, None]
    others = ~torch.eye(50, dtype=torch.bool)
    same = others & (case.labels[:, None] == case.labels[None, :])
    for found, expected in (
        (result.log_keys, s.masked_fill(~others, -math.inf).logsumexp(1)),
        (result.log_positives, s.masked_fill(~same, -math.inf).logsumexp(1)),
        (result.log_traces, t.logsumexp(1)),
        (result.pull, t.softmax(1) @ case.traces),
    ):
        assert error(found, expected) <= PATHS["float64"].loss


@pytest.mark.parametrize("name", PATHS)
def test_loss_without_a_backward_equals_reference(harness, tmp_path, name):
    for form, denominator in KINDS:
        case = case_of(PATHS[name], 100, 70, 20, form=form, denominator=denominator, save=False)
        (result,) = cuda_emulated.run(harness, [case], tmp_path)
        assert error(result.loss, expected_of(case)[0]) <= PATHS[name].loss
        assert result.pull.numel() == 0


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{c['name']}-{c['form']}-{c['denominator']}" for c in GOLDEN])
def test_golden_case_is_reproduced(harness, tmp_path, case):
    z = torch.tensor(case["embeddings"], dtype=torch.float64).reshape(len(case["labels"]), -1)
    h = torch.tensor(case["traces"], dtype=torch.float64).reshape(-1, z.shape[1])
    labels = torch.tensor(case["labels"], dtype=torch.int64)
    options = {key: case[key] for key in ("temperature", "eta", "form", "denominator")}
    grad_loss = torch.full((len(z),), 1 / max(len(z), 1), dtype=torch.float64)
    (result,) = cuda_emulated.run(harness, [Case(z, labels, h, grad_loss, **options)], tmp_path)
    expected_gradient = torch.tensor(case["grad_embeddings_of_mean"], dtype=torch.float64).reshape(z.shape)
    torch.testing.assert_close(
        result.loss,
        torch.tensor(case["loss_per_row"], dtype=torch.float64),
        rtol=GOLDEN_VALUE_TOLERANCE,
        atol=GOLDEN_VALUE_TOLERANCE,
    )
    scale = max(float(expected_gradient.abs().max()), 1.0)
    assert float((result.grad_embeddings - expected_gradient).abs().max()) <= GOLDEN_GRADIENT_TOLERANCE * scale


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_weights_below_the_smallest_half_number_still_count(harness, tmp_path, name):
    """An incoming gradient of 1e-6 over 127 rows makes weights of 1e-8; float16 ends at 6e-8."""
    case = case_of(PATHS[name], 127, 60, 64, temperature=0.01, grad_loss=torch.full((127,), 1e-6))
    (result,) = cuda_emulated.run(harness, [case], tmp_path)
    # Measured 4.9e-4 and 2.4e-3.
    assert error(result.grad_embeddings, expected_of(case)[1]) <= 1e-2


def test_label_that_is_neither_makes_its_loss_and_the_gradients_nan(harness, tmp_path):
    case = case_of(PATHS["float32"], 70, 30, 8)
    case.labels[3] = 2
    for form in FORMS:
        (result,) = cuda_emulated.run(harness, [dataclasses.replace(case, form=form)], tmp_path)
        assert torch.isnan(result.loss).nonzero().flatten().tolist() == [3]
        assert torch.isnan(result.grad_embeddings).all()
        assert torch.isnan(result.grad_traces).all()


def test_nan_in_an_embedding_is_not_hidden(harness, tmp_path):
    case = case_of(PATHS["float32"], 70, 30, 8)
    case.embeddings[3, 2] = math.nan
    for form in FORMS:
        (result,) = cuda_emulated.run(harness, [dataclasses.replace(case, form=form)], tmp_path)
        assert torch.isnan(result.loss).all()
        assert torch.isnan(result.grad_embeddings).all()


def test_half_type_without_tensor_cores_is_refused(harness, tmp_path):
    case = case_of(PATHS["bfloat16"], 20, 10, 8, tensor_cores=False)
    (result,) = cuda_emulated.run(harness, [case], tmp_path)
    assert result.errors == (801, 801, 801)  # cudaErrorNotSupported


def test_tf32_is_left_alone_without_tensor_cores(harness, tmp_path):
    case = case_of(PATHS["tf32"], 20, 10, 8, tensor_cores=False)
    assert_equal_reference(harness, PATHS["float32"], [case], tmp_path)


def test_workspace_is_linear_in_the_rows(harness, tmp_path):
    cases = [case_of(PATHS["float32"], n, n, 1) for n in (1000, 2000)]
    few, many = (result.workspace_bytes for result in cuda_emulated.run(harness, cases, tmp_path))
    # Four bytes a number; 192 rows for each of 4 multiprocessors; 16 numbers a row and the sums of the columns.
    for bytes_, n in ((few, 1000), (many, 2000)):
        assert max(bytes_) <= 4 * 16 * (n + 192 * 4) + 64 * 1024
    assert all(b <= 2 * a for a, b in zip(few, many, strict=True)), (few, many)


def sanitizer_cases():
    """Small, but with ragged tiles, several tiles a block and several splits on every path and in every kernel."""
    tiny = [(n, j, c, 4, form) for n, j, c in ((0, 3, 2), (1, 1, 1), (2, 0, 3)) for form in FORMS]
    several_tiles = [(130, 70, 5, 1, "log_sum"), (130, 70, 5, 1, "literal")]
    several_splits = [(70, 66, 130, 100, "log_sum"), (70, 3, 130, 100, "log_mean")]
    return [
        case_of(path, n, j, c, form=form, multiprocessors=multiprocessors)
        for path in PATHS.values()
        for n, j, c, multiprocessors, form in (*tiny, *several_tiles, *several_splits)
    ]


def test_no_access_is_out_of_bounds_or_undefined(address_harness, tmp_path):
    done = cuda_emulated.execute(address_harness, sanitizer_cases(), tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr == ""


def test_no_access_to_shared_memory_races(thread_harness, tmp_path):
    done = cuda_emulated.execute(thread_harness, sanitizer_cases(), tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr == ""


# The emulation must see defects, or the tests above mean nothing: three are planted into copies of the sources.


def test_planted_write_out_of_bounds_is_reported(tmp_path):
    old = "if (first + row < a.owners.rows && column0 + column < a.owners.width) {"
    executable = build_with_gaps(
        tmp_path, "soft_contrastive_pairs.cuh", old, "if (column0 + column < a.owners.width) {"
    )
    done = cuda_emulated.execute(executable, [case_of(PATHS["float32"], 67, 40, 5)], tmp_path)
    assert done.returncode != 0
    assert re.search(r"AddressSanitizer: use-after-poison.*\nWRITE of size", done.stderr), done.stderr[:2000]
    assert "weighted_rows_kernel" in done.stderr


def test_planted_missing_barrier_is_reported(tmp_path):
    old = "    __syncthreads();\n    Math::multiply_scores("
    csrc = cuda_emulated.patched_sources(tmp_path, "soft_contrastive_pairs.cuh", old, "    Math::multiply_scores(")
    executable = cuda_emulated.build(tmp_path, csrc=csrc, sanitizer="thread")
    done = cuda_emulated.execute(executable, [case_of(PATHS["float16"], 67, 40, 5)], tmp_path)
    assert done.returncode == 66, done.stderr[-2000:]
    assert "ThreadSanitizer: data race" in done.stderr
    assert "owner_stage" in done.stderr or "other_stage" in done.stderr


def barriers():
    """File and number of every barrier in the kernels."""
    return [
        (path.name, number)
        for path in sorted(cuda_emulated.CSRC.glob("*.cuh"))
        for number in range(path.read_text().count("__syncthreads();"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "number"), barriers())
def test_every_barrier_is_needed(tmp_path, file, number):
    csrc = cuda_emulated.copied_sources(tmp_path)
    parts = (csrc / file).read_text().split("__syncthreads();")
    (csrc / file).write_text(
        "__syncthreads();".join(parts[: number + 1]) + ";" + "__syncthreads();".join(parts[number + 1 :])
    )
    executable = cuda_emulated.build(tmp_path, csrc=csrc, sanitizer="thread")
    done = cuda_emulated.execute(executable, sanitizer_cases(), tmp_path)
    assert done.returncode == 66, f"no race without barrier {number}: exit {done.returncode} {done.stderr[-2000:]}"


def test_barriers_are_found():
    assert len(barriers()) > 8


def test_planted_wrong_fragment_index_gives_a_wrong_result(tmp_path):
    old = "a[m][1] = pair(corner + 8 * kPitch);"
    csrc = cuda_emulated.patched_sources(tmp_path, "soft_contrastive_tiles.cuh", old, "a[m][1] = pair(corner + 8);")
    executable = cuda_emulated.build(tmp_path, csrc=csrc)
    cases = [case_of(PATHS[name], 67, 40, 32) for name in ("float16", "tf32")]
    half, tf32 = (
        errors_of(case, result)
        for case, result in zip(cases, cuda_emulated.run(executable, cases, tmp_path), strict=True)
    )
    assert min(half["loss"], half["embeddings"], half["traces"]) > 0.01
    assert max(tf32.values()) <= PATHS["tf32"].gradient  # the defect is in the half types' fragments alone


LANE_LEAVES = (
    "soft_contrastive_rows.cuh",
    "  if (i >= a.rows.rows) {\n    return;\n  }\n  const int64_t width",
    "  if (lane == 3) {\n    return;\n  }\n  const int64_t width",
)
BARRIER_FOR_SOME = (
    "soft_contrastive_pairs.cuh",
    "    if (threadIdx.x < Math::kTile && a.pairs) {",
    "    if (threadIdx.x < 7) {\n      __syncthreads();\n    }\n    if (threadIdx.x < Math::kTile && a.pairs) {",
)


@pytest.mark.parametrize(("file", "old", "new"), [LANE_LEAVES, BARRIER_FOR_SOME], ids=["warp instruction", "barrier"])
def test_planted_meeting_that_some_threads_miss_ends_the_emulation(tmp_path, file, old, new):
    csrc = cuda_emulated.patched_sources(tmp_path, file, old, new)
    executable = cuda_emulated.build(tmp_path, csrc=csrc)
    done = cuda_emulated.execute(executable, [case_of(PATHS["float32"], 20, 10, 8)], tmp_path)
    assert done.returncode == 70
    assert "EMULATION:" in done.stderr
