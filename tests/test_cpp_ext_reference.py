"""The reference loss against worked cases, a hand-computed one, plain loops, and its promises on odd batches."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from cpp_ext.reference import soft_contrastive_loss

GOLDEN = json.loads((Path(__file__).parent / "data" / "soft_contrastive.json").read_text())["cases"]
FORMS = ("log_sum", "log_mean", "literal")
DENOMINATORS = ("all", "negatives")
LADDER = (0, 1, 2, 33, 127, 257, 1000)

# Measured over all cases: values 1.3e-15, gradients 4.5e-10 relative to the largest entry (the golden gradients
# are central differences).
GOLDEN_VALUE_TOLERANCE = 1e-13
GOLDEN_GRADIENT_TOLERANCE = 1e-8


def rows(n, c=16, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, c, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=1).to(dtype)


def labels_of(n, seed=0):
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))


def loss_by_loops(z, labels, h, temperature, eta, form, denominator):
    """The definition, one anchor at a time, with sums of exponentials and no logsumexp."""
    losses = []
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        keys = [k for k in range(len(z)) if k != i and (denominator == "all" or labels[k] != labels[i])]
        if not positives or not keys or not len(h):
            losses.append(0.0)
            continue
        y = 1 if labels[i] == 0 else -1
        s = {k: float(z[i] @ z[k]) / temperature for k in range(len(z))}
        pull = [y * eta * float(z[i] @ row) / temperature for row in h]
        total = sum(math.exp(s[k]) for k in keys)
        mean_positive = sum(s[p] for p in positives) / len(positives)
        if form == "log_sum":
            losses.append(math.log(total) - mean_positive - math.log(sum(math.exp(v) for v in pull)))
        elif form == "log_mean":
            losses.append(math.log(total) - mean_positive - sum(pull) / len(pull))
        else:
            terms = sum(math.exp(s[p] + v) for p in positives for v in pull)
            losses.append(-terms / (len(positives) * len(pull) * total))
    return losses


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{c['name']}-{c['form']}-{c['denominator']}" for c in GOLDEN])
def test_golden_case_is_reproduced(case):
    z = torch.tensor(case["embeddings"], dtype=torch.float64).reshape(len(case["labels"]), -1)
    z.requires_grad_()
    h = torch.tensor(case["traces"], dtype=torch.float64).reshape(-1, z.shape[1])
    labels = torch.tensor(case["labels"], dtype=torch.int64)
    options = {key: case[key] for key in ("temperature", "eta", "form", "denominator")}
    per_row = soft_contrastive_loss(z, labels, h, **options, reduction="none")
    mean = soft_contrastive_loss(z, labels, h, **options)
    (gradient,) = torch.autograd.grad(mean, z)
    expected_gradient = torch.tensor(case["grad_embeddings_of_mean"], dtype=torch.float64).reshape(z.shape)
    expected = torch.tensor(case["loss_per_row"], dtype=torch.float64)
    torch.testing.assert_close(per_row, expected, rtol=GOLDEN_VALUE_TOLERANCE, atol=GOLDEN_VALUE_TOLERANCE)
    assert mean.item() == pytest.approx(case["loss_mean"], rel=GOLDEN_VALUE_TOLERANCE, abs=GOLDEN_VALUE_TOLERANCE)
    scale = max(float(expected_gradient.abs().max()), 1.0)
    assert float((gradient - expected_gradient).abs().max()) <= GOLDEN_GRADIENT_TOLERANCE * scale


def test_three_orthogonal_rows_by_hand():
    z = torch.eye(3, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    h = z[:1]  # one trace, equal to row 0
    loss = soft_contrastive_loss(z, labels, h, temperature=1.0, eta=0.5, reduction="none")
    # L = log(1 + 1); mean_P = 0; the trace adds 0.5 to row 0 only; row 2 is the only fake: no positive.
    assert loss.tolist() == pytest.approx([math.log(2) - 0.5, math.log(2), 0.0])


@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_loss_equals_plain_loops(form, denominator):
    z, labels, h = rows(9), labels_of(9), rows(4, seed=1)
    loss = soft_contrastive_loss(
        z, labels, h, temperature=0.3, eta=0.7, form=form, denominator=denominator, reduction="none"
    )
    expected = loss_by_loops(z, labels, h, 0.3, 0.7, form, denominator)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_gradient_passes_gradcheck(form, denominator):
    z, labels, h = rows(7, c=5).requires_grad_(), torch.tensor([0, 1, 0, 1, 1, 0, 0]), rows(3, c=5, seed=1)
    assert torch.autograd.gradcheck(
        lambda x: soft_contrastive_loss(
            x, labels, h, temperature=0.5, eta=0.5, form=form, denominator=denominator, reduction="none"
        ),
        (z,),
    )


@pytest.mark.parametrize("n", LADDER)
@pytest.mark.parametrize("form", FORMS)
def test_every_batch_size_is_finite_with_finite_gradient(n, form):
    z = rows(n, dtype=torch.float32).requires_grad_()
    labels = labels_of(n)
    loss = soft_contrastive_loss(z, labels, rows(n // 2, seed=2).float(), temperature=0.07, eta=0.5, form=form)
    loss.backward()
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(
    ("labels", "traces"),
    [([0], 3), ([0, 1], 3), ([0, 0, 1, 1], 0)],
    ids=["one row", "no row has a positive", "no traces"],
)
@pytest.mark.parametrize("form", FORMS)
def test_anchor_without_partners_contributes_zero_and_no_gradient(labels, traces, form):
    z = rows(len(labels)).requires_grad_()
    loss = soft_contrastive_loss(z, torch.tensor(labels), rows(traces, seed=3), temperature=0.1, eta=0.5, form=form)
    loss.backward()
    assert loss.item() == 0.0
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_a_loss_over_all_and_none_over_negatives(label):
    z, labels, h = rows(6), torch.full((6,), label), rows(2, seed=1)
    over_all = soft_contrastive_loss(z, labels, h, temperature=0.2, eta=0.5, reduction="none")
    over_negatives = soft_contrastive_loss(
        z, labels, h, temperature=0.2, eta=0.5, denominator="negatives", reduction="none"
    )
    expected = loss_by_loops(z, labels, h, 0.2, 0.5, "log_sum", "all")
    torch.testing.assert_close(over_all, torch.tensor(expected, dtype=torch.float64))
    assert over_negatives.tolist() == [0.0] * 6


@pytest.mark.parametrize("temperature", [1e-3, 0.07, 100.0])
def test_extreme_temperature_stays_finite_in_float32(temperature):
    z = rows(64, dtype=torch.float32).requires_grad_()
    loss = soft_contrastive_loss(z, labels_of(64), rows(32, seed=1).float(), temperature=temperature, eta=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_non_contiguous_rows_and_duplicates_give_the_same_loss():
    z = rows(12)
    z[3] = z[7]
    labels, h = labels_of(12), rows(5, seed=1)
    strided = z.T.contiguous().T
    assert not strided.is_contiguous()
    options = {"temperature": 0.1, "eta": 0.5}
    torch.testing.assert_close(
        soft_contrastive_loss(strided, labels, h, **options), soft_contrastive_loss(z, labels, h, **options)
    )


def test_incoming_gradient_scales_the_gradient():
    z = rows(10).requires_grad_()
    options = {"temperature": 0.1, "eta": 0.5}
    once = torch.autograd.grad(soft_contrastive_loss(z, labels_of(10), rows(3, seed=1), **options), z)[0]
    thrice = torch.autograd.grad(3 * soft_contrastive_loss(z, labels_of(10), rows(3, seed=1), **options), z)[0]
    torch.testing.assert_close(thrice, 3 * once)


# Measured on these rows: float16 1.9e-5, bfloat16 3.5e-4 relative, the rounding of the rows themselves.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-4), (torch.bfloat16, 2e-3)])
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    z, labels, h = rows(64), labels_of(64), rows(20, seed=1)
    exact = soft_contrastive_loss(z, labels, h, temperature=0.07, eta=0.5)
    half = z.to(dtype).requires_grad_()
    loss = soft_contrastive_loss(half, labels, h.to(dtype), temperature=0.07, eta=0.5)
    loss.backward()
    assert loss.dtype == torch.float32
    assert half.grad.dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)


def test_autocast_does_not_lower_the_precision():
    z, labels, h = rows(32, dtype=torch.float32), labels_of(32), rows(8, seed=1).float()
    plain = soft_contrastive_loss(z, labels, h, temperature=0.07, eta=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = soft_contrastive_loss(z, labels, h, temperature=0.07, eta=0.5)
    assert torch.equal(plain, inside)


def test_no_gradient_reaches_the_traces():
    z, h = rows(8).requires_grad_(), rows(4, seed=1).requires_grad_()
    soft_contrastive_loss(z, labels_of(8), h, temperature=0.1, eta=0.5).backward()
    assert h.grad is None


@pytest.mark.parametrize(("form", "denominator"), list(itertools.product(FORMS, DENOMINATORS)))
def test_gradient_of_rows_and_traces_passes_gradcheck_when_both_are_asked_for(form, denominator):
    z, h = rows(7, c=5).requires_grad_(), rows(3, c=5, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    options = {"temperature": 0.5, "eta": 0.5, "form": form, "denominator": denominator}
    assert torch.autograd.gradcheck(
        lambda x, y: soft_contrastive_loss(x, labels, y, **options, reduction="none", trace_gradient=True), (z, h)
    )


def test_gradient_of_the_traces_moves_the_loss_as_it_says():
    z, labels, h = rows(8), labels_of(8), rows(4, seed=1).requires_grad_()
    loss = soft_contrastive_loss(z, labels, h, temperature=0.1, eta=0.5, trace_gradient=True)
    (gradient,) = torch.autograd.grad(loss, h)
    step = 1e-6 * gradient / gradient.norm()
    moved = soft_contrastive_loss(z, labels, (h + step).detach(), temperature=0.1, eta=0.5)
    assert (moved - loss).item() == pytest.approx(1e-6 * gradient.norm().item(), rel=1e-4)


REFUSED = [
    ({"embeddings": torch.zeros(4)}, r"embeddings must be floating point \(N, C\), got float32 \(4,\)"),
    ({"embeddings": torch.zeros(4, 3, dtype=torch.int64)}, "embeddings must be floating point"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be int64 \(4,\).*got int64 \(3,\)"),
    ({"labels": torch.full((4,), 2)}, r"labels must be 0 \(real\) or 1 \(fake\), got \[2\]: map them first"),
    ({"labels": torch.tensor([0, -1, 1, 0])}, r"labels must be 0 \(real\) or 1 \(fake\), got \[-1\]"),
    ({"traces": torch.zeros(2, 5)}, r"traces must be floating point \(J, 3\), got float32 \(2, 5\)"),
    ({"traces": torch.zeros(2, 3, device="meta")}, "must be on one device, got cpu, cpu and meta"),
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
    ({"temperature": float("inf")}, "temperature and eta must be finite, got inf and 0.5"),
    ({"temperature": torch.tensor(0.1)}, "temperature must be a number, got a tensor"),
    ({"eta": float("nan")}, "temperature and eta must be finite, got 0.1 and nan"),
    ({"form": "sum"}, "form must be one of log_sum, log_mean, literal, got 'sum'"),
    ({"denominator": "none"}, "denominator must be one of all, negatives"),
    ({"reduction": "max"}, "reduction must be one of mean, sum, none"),
]


def senseless(change):
    """Tensors and options of a call that is fine but for `change`."""
    given = {
        "embeddings": torch.zeros(4, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "traces": torch.zeros(2, 3),
        "temperature": 0.1,
        "eta": 0.5,
    } | change
    return [given.pop(name) for name in ("embeddings", "labels", "traces")], given


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_senseless_input_is_refused(change, message):
    tensors, options = senseless(change)
    with pytest.raises(ValueError, match=message):
        soft_contrastive_loss(*tensors, **options)
