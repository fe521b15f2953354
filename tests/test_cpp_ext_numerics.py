"""The fused loss on a CPU where numbers are extreme, and where threads meet: against the reference in float64."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cpp_ext import reference
from cpp_ext.ops import DENOMINATORS, FORMS, fused_soft_contrastive_loss, load_library

KINDS = [(form, denominator) for form in FORMS for denominator in DENOMINATORS]


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _library():
    load_library()


def batch(n, c, j, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + c)
    rows = torch.nn.functional.normalize(torch.randn(n + j, c, generator=generator, dtype=torch.float64), dim=1)
    return rows[:n].to(dtype), torch.randint(0, 2, (n,), generator=generator), rows[n:].to(dtype)


def results(loss, z, labels, h, upstream=None, **options):
    """Losses (N,), and the gradients of z and h for an upstream gradient (N,)."""
    z, h = z.detach().requires_grad_(), h.detach().requires_grad_()
    rows = loss(z, labels, h, eta=0.5, reduction="none", trace_gradient=True, **options)
    upstream = torch.ones_like(rows) if upstream is None else upstream.to(rows)
    return rows.detach(), *torch.autograd.grad(rows, (z, h), upstream)


def errors(loss, z, labels, h, upstream=None, **options):
    """Largest errors of losses and both gradients: of the largest loss, and of each row's largest entry."""
    found = results(loss, z, labels, h, upstream, **options)
    expected = results(reference.soft_contrastive_loss, z.double(), labels, h.double(), upstream, **options)
    largest = []
    for mine, right in zip(found, expected, strict=True):
        size = right.abs() if right.ndim == 2 else right.abs().max()
        size = size.amax(1, keepdim=True) if right.ndim == 2 else size
        # A row far below the largest one is judged by a millionth of that.
        size = torch.maximum(size, 1e-6 * right.abs().max())
        largest.append(float(((mine.double() - right).abs() / size).max()))
    return largest


def assert_as_good_as_pytorch(z, labels, h, **options):
    """The fused loss in float32 is as near to float64 as the reference in float32."""
    fused = errors(fused_soft_contrastive_loss, z, labels, h, **options)
    plain = errors(reference.soft_contrastive_loss, z, labels, h, **options)
    for mine, theirs in zip(fused, plain, strict=True):
        assert mine <= 4 * theirs + 2e-6, (fused, plain)


# Both have lost up to 1e-4 of a row's largest entry at 1e-4. Between 0.02 and 0.005 exponents begin to need shifts.
@pytest.mark.parametrize("temperature", [100.0, 0.02, 0.018, 0.012, 0.008, 0.005, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_float32_loses_no_more_digits_than_pytorch_at_any_temperature(temperature, denominator):
    z, labels, h = batch(100, 64, 50)
    assert_as_good_as_pytorch(z, labels, h, temperature=temperature, denominator=denominator)


# Measured: 5e-15.
@pytest.mark.parametrize("temperature", [1e-6, 1e-10, 1e-14, 1e-20])
def test_float64_keeps_its_digits_at_every_temperature(temperature):
    z, labels, h = batch(100, 64, 50, torch.float64)
    assert max(errors(fused_soft_contrastive_loss, z, labels, h, temperature=temperature)) <= 5e-14


# Measured: 1.3e-14, and 1.4e-8 in those rows of the literal form that are millions of times below the largest.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.018, 0.008, 0.005])
def test_duplicated_row_keeps_its_digits_where_exponents_are_large(form, temperature):
    z, labels, h = batch(60, 32, 30, torch.float64)
    z[7] = z[3]
    tolerance = 1e-7 if form == "literal" else 2e-13
    assert max(errors(fused_soft_contrastive_loss, z, labels, h, temperature=temperature, form=form)) <= tolerance


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e3, 1e4, 1e5])
def test_one_row_much_longer_than_the_others_costs_no_more_digits_than_in_pytorch(scale):
    z, labels, h = batch(64, 32, 20)
    z[5] *= scale
    assert_as_good_as_pytorch(z, labels, h, temperature=0.07)


@pytest.mark.parametrize("upstream", [1e-20, 1e20])
@pytest.mark.parametrize("collapsed", [1.0, -1.0])
def test_tiny_and_huge_upstream_gradients_stay_in_range(upstream, collapsed):
    z, labels, h = batch(40, 16, 20)
    z = torch.where(labels[:, None] == 0, z[:1], collapsed * z[:1])
    found = results(fused_soft_contrastive_loss, z, labels, h, torch.full((40,), upstream), temperature=0.0181)
    expected = results(
        reference.soft_contrastive_loss, z.double(), labels, h.double(), torch.full((40,), upstream), temperature=0.0181
    )
    for mine, right in zip(found, expected, strict=True):
        assert float((mine.double() - right).abs().max() / right.abs().max()) <= 1e-4


# The quiet NaN of a CPU, and the one that CUDA hardware produces.
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])
@pytest.mark.parametrize("temperature", [0.07, 0.005])
@pytest.mark.parametrize(("form", "denominator"), KINDS)
def test_not_a_number_shows_in_every_row_in_which_it_shows_in_the_reference(bits, temperature, form, denominator):
    nan = torch.from_numpy(np.array([bits], dtype=np.uint32).view(np.float32))
    options = {"temperature": temperature, "form": form, "denominator": denominator}
    for which in (0, 2):
        inputs = list(batch(40, 16, 20))
        inputs[which][7, 3] = nan[0]
        found = results(fused_soft_contrastive_loss, *inputs, **options)
        expected = results(reference.soft_contrastive_loss, *inputs, **options)
        assert expected[0].isnan().any()
        for mine, right in zip(found, expected, strict=True):
            assert torch.equal(mine.isnan().reshape(len(mine), -1).any(1), right.isnan().reshape(len(right), -1).any(1))


@pytest.mark.parametrize("width", [0, 1, 2048])
def test_narrowest_and_wide_rows_equal_the_reference(width):
    z, labels, h = batch(70, width, 30)
    found = results(fused_soft_contrastive_loss, z, labels, h, temperature=0.5)
    expected = results(reference.soft_contrastive_loss, z.double(), labels, h.double(), temperature=0.5)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_same_input_and_threads_give_the_same_bits_when_blocks_wait_for_each_other(count):
    z, labels, h = batch(2000, 64, 700)
    with threads(count):
        first, *others = (results(fused_soft_contrastive_loss, z, labels, h, temperature=0.07) for _ in range(4))
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def test_calls_from_several_threads_at_once_while_the_instruction_set_changes_stay_right():
    z, labels, h = batch(700, 64, 300)
    expected = results(reference.soft_contrastive_loss, z.double(), labels, h.double(), temperature=0.07)
    wrong, over = [], threading.Event()

    def call():
        for _ in range(15):
            found = results(fused_soft_contrastive_loss, z, labels, h, temperature=0.07)
            for mine, right in zip(found, expected, strict=True):
                if float((mine.double() - right).abs().max() / right.abs().max()) > 1e-5:
                    wrong.append(mine)

    def change():
        names = torch.ops.ntf.instruction_sets().split(",")
        while not over.is_set():
            for name in names:
                torch.ops.ntf.use_instruction_set(name)

    with threads(2):
        callers, changer = [threading.Thread(target=call) for _ in range(2)], threading.Thread(target=change)
        for thread in (*callers, changer):
            thread.start()
        for thread in callers:
            thread.join()
        over.set()
        changer.join()
        torch.ops.ntf.use_instruction_set("")
    assert not wrong


def test_every_instruction_set_of_this_machine_equals_the_reference():
    names = torch.ops.ntf.instruction_sets().split(",")
    try:
        for name in names:
            torch.ops.ntf.use_instruction_set(name)
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
                z, labels, h = batch(257, 130, 100, dtype)
                found = results(fused_soft_contrastive_loss, z, labels, h, temperature=0.07)
                expected = results(reference.soft_contrastive_loss, z.double(), labels, h.double(), temperature=0.07)
                for mine, right in zip(found, expected, strict=True):
                    assert float((mine.double() - right).abs().max() / right.abs().max()) <= tolerance, name
    finally:
        torch.ops.ntf.use_instruction_set("")


def test_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match=r"instruction set must be one of .*, got mmx: choose one of them"):
        torch.ops.ntf.use_instruction_set("mmx")


def test_operators_called_by_hand_refuse_what_does_not_fit():
    z, labels, h = batch(20, 8, 6)
    settings = (0.07, 0.5, 0, 0)
    loss, keys, positives, traces, pull = torch.ops.ntf.soft_contrastive_forward(z, labels, h, *settings, True, False)
    backward, one = torch.ops.ntf.soft_contrastive_backward, torch.ones(20)
    for wrong in (
        (one[:1], z, labels, h, loss, keys, positives, pull),
        (one, z, labels, h, loss[:1], keys, positives, pull),
        (one, z, labels, h, loss, keys[:1], positives, pull),
        (one, z, labels, h, loss, keys, positives[:1], pull),
        (one, z, labels, h, loss, keys, positives, pull[:, :1]),
        (one.double(), z, labels, h, loss, keys, positives, pull),
    ):
        with pytest.raises(RuntimeError, match="pass what the forward gave"):
            backward(*wrong, *settings, False)
    with pytest.raises(RuntimeError, match="pass what the forward gave"):
        torch.ops.ntf.soft_contrastive_traces_backward(one, z, labels, h, loss, traces[:3], *settings, False)
    with pytest.raises(RuntimeError, match="form must be 0 to 2 and denominator 0 or 1, got 9 and 0"):
        torch.ops.ntf.soft_contrastive_forward(z, labels, h, 0.07, 0.5, 9, 0, True, False)
    with pytest.raises(RuntimeError, match="embeddings and traces must be float16, bfloat16, float32 or float64"):
        torch.ops.ntf.soft_contrastive_forward(z.int(), labels, h, *settings, True, False)
