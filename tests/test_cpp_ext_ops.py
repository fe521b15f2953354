"""The fused loss against the reference in float64, and its promises on memory, threads, compilers and odd input."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import get_args

import pytest
import torch
from test_cpp_ext_reference import DENOMINATORS, FORMS, GOLDEN, LADDER, REFUSED, labels_of, rows, senseless

import cpp_ext
from cpp_ext import ops, reference
from cpp_ext.library import FOLDER, LIBRARY_FILE, RECORD_FILE, BuildError, read_record
from cpp_ext.ops import fused_soft_contrastive_loss, soft_contrastive_loss
from cpp_ext.toolchain import NoCompilerError, find_cxx

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 17, 128, 130)
USUAL = {"temperature": 0.07, "eta": 0.5}

# Largest error allowed, relative to the largest entry of the reference in float64 on the same rows (values: to 1 where
# that is larger). Beside each the error measured over this file's cases on AVX-512. Half precision is computed in
# float32, so only the rounding of the gradient to its type remains.
VALUE_TOLERANCE = {
    torch.float64: 1e-13,  # 6.2e-15
    torch.float32: 1e-5,  # 2.3e-6, the literal form; 4e-7 otherwise
    torch.bfloat16: 1e-5,  # 2.3e-6
    torch.float16: 1e-5,  # 2.3e-6
}
GRADIENT_TOLERANCE = {
    torch.float64: 1e-13,  # 9.6e-15
    torch.float32: 2e-5,  # 2.8e-6
    torch.bfloat16: 8e-3,  # 3.7e-3, half of the type's spacing
    torch.float16: 1e-3,  # 4.7e-4, half of the type's spacing
}
# Exponents up to 1000: their rounding to float32 alone is 3e-5, and it enters a factor e^x.
COLD_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-12}  # 5.6e-5, 2.7e-13
COMPILER_TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def _library():
    problem = ops.fused_problem("cpu")
    if problem is not None:
        try:
            find_cxx()
        except NoCompilerError as error:
            pytest.skip(f"the fused loss cannot be built here: {error}")
    assert problem is None, problem


def batch(n, c=128, j=None, dtype=torch.float32, seed=0):
    return rows(n, c, seed, dtype), labels_of(n, seed), rows(n // 2 if j is None else j, c, seed + 1, dtype)


def run(loss, z, labels, h, *, upstream, dtype=None, **options):
    """Losses per row and the gradients of z and h for an upstream gradient, in `dtype` or the given types."""
    z = z.detach().to(dtype or z.dtype).requires_grad_()
    h = h.detach().to(dtype or h.dtype).requires_grad_()
    per_row = loss(z, labels, h, **options, reduction="none", trace_gradient=True)
    gradients = torch.autograd.grad(per_row, (z, h), upstream.to(per_row.dtype))
    return per_row.detach(), *gradients


def error_of(found, expected, *, floor=0.0):
    """Largest difference, relative to the largest entry of what was expected."""
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), floor)
    difference = float((found.detach().double() - expected).abs().max())
    return difference / scale if scale else difference


def assert_equals_reference(z, labels, h, *, value=None, gradient=None, **options):
    upstream = torch.linspace(-1, 2, len(z), dtype=torch.float64)
    found = run(fused_soft_contrastive_loss, z, labels, h, upstream=upstream, **options)
    expected = run(reference.soft_contrastive_loss, z, labels, h, upstream=upstream, dtype=torch.float64, **options)
    assert found[0].dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    assert found[1].dtype == z.dtype
    assert found[1].shape == z.shape
    assert found[2].dtype == h.dtype
    assert error_of(found[0], expected[0], floor=1.0) <= (value or VALUE_TOLERANCE[z.dtype])
    assert error_of(found[1], expected[1]) <= (gradient or GRADIENT_TOLERANCE[z.dtype])
    assert error_of(found[2], expected[2]) <= (gradient or max(GRADIENT_TOLERANCE[x.dtype] for x in (z, h)))


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{c['name']}-{c['form']}-{c['denominator']}" for c in GOLDEN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_case_is_reproduced(case, dtype):
    z = torch.tensor(case["embeddings"], dtype=torch.float64).reshape(len(case["labels"]), -1).to(dtype)
    h = torch.tensor(case["traces"], dtype=torch.float64).reshape(-1, z.shape[1]).to(dtype)
    z.requires_grad_()
    labels = torch.tensor(case["labels"], dtype=torch.int64)
    options = {key: case[key] for key in ("temperature", "eta", "form", "denominator")}
    per_row = fused_soft_contrastive_loss(z, labels, h, **options, reduction="none")
    mean = fused_soft_contrastive_loss(z, labels, h, **options)
    (gradient,) = torch.autograd.grad(mean, z)
    expected = torch.tensor(case["loss_per_row"], dtype=torch.float64)
    expected_gradient = torch.tensor(case["grad_embeddings_of_mean"], dtype=torch.float64).reshape(z.shape)
    assert error_of(per_row, expected, floor=1.0) <= VALUE_TOLERANCE[dtype]
    assert mean.item() == pytest.approx(case["loss_mean"], rel=VALUE_TOLERANCE[dtype], abs=VALUE_TOLERANCE[dtype])
    # The golden gradients are central differences, good to 1e-8.
    assert error_of(gradient, expected_gradient, floor=1.0) <= max(GRADIENT_TOLERANCE[dtype], 1e-8)


@pytest.mark.parametrize("n", LADDER)
@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_fused_equals_reference_at_every_size_width_and_type(n, form, denominator):
    widths = WIDTHS if n < 1000 else (128,)
    for dtype, c, j in itertools.product(DTYPES, widths, sorted({0, n // 2, 5})):
        z, labels, h = batch(n, c, j, dtype)
        assert_equals_reference(z, labels, h, form=form, denominator=denominator, **USUAL)


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_any_memory_layout_give_the_same(form):
    z, labels, h = batch(40, 24, 10)
    strided_labels = torch.stack((labels, 1 - labels), 1)[:, 0]
    layouts = {
        "transposed": (z.T.contiguous().T, h.T.contiguous().T),
        "every other column": (z.repeat_interleave(2, 1)[:, ::2], h.repeat_interleave(2, 1)[:, ::2]),
        "every other row": (z.repeat_interleave(2, 0)[::2], h.repeat_interleave(2, 0)[::2]),
        "part of a wider array": (torch.cat((z, z), 1)[:, 24:], torch.cat((h, h), 1)[:, 24:]),
    }
    upstream = torch.linspace(-1, 2, 40)
    expected = run(fused_soft_contrastive_loss, z, labels, h, upstream=upstream, form=form, **USUAL)
    for name, (given_z, given_h) in layouts.items():
        assert not given_z.is_contiguous(), name
        found = run(
            fused_soft_contrastive_loss, given_z, strided_labels, given_h, upstream=upstream, form=form, **USUAL
        )
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs), name


def test_expanded_rows_equal_the_reference():
    z, labels, h = rows(1, 24), labels_of(20), rows(1, 24, seed=1)
    assert_equals_reference(z.expand(20, 24), labels, h.expand(7, 24), **USUAL)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_expanded_upstream_gradients_equal_the_reference(reduction):
    z, labels, h = batch(50, dtype=torch.float64)
    for scale in (1.0, -3.0):
        results = []
        for loss in (fused_soft_contrastive_loss, reference.soft_contrastive_loss):
            leaf = z.clone().requires_grad_()
            value = loss(leaf, labels, h, reduction=reduction, **USUAL)
            results.append((value.detach(), *torch.autograd.grad((scale * value).sum(), leaf)))
        (value, gradient), (expected, expected_gradient) = results
        assert value.shape == expected.shape
        assert error_of(value, expected, floor=1.0) <= VALUE_TOLERANCE[torch.float64]
        assert error_of(gradient, expected_gradient) <= GRADIENT_TOLERANCE[torch.float64]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_one_class_equals_the_reference(form, denominator, label):
    z, _, h = batch(70)
    assert_equals_reference(z, torch.full((70,), label), h, form=form, denominator=denominator, **USUAL)


@pytest.mark.parametrize("form", FORMS)
def test_class_of_one_row_contributes_nothing_and_is_still_a_key(form):
    z, _, h = batch(9)
    labels = torch.tensor([0] * 8 + [1])
    assert_equals_reference(z, labels, h, form=form, **USUAL)
    loss = fused_soft_contrastive_loss(z, labels, h, form=form, reduction="none", **USUAL)
    assert loss[8].item() == 0.0


@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_duplicated_rows_equal_the_reference(form, denominator):
    z, labels, h = batch(60)
    z[10:20], labels[10:20] = z[0], 0
    z[20:30] = z[0]
    h[:5] = z[0]
    assert_equals_reference(z, labels, h, form=form, denominator=denominator, **USUAL)


@pytest.mark.parametrize("eta", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_any_weight_of_the_traces_equals_the_reference(form, eta):
    z, labels, h = batch(65)
    assert_equals_reference(z, labels, h, form=form, temperature=0.2, eta=eta)


@pytest.mark.parametrize("temperature", [0.07, 1.0, 100.0])
@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_warm_temperatures_equal_the_reference(form, denominator, temperature):
    z, labels, h = batch(200)
    assert_equals_reference(z, labels, h, form=form, denominator=denominator, temperature=temperature, eta=0.5)


# The literal form is an exponential, which exponents above 88 take beyond float32 in the reference too: it appears
# where they cancel.
@pytest.mark.parametrize(
    ("form", "eta", "denominator"),
    [*itertools.product(("log_sum", "log_mean"), (1.0,), DENOMINATORS), ("literal", 0.0, "all")],
)
def test_temperature_of_a_thousandth_equals_the_reference(form, eta, denominator):
    z, labels, h = batch(200)
    options = {"form": form, "denominator": denominator, "temperature": 1e-3, "eta": eta}
    for dtype, allowed in COLD_TOLERANCE.items():
        assert_equals_reference(z.to(dtype), labels, h.to(dtype), value=allowed, gradient=allowed, **options)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("form", ["log_sum", "log_mean"])
def test_rows_of_large_and_unequal_norms_equal_the_reference(form, denominator):
    z, labels, h = batch(130, dtype=torch.float64)
    z = z * torch.logspace(-1, 1.5, 130, dtype=torch.float64)[:, None]
    h = 20 * h
    options = {"form": form, "denominator": denominator, "temperature": 0.5, "eta": 0.5}
    for dtype, allowed in COLD_TOLERANCE.items():
        assert_equals_reference(z.to(dtype), labels, h.to(dtype), value=allowed, gradient=allowed, **options)


@pytest.mark.parametrize(("z_type", "h_type"), list(itertools.permutations(DTYPES, 2)))
def test_traces_of_another_type_equal_the_reference(z_type, h_type):
    z, labels, h = batch(40)
    assert_equals_reference(z.to(z_type), labels, h.to(h_type), **USUAL)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_row_that_is_not_a_number_is_seen_in_the_loss(form, bad):
    z, labels, h = batch(40)
    z[7, 3] = bad
    assert not torch.isfinite(fused_soft_contrastive_loss(z, labels, h, form=form, **USUAL))


@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_gradients_of_rows_and_traces_pass_gradcheck(form, denominator):
    z, h = rows(7, c=5).requires_grad_(), rows(3, c=5, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    options = {"temperature": 0.5, "eta": 0.5, "form": form, "denominator": denominator}
    assert torch.autograd.gradcheck(
        lambda x, y: fused_soft_contrastive_loss(x, labels, y, **options, reduction="none", trace_gradient=True), (z, h)
    )


def test_traces_alone_may_need_a_gradient():
    z, labels, h = batch(30, dtype=torch.float64)
    h.requires_grad_()
    results = [
        torch.autograd.grad(loss(z, labels, h, trace_gradient=True, **USUAL), h)[0]
        for loss in (fused_soft_contrastive_loss, reference.soft_contrastive_loss)
    ]
    assert error_of(*results) <= GRADIENT_TOLERANCE[torch.float64]


def test_no_gradient_reaches_the_traces_unless_asked_for():
    z, labels, h = batch(8)
    h.requires_grad_()
    fused_soft_contrastive_loss(z.requires_grad_(), labels, h, **USUAL).backward()
    assert h.grad is None


# opcheck itself looks at the .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("form", range(3))
@pytest.mark.parametrize("denominator", range(2))
def test_operators_pass_opcheck(form, denominator):
    z, labels, h = batch(12, 8)
    settings = (0.1, 0.5, form, denominator)
    leaves = z.clone().requires_grad_(), labels, h.clone().requires_grad_()
    torch.library.opcheck(torch.ops.ntf.soft_contrastive_forward, (*leaves, *settings, True, False))
    torch.library.opcheck(torch.ops.ntf.soft_contrastive_forward, (z, labels, h, *settings, False, False))
    loss, keys, positives, traces, pull = torch.ops.ntf.soft_contrastive_forward(z, labels, h, *settings, True, False)
    upstream = torch.linspace(-1, 1, 12)
    torch.library.opcheck(
        torch.ops.ntf.soft_contrastive_backward,
        (upstream, z, labels, h, loss, keys, positives, pull, *settings, False),
    )
    torch.library.opcheck(
        torch.ops.ntf.soft_contrastive_traces_backward,
        (upstream, z, labels, h, loss, traces, *settings, False),
    )


# The compiler's modules warn about deprecated parts of Python and about the CUDA that is not there.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step_has_no_graph_break_and_the_same_result(compiler, dynamic):
    def step(z, labels, h):
        return soft_contrastive_loss(z, labels, h, trace_gradient=True, backend="fused", **USUAL)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for n in (6, 7, 40):
        z, labels, h = batch(n, 8)
        leaves = z.requires_grad_(), h.requires_grad_()
        found, expected = compiled(z, labels, h), step(z, labels, h)
        assert found.item() == pytest.approx(expected.item(), rel=COMPILER_TOLERANCE)
        for mine, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            assert error_of(mine, theirs.double()) <= COMPILER_TOLERANCE
    with torch.no_grad():
        assert compiled(z, labels, h).item() == pytest.approx(expected.item(), rel=COMPILER_TOLERANCE)


@pytest.mark.parametrize("name", ["soft_contrastive_loss", "fused_soft_contrastive_loss"])
def test_first_call_in_a_process_may_be_a_compiled_one(name):
    program = (
        "import torch, cpp_ext\n"
        f"step = torch.compile(lambda z, y, h: cpp_ext.{name}(z, y, h, temperature=0.1, eta=0.5),"
        " fullgraph=True, backend='eager')\n"
        "z = torch.eye(6)\n"
        "print(step(z, torch.tensor([0, 1] * 3), z[:2]).item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    z = torch.eye(6)
    expected = reference.soft_contrastive_loss(z, torch.tensor([0, 1] * 3), z[:2], temperature=0.1, eta=0.5)
    assert float(done.stdout or "nan") == pytest.approx(expected.item(), rel=1e-5), done.stderr
    assert "the reference runs" not in done.stderr


def test_only_the_loss_of_the_forward_operator_has_a_gradient():
    z, labels, h = batch(8)
    outputs = torch.ops.ntf.soft_contrastive_forward(z.requires_grad_(), labels, h, 0.1, 0.5, 0, 0, True, False)
    assert [output.requires_grad for output in outputs] == [True, False, False, False, False]


def test_autocast_changes_nothing():
    z, labels, h = batch(32)
    z.requires_grad_()
    plain = fused_soft_contrastive_loss(z, labels, h, **USUAL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_soft_contrastive_loss(z, labels, h, **USUAL)
    assert torch.equal(plain, inside)
    assert torch.equal(torch.autograd.grad(plain, z)[0], torch.autograd.grad(inside, z)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_for_a_gradient_that_will_not_come(mode, monkeypatch):
    z, labels, h = batch(32)
    z.requires_grad_()
    saves = []
    monkeypatch.setattr(ops, "_keep_for_gradient", None)  # would fail if it were called
    plain = torch.ops.ntf.soft_contrastive_forward

    class Recording:
        @staticmethod
        def default(*arguments):
            saves.append(arguments[7])
            return plain.default(*arguments)

    monkeypatch.setattr(torch.ops.ntf, "soft_contrastive_forward", Recording)
    with mode():
        assert not fused_soft_contrastive_loss(z, labels, h, **USUAL).requires_grad
    fused_soft_contrastive_loss(z.detach(), labels, h, **USUAL)
    fused_soft_contrastive_loss(z, labels, h, **USUAL)
    assert saves == [False, False, True]


def test_second_derivative_is_refused_in_a_sentence():
    z, labels, h = batch(8, dtype=torch.float64)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(fused_soft_contrastive_loss(z, labels, h, **USUAL), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r'has a first derivative only.*take backend="reference"'):
        gradient.sum().backward()


def test_gradient_by_torch_func_is_refused_by_torch_and_not_wrong():
    z, labels, h = batch(8)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: fused_soft_contrastive_loss(x, labels, h, **USUAL))(z)


def dual(tensor):
    return torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))


def of_dual(function, tensor):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(function(dual(tensor))).tangent


def jvp(function, tensor):
    return torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),))[1]


# torch's forward mode itself uses what torch warns about.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is")
FORWARD_MODE = {
    "jvp": jvp,
    "jacfwd": lambda f, z: torch.func.jacfwd(f)(z),
    "vmap of jvp": lambda f, z: torch.vmap(lambda t: torch.func.jvp(f, (z,), (t,))[1])(torch.stack((z, 2 * z))),
    "outer of two jvp": lambda f, z: jvp(lambda x: jvp(lambda u: u.sum() * f(x), z), z),
    "make_dual": lambda f, z: of_dual(f, z),
    "make_dual of a leaf": lambda f, z: of_dual(f, z.clone().requires_grad_()),
}


@forward_mode
@pytest.mark.parametrize("way", FORWARD_MODE)
def test_derivative_in_forward_mode_is_refused_in_a_sentence_and_not_zero(way):
    z, labels, h = batch(8, dtype=torch.float64)
    losses = [
        lambda x: fused_soft_contrastive_loss(x, labels, h, **USUAL),
        lambda x: fused_soft_contrastive_loss(z, labels, x[:4], trace_gradient=True, **USUAL),
    ]
    for loss in losses:
        with pytest.raises(
            RuntimeError, match=r'got a tensor with a tangent.*take backend="reference" for forward mode'
        ):
            FORWARD_MODE[way](loss, z)


@forward_mode
def test_upstream_gradient_with_a_tangent_is_refused():
    z, labels, h = batch(8)
    per_row = fused_soft_contrastive_loss(z.requires_grad_(), labels, h, reduction="none", **USUAL)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="reverse mode only, got a tensor with a tangent"),
    ):
        torch.autograd.grad(per_row, z, dual(torch.ones(8)))


@forward_mode
def test_tensors_without_a_tangent_pass_where_another_has_one():
    z, labels, h = batch(8)
    with torch.autograd.forward_ad.dual_level():
        # Detached traces have none either.
        found = fused_soft_contrastive_loss(z, labels, dual(h), **USUAL)
    assert torch.equal(found, fused_soft_contrastive_loss(z, labels, h, **USUAL))


@forward_mode
def test_forward_mode_of_the_reference_is_the_product_with_its_gradient():
    z, labels, h = batch(8, dtype=torch.float64)
    found = jvp(lambda x: soft_contrastive_loss(x, labels, h, backend="reference", **USUAL), z)
    leaf = z.clone().requires_grad_()
    fused_soft_contrastive_loss(leaf, labels, h, **USUAL).backward()
    assert found.item() == pytest.approx(leaf.grad.sum().item(), rel=1e-10)


def test_vmap_is_refused_in_a_sentence():
    z, labels, h = batch(8)
    with pytest.raises(RuntimeError, match=r"takes one batch \(N, C\) a call.*under vmap"):
        torch.vmap(lambda x: fused_soft_contrastive_loss(x, labels, h, **USUAL))(torch.stack((z, z)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_same_input_gives_the_same_bits(form, threads):
    z, labels, h = batch(700)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = [
            run(fused_soft_contrastive_loss, z, labels, h, upstream=torch.ones(700), form=form, **USUAL)
            for _ in range(5)
        ]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for mine, theirs in zip(result, results[0], strict=True):
            assert torch.equal(mine, theirs)


def test_number_of_threads_changes_rounding_only():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_equals_reference(*batch(700), **USUAL)
    finally:
        torch.set_num_threads(before)


def test_two_threads_at_once_get_what_each_gets_alone():
    batches = [batch(300, seed=seed) for seed in range(4)]
    alone = [run(fused_soft_contrastive_loss, *b, upstream=torch.ones(300), **USUAL) for b in batches]
    wrong = []

    def work(index):
        for _ in range(10):
            found = run(fused_soft_contrastive_loss, *batches[index], upstream=torch.ones(300), **USUAL)
            if not all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_forked_data_loader_workers_compute_the_same():
    class Losses(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return fused_soft_contrastive_loss(*batch(64, seed=index), **USUAL)

    here = torch.stack([Losses()[index] for index in range(4)])
    loader = torch.utils.data.DataLoader(Losses(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    (there,) = loader
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)


PEAK_PROGRAM = """
import sys, torch
from pathlib import Path
from cpp_ext import soft_contrastive_loss

def resident_kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

def growth_of_peak(n, backend, backward):
    z = torch.nn.functional.normalize(torch.randn(n, 128), dim=1).requires_grad_(backward)
    h = torch.nn.functional.normalize(torch.randn(n // 2, 128), dim=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_kib("VmRSS")
    loss = soft_contrastive_loss(z, torch.arange(n) % 2, h, temperature=0.07, eta=0.5, backend=backend)
    if backward:
        loss.backward()
    return resident_kib("VmHWM") - before

torch.set_num_threads(2)
n, backend, backward = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "backward"
growth_of_peak(256, backend, backward)
print(growth_of_peak(n, backend, backward) / 1024)
"""


def peak_growth_mib(n, backend, what):
    command = [sys.executable, "-c", PEAK_PROGRAM, str(n), backend, what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_memory_of_forward_and_backward_is_linear_in_the_batch():
    assert peak_growth_mib(8192, "fused", "backward") < 64  # measured: 24; one N x N of float32 is 256
    assert peak_growth_mib(2048, "reference", "backward") > 64  # the measurement sees N x N where there is one


@pytest.mark.slow
def test_sixty_five_thousand_rows_fit_in_a_gibibyte():
    assert peak_growth_mib(65536, "fused", "forward") < 1024  # measured: 85; one N x N of float32 is 16384


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_senseless_input_is_refused_with_the_sentence_of_the_reference(change, message):
    tensors, options = senseless(change)
    with pytest.raises(ValueError, match=message):
        fused_soft_contrastive_loss(*tensors, **options)


@pytest.fixture
def new_choices():
    """Choices of "auto" as in a new process, before and after."""
    ops.forget_choices()
    yield
    ops.forget_choices()


def test_device_without_kernels_is_refused_and_auto_takes_the_reference_and_says_so_once(new_choices, caplog):
    z = torch.zeros(4, 3, device="meta")
    with pytest.raises(BuildError, match=r'embeddings on meta.*take backend="reference"'):
        fused_soft_contrastive_loss(z, torch.zeros(4, dtype=torch.int64, device="meta"), z, **USUAL)
    with pytest.raises(BuildError, match="embeddings on meta"):
        ops.resolve_backend("fused", "meta")
    with caplog.at_level(logging.WARNING, logger="cpp_ext.ops"):
        for device in ("meta", "meta", "xpu"):
            assert ops.resolve_backend("auto", device) == "reference"
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "soft contrastive loss: the reference runs, memory grows with N x N"
    ]


def test_first_automatic_choice_is_kept_for_the_process(new_choices, monkeypatch):
    asked = []
    problem = BuildError("the fused loss", got="no library", wanted="one", remedy="build it")

    def missing(device):
        asked.append(device)
        return problem

    with monkeypatch.context() as patch:
        patch.setattr(ops, "fused_problem", missing)
        assert [ops.resolve_backend("auto", "cpu") for _ in range(3)] == ["reference"] * 3
        assert asked == ["cpu"]
    # The library is there now; a computation that began with the reference goes on with it.
    assert ops.resolve_backend("fused", "cpu") == "fused"
    assert ops.resolve_backend("auto", "cpu") == "reference"
    ops.forget_choices()
    assert ops.resolve_backend("auto", "cpu") == "fused"


def test_backend_is_what_was_asked_for(new_choices, monkeypatch):
    assert ops.resolve_backend("auto", "cpu") == ops.resolve_backend("fused", "cpu") == "fused"
    assert ops.resolve_backend("reference", "cpu") == "reference"
    with pytest.raises(ValueError, match="backend must be one of auto, fused, reference, got 'cuda'"):
        ops.resolve_backend("cuda", "cpu")
    ran = []
    for name, module in (("fused", ops), ("reference", reference)):
        function = "fused_soft_contrastive_loss" if name == "fused" else "soft_contrastive_loss"
        monkeypatch.setattr(module, function, lambda *_, name=name, **__: ran.append(name))
    for backend in ("fused", "reference", "auto"):
        soft_contrastive_loss(*batch(4), backend=backend, **USUAL)
    assert ran == ["fused", "reference", "fused"]


def unloaded(monkeypatch):
    monkeypatch.setattr(ops, "_loaded", None)


def test_missing_library_is_refused_and_nothing_stays_half_loaded(tmp_path, monkeypatch):
    unloaded(monkeypatch)
    with pytest.raises(BuildError, match=r"got no library, it has not been built.*run python -m cpp_ext.build"):
        ops.load_library(tmp_path)
    assert ops.loaded_record() is None


def test_library_for_another_cuda_is_refused(monkeypatch):
    unloaded(monkeypatch)
    other = dataclasses.replace(read_record(), cuda_targets=("90",), torch_cuda="11.8")
    monkeypatch.setattr("cpp_ext.library.read_record", lambda folder: other)
    with pytest.raises(BuildError, match="got a library for CUDA 11 beside torch"):
        ops.load_library()


def test_loading_waits_for_the_build_that_is_at_work(tmp_path, monkeypatch, caplog):
    unloaded(monkeypatch)
    (tmp_path / "csrc").mkdir()
    told = []

    def load():
        with pytest.raises(BuildError) as refused:
            ops.load_library(tmp_path)
        told.append(refused.value.got)

    # Nothing is read before the build ends: what it leaves is a record of another version.
    with caplog.at_level(logging.WARNING, logger="cpp_ext.library"):
        handle = os.open(tmp_path / "csrc", os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
        thread = threading.Thread(target=load)
        thread.start()
        while not caplog.records:
            thread.join(0.01)
            assert thread.is_alive()
        for name in (LIBRARY_FILE, RECORD_FILE):
            (tmp_path / name).write_text("{}")
        os.close(handle)
        thread.join()
    assert "a build is at work" in caplog.text
    assert told == ["a stale library, its record is of another version"]


def test_library_is_read_and_loaded_under_the_lock(monkeypatch):
    unloaded(monkeypatch)

    def locked(*_, **__):
        handle = os.open(FOLDER / "csrc", os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
        seen.append(True)
        return read_record()

    seen = []
    monkeypatch.setattr(ops, "loadable_record", locked)
    monkeypatch.setattr(torch.ops, "load_library", locked)
    monkeypatch.setattr(ops, "_register", lambda: None)
    ops.load_library()
    assert seen == [True, True]
    handle = os.open(FOLDER / "csrc", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_numbers_of_the_choices_are_those_of_the_header():
    header = (ROOT / "cpp_ext" / "csrc" / "soft_contrastive.h").read_text()
    for name, choices, allowed in (
        ("Form", ops.FORMS, get_args(reference.Form)),
        ("Denominator", ops.DENOMINATORS, get_args(reference.Denominator)),
    ):
        assert tuple(choices) == allowed
        listed = ", ".join(f"{choice} = {number}" for choice, number in choices.items())
        assert f"enum class {name} : int64_t {{ {listed} }};" in header


def test_public_names_resolve_and_importing_the_package_loads_no_torch():
    program = (
        "import sys, cpp_ext; print('torch' in sys.modules); print([getattr(cpp_ext, n) for n in cpp_ext.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.startswith("False\n["), done.stderr
    assert set(cpp_ext.__all__) == set(cpp_ext._HOME)
    with pytest.raises(AttributeError, match="module 'cpp_ext' has no attribute 'loss'"):
        _ = cpp_ext.loss


def test_build_error_survives_pickling():
    error = BuildError("a", got="b", wanted="c", remedy="d")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a: got b, wanted c: d"


def test_record_reads_back_as_it_was_written():
    record = read_record()
    assert json.loads(record.to_json())["instruction_sets"] == list(record.instruction_sets)
    assert ops.loaded_record() == record
