"""The fused loss on a CUDA device against the reference in float64 on the CPU, and what only a device can show."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from test_cpp_ext_reference import DENOMINATORS, FORMS, GOLDEN, LADDER, labels_of, rows

from cpp_ext import ops
from cpp_ext.ops import fused_soft_contrastive_loss
from cpp_ext.reference import soft_contrastive_loss

KINDS = list(itertools.product(FORMS, DENOMINATORS))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
USUAL = {"temperature": 0.07, "eta": 0.5}

# Largest error allowed, relative to the largest number of the reference. The errors beside them are those of the
# emulated kernels (test_cpp_ext_cuda_emulated.py); a device's tensor cores add with a few bits less, hence the room.
LOSS_TOLERANCE = {
    torch.float64: 1e-13,  # 2.7e-15
    torch.float32: 2e-5,  # 1.3e-6
    torch.bfloat16: 2e-4,  # 1.3e-6
    torch.float16: 2e-4,  # 1.6e-6
}
GRADIENT_TOLERANCE = {
    torch.float64: 1e-13,  # 3.7e-15
    torch.float32: 2e-5,  # 1.3e-6
    torch.bfloat16: 8e-3,  # 3.5e-3
    torch.float16: 3e-3,  # 6.7e-4
}
TF32_TOLERANCE = 1e-2  # 1.8e-3

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _device():
    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail(
                "REQUIRE_GPU=1, but torch sees no CUDA device: check the driver, and that torch is a CUDA build"
            )
        pytest.skip("no CUDA device")
    problem = ops.fused_problem("cuda")
    assert problem is None, problem


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def batch(n, c=128, j=None, dtype=torch.float32, seed=0):
    return rows(n, c, seed, dtype), labels_of(n, seed), rows(n // 2 if j is None else j, c, seed + 1, dtype)


def run(loss, z, labels, h, **options):
    """Losses per row and the gradients of z and h for an incoming gradient that differs from row to row."""
    z, h = z.detach().clone().requires_grad_(), h.detach().clone().requires_grad_()
    per_row = loss(z, labels, h, **options, reduction="none", trace_gradient=True)
    upstream = torch.linspace(-1, 2, len(z), dtype=per_row.dtype, device=z.device)
    gradients = torch.autograd.grad(per_row, (z, h), upstream, allow_unused=True)
    return per_row.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip((z, h), gradients, strict=True))


def error_of(found, expected):
    if not expected.numel():
        return 0.0
    scale = float(expected.abs().max())
    difference = float((found.cpu().double() - expected).abs().nan_to_num(nan=float("inf")).max())
    return difference / scale if scale else difference


def assert_equals_reference(z, labels, h, *, loss=None, gradient=None, device="cuda", **options):
    found = run(fused_soft_contrastive_loss, z.to(device), labels.to(device), h.to(device), **options)
    expected = run(soft_contrastive_loss, z.double(), labels, h.double(), **options)
    for actual, wanted, tolerance in zip(
        found,
        expected,
        (
            loss or LOSS_TOLERANCE[z.dtype],
            gradient or GRADIENT_TOLERANCE[z.dtype],
            gradient or max(GRADIENT_TOLERANCE[x.dtype] for x in (z, h)),
        ),
        strict=True,
    ):
        assert error_of(actual, wanted) <= tolerance
    assert [x.dtype for x in found[1:]] == [z.dtype, h.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LADDER)
@pytest.mark.parametrize(("form", "denominator"), KINDS)
def test_ladder_equals_reference(n, form, denominator, dtype):
    for c, j in itertools.product((1, 3, 128, 130) if n < 1000 else (128,), sorted({0, n // 2, 40})):
        assert_equals_reference(*batch(n, c, j, dtype), form=form, denominator=denominator, **USUAL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_and_large_batches_equal_reference(dtype):
    assert_equals_reference(*batch(300, 2048, 150, dtype), **USUAL)
    assert_equals_reference(*batch(4097, 128, 2000, dtype), **USUAL)


@pytest.mark.parametrize(("form", "denominator"), KINDS)
def test_tf32_equals_reference_less_closely(tf32, form, denominator):
    z, labels, h = batch(257)
    options = {"form": form, "denominator": denominator, **USUAL}
    assert_equals_reference(z, labels, h, loss=TF32_TOLERANCE, gradient=TF32_TOLERANCE, **options)


def test_tf32_is_used_only_when_it_is_allowed(tf32):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 needs compute capability 8.0")
    z, labels, h = (x.cuda() for x in batch(257))
    rounded = fused_soft_contrastive_loss(z, labels, h, **USUAL)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not torch.equal(rounded, fused_soft_contrastive_loss(z, labels, h, **USUAL))


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{c['name']}-{c['form']}-{c['denominator']}" for c in GOLDEN])
def test_golden_case_is_reproduced(case):
    z = torch.tensor(case["embeddings"], dtype=torch.float64).reshape(len(case["labels"]), -1).cuda().requires_grad_()
    h = torch.tensor(case["traces"], dtype=torch.float64).reshape(-1, z.shape[1]).cuda()
    labels = torch.tensor(case["labels"], dtype=torch.int64).cuda()
    options = {key: case[key] for key in ("temperature", "eta", "form", "denominator")}
    loss = fused_soft_contrastive_loss(z, labels, h, **options)
    (gradient,) = torch.autograd.grad(loss, z)
    expected = torch.tensor(case["grad_embeddings_of_mean"], dtype=torch.float64).reshape(z.shape)
    assert loss.item() == pytest.approx(case["loss_mean"], rel=1e-12, abs=1e-12)
    # The golden gradients are central differences.
    assert float((gradient.cpu() - expected).abs().max()) <= 1e-8 * max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize("options", [{"temperature": 100.0}, {"eta": -2.0, "temperature": 0.5}, {"eta": 0.0}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_settings_equal_reference(dtype, options):
    # Of temperature 100, float16's gradients are near its smallest numbers.
    gradient = 4 * GRADIENT_TOLERANCE[dtype]
    for form in FORMS:
        assert_equals_reference(*batch(70, 16, 30, dtype), form=form, gradient=gradient, **(USUAL | options))


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("form", ["log_sum", "log_mean"])
def test_temperature_of_a_thousandth_equals_reference(form, denominator):
    # Exponents up to 1000: their rounding to float32 alone is 3e-5.
    options = {"temperature": 1e-3, "eta": 0.5, "form": form, "denominator": denominator}
    assert_equals_reference(*batch(90, 32, 45), gradient=5e-4, **options)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(("form", "denominator"), KINDS)
def test_one_class_equals_reference(form, denominator, label):
    z, _, h = batch(66, 8, 30)
    assert_equals_reference(z, torch.full((66,), label), h, form=form, denominator=denominator, **USUAL)


def test_duplicates_equal_reference():
    z, labels, h = batch(80, 12, 20)
    z[5] = z[70] = z[6]
    for form, denominator in KINDS:
        assert_equals_reference(z, labels, h, form=form, denominator=denominator, **USUAL)


@pytest.mark.parametrize(("z_type", "h_type"), list(itertools.product(DTYPES, DTYPES)))
def test_traces_of_another_type_equal_reference(z_type, h_type):
    z, labels, h = batch(70, 24, 30, torch.float64)
    assert_equals_reference(z.to(z_type), labels, h.to(h_type), **USUAL)


def test_rows_in_any_memory_layout_give_the_same():
    z, labels, h = (x.cuda() for x in batch(40, 24, 10))
    expected = run(fused_soft_contrastive_loss, z, labels, h, **USUAL)
    # The last starts 4 bytes after a multiple of 16.
    for given in (z.T.contiguous().T, torch.cat((z, z), 1)[:, 24:], torch.cat((z.new_zeros(1), z.flatten()))[1:]):
        found = run(
            fused_soft_contrastive_loss, given.reshape(40, 24) if given.ndim == 1 else given, labels, h, **USUAL
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_same_input_gives_the_same_bits(form, dtype):
    given = [x.cuda() for x in batch(500, 128, 300, dtype)]
    first = run(fused_soft_contrastive_loss, *given, form=form, **USUAL)
    for _ in range(5):
        again = run(fused_soft_contrastive_loss, *given, form=form, **USUAL)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_kernels_run_on_the_current_stream():
    z, labels, h = (x.cuda() for x in batch(300))
    expected = run(fused_soft_contrastive_loss, z, labels, h, **USUAL)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Long work first: on another stream the kernels would read the rows before they are written.
        torch.cuda._sleep(50_000_000)
        written = torch.zeros_like(z).copy_(z)
        found = run(fused_soft_contrastive_loss, written, labels, h, **USUAL)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_device(form):
    z, labels, h = (x.cuda() for x in batch(300))
    expected = run(fused_soft_contrastive_loss, z, labels, h, form=form, **USUAL)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        found = run(fused_soft_contrastive_loss, z, labels, h, form=form, **USUAL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_forward_and_backward_are_captured_in_a_cuda_graph():
    z, labels, h = (x.cuda() for x in batch(200))
    expected = run(fused_soft_contrastive_loss, z, labels, h, **USUAL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(fused_soft_contrastive_loss, z, labels, h, **USUAL)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_label_that_is_neither_makes_its_loss_nan():
    z, labels, h = (x.cuda() for x in batch(70, 8, 30))
    labels[3] = 2
    loss = fused_soft_contrastive_loss(z, labels, h, **USUAL, reduction="none")
    assert torch.isnan(loss).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("moved", ["embeddings", "labels", "traces"])
def test_tensor_on_another_device_is_refused(moved):
    given = dict(zip(("embeddings", "labels", "traces"), (x.cuda() for x in batch(8, 4, 3)), strict=True))
    given[moved] = given[moved].cpu()
    arguments = (*given.values(), 0.07, 0.5, 0, 0, True, False)
    with pytest.raises(RuntimeError, match=r"must be on one (CUDA )?device"):
        torch.ops.ntf.soft_contrastive_forward.default(*arguments)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_the_current_one_is_used():
    torch.cuda.set_device(0)
    assert_equals_reference(*batch(257), device="cuda:1", **USUAL)
    assert torch.cuda.current_device() == 0


def test_compiled_step_has_no_graph_break_and_the_same_result():
    z, labels, h = (x.cuda() for x in batch(100))
    z.requires_grad_()

    def step(embeddings):
        return fused_soft_contrastive_loss(embeddings, labels, h, **USUAL)

    eager = step(z)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(z)
    assert compiled.item() == pytest.approx(eager.item(), rel=1e-6)
    expected, found = (torch.autograd.grad(loss, z)[0] for loss in (eager, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_memory_of_forward_and_backward_is_linear_in_the_batch(form):
    def peak_bytes(n):
        given = [x.cuda() for x in batch(n, 64)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(fused_soft_contrastive_loss, *given, form=form, **USUAL)
        return torch.cuda.max_memory_allocated() - before

    small, large = peak_bytes(8192), peak_bytes(32768)
    assert large <= 4.5 * small
    assert large < 32768 * 32768  # not even a byte for each pair
