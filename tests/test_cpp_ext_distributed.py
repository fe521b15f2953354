"""The loss over two processes equals the loss of one with the joint batch, and no rank is left waiting.

Each case runs this file as a program on two ranks with gloo, which leave what they found in a file.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cpp_ext import gathered_soft_contrastive_loss, ops, soft_contrastive_loss

FORMS = ("log_sum", "log_mean", "literal")
DENOMINATORS = ("all", "negatives")
WORLD = 2
TIMEOUT_S = 90
OPTIONS = {"temperature": 0.2, "eta": 0.5}
# Rows and traces of each rank.
SHAPES = {
    "even": ((12, 5), (12, 5)),
    "uneven": ((17, 3), (8, 9)),
    "rank without rows and traces": ((0, 0), (14, 4)),
    "no traces anywhere": ((6, 0), (7, 0)),
    "nothing anywhere": ((0, 0), (0, 0)),
}
# Relative to the largest entry; measured: float32 7e-8, float64 7e-14.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def part(rank, shape, *, one_class=False, dtype=torch.float32):
    """Inputs (n, 16), labels and traces (j, 16) of a rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    n, j = shape
    x = torch.randn(n, 16, generator=generator).to(dtype)
    labels = torch.randint(0, 2, (n,), generator=generator)
    h = torch.nn.functional.normalize(torch.randn(j, 16, generator=generator), dim=1).to(dtype)
    return x, labels.fill_(rank) if one_class else labels, h


def linear():
    layer = torch.nn.Linear(16, 16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 16, generator=generator) / 4)
        layer.bias.zero_()
    return layer


def loss_cases():
    for name, form, denominator in itertools.product(SHAPES, FORMS, DENOMINATORS):
        yield name, {"form": form, "denominator": denominator}, False
    for reduction in ("sum", "none"):
        yield "uneven", {"reduction": reduction}, False
    for form in FORMS:
        yield "uneven", {"form": form}, True


# What the two ranks do.


def losses(rank):
    """Value and gradient of each case, with both backends and both kinds of gradient."""
    found = []
    for name, options, one_class in loss_cases():
        for backend, gradient in (("fused", "averaged"), ("fused", "joint"), ("reference", "averaged")):
            if backend == "fused" and ops.fused_problem("cpu"):
                continue
            x, labels, h = part(rank, SHAPES[name][rank], one_class=one_class, dtype=torch.float64)
            x.requires_grad_()
            h.requires_grad_()
            loss = gathered_soft_contrastive_loss(
                x, labels, h, backend=backend, gradient=gradient, **OPTIONS, **options
            )
            loss.square().sum().backward()
            assert h.grad is None
            found.append({"value": loss.tolist(), "gradient": x.grad.tolist(), "scale": gradient})
    return found


def data_parallel(rank):
    """Parameter gradients of a linear layer under DistributedDataParallel."""
    layer = DistributedDataParallel(linear())
    x, labels, h = part(rank, SHAPES["uneven"][rank])
    z = torch.nn.functional.normalize(layer(x), dim=1)
    gathered_soft_contrastive_loss(z, labels, h, **OPTIONS).backward()
    return [parameter.grad.tolist() for parameter in layer.parameters()]


def half_precision(rank):
    x, labels, h = part(rank, SHAPES["uneven"][rank], dtype=torch.bfloat16)
    x.requires_grad_()
    loss = gathered_soft_contrastive_loss(x, labels, h, **OPTIONS)
    loss.backward()
    return {"value": loss.item(), "gradient": x.grad.float().tolist(), "type": str(x.grad.dtype)}


def subgroup(rank):
    """Each rank alone in its own group, then the group of another rank."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    x, labels, h = part(rank, (9, 4))
    alone = gathered_soft_contrastive_loss(x, labels, h, group=groups[rank], **OPTIONS)
    return {"alone": alone.item(), "refused": refusal(x, labels, h, group=groups[1 - rank])}


def without_gradient(rank):
    x, labels, h = part(rank, (9, 4))
    with torch.no_grad():
        return gathered_soft_contrastive_loss(x.requires_grad_(), labels, h, **OPTIONS).item()


def refusals(rank):
    """What each rank is told about input that differs between the ranks, or is wrong on one of them."""
    first = rank == 0
    x, labels, h = part(rank, (6, 3))
    given = {
        "width": (x[:, : 16 - rank], labels, h[:, : 16 - rank], {}),
        "type of the embeddings": (x.double() if first else x, labels, h, {}),
        "type of the traces": (x, labels, h.half() if first else h, {}),
        "temperature": (x, labels, h, {"temperature": 0.2 + 1e-9 * rank}),
        "eta": (x, labels, h, {"eta": 0.5 * rank}),
        "form": (x, labels, h, {"form": FORMS[rank]}),
        "denominator": (x, labels, h, {"denominator": DENOMINATORS[rank]}),
        "reduction": (x, labels, h, {"reduction": ("mean", "sum")[rank]}),
        "gradient": (x, labels, h, {"gradient": ("joint", "averaged")[rank]}),
        "need of a gradient": (x.clone().requires_grad_(first), labels, h, {}),
        "implementation": (x, labels, h, {"backend": ("reference", "fused")[rank]}),
        "labels": (x, labels + 5 if first else labels, h, {}),
        "shape": (x[0] if first else x, labels, h, {}),
        "option": (x, labels, h, {"gradient": "sum" if first else "joint"}),
    }
    told = {name: refusal(*tensors, **options) for name, (*tensors, options) in given.items()}
    # Nobody is out of step afterwards.
    told["afterwards"] = gathered_soft_contrastive_loss(x, labels, h, **OPTIONS).item()
    return told


def refusal(*tensors, **options):
    try:
        gathered_soft_contrastive_loss(*tensors, **(OPTIONS | options))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def death(rank):
    """Rank 1 dies; rank 0 must end too, with an error."""
    if rank == 1:
        os._exit(3)
    gathered_soft_contrastive_loss(*part(rank, (6, 3)), **OPTIONS)


def program(job, rank, meeting, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT_S / 2)
    )
    Path(out).write_text(json.dumps(globals()[job](rank)))
    dist.destroy_process_group()
    # DistributedDataParallel may keep the group, and a thread of it that outlives main aborts the process.
    os._exit(0)


# The tests.


def start(job, folder):
    """The job on two ranks; exit statuses and what each rank wrote, None where it wrote nothing."""
    outs = [folder / f"{job}-{rank}.json" for rank in range(WORLD)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, job, str(rank), str(folder / f"{job}-meeting"), str(outs[rank])],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        messages = [process.communicate(timeout=TIMEOUT_S)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found = [json.loads(out.read_text()) if out.is_file() else None for out in outs]
    return [process.returncode for process in ranks], found, messages


def run(job, folder):
    statuses, found, messages = start(job, folder)
    assert statuses == [0, 0], messages
    return found


def joint(shapes, **options):
    parts = [part(rank, shape, **options) for rank, shape in enumerate(shapes)]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def assert_close(found, expected):
    found = torch.tensor(found, dtype=expected.dtype).reshape(expected.shape)
    if expected.numel():
        allowed = TOLERANCE[expected.dtype] * max(float(expected.abs().max()), 1.0)
        assert float((found - expected).abs().max()) <= allowed


def test_value_and_gradient_are_those_of_one_process_with_the_joint_batch(tmp_path):
    first, second = run("losses", tmp_path)
    assert len(first) == len(second)
    position = 0
    for name, options, one_class in loss_cases():
        x, labels, h = joint(SHAPES[name], one_class=one_class, dtype=torch.float64)
        x.requires_grad_()
        loss = soft_contrastive_loss(x, labels, h, backend="reference", **OPTIONS, **options)
        loss.square().sum().backward()
        for _ in range(1 if ops.fused_problem("cpu") else 3):
            for found in (first[position], second[position]):
                assert_close(found["value"], loss.detach())
            scale = WORLD if first[position]["scale"] == "averaged" else 1
            assert_close([*first[position]["gradient"], *second[position]["gradient"]], scale * x.grad)
            position += 1
    assert position == len(first)


def test_parameters_under_data_parallel_get_the_joint_gradient(tmp_path):
    found = run("data_parallel", tmp_path)
    layer = linear()
    x, labels, h = joint(SHAPES["uneven"])
    z = torch.nn.functional.normalize(layer(x), dim=1)
    soft_contrastive_loss(z, labels, h, backend="reference", **OPTIONS).backward()
    for rank in found:
        for mine, parameter in zip(rank, layer.parameters(), strict=True):
            assert_close(mine, parameter.grad)


def test_half_precision_keeps_its_type_and_sums_in_float32(tmp_path):
    found = run("half_precision", tmp_path)
    x, labels, h = joint(SHAPES["uneven"], dtype=torch.bfloat16)
    x.requires_grad_()
    loss = soft_contrastive_loss(x, labels, h, backend="reference", **OPTIONS)
    loss.backward()
    rows = [*found[0]["gradient"], *found[1]["gradient"]]
    torch.testing.assert_close(torch.tensor(rows), WORLD * x.grad.float(), rtol=0.02, atol=1e-3)
    for rank in found:
        assert rank["type"] == "torch.bfloat16"
        assert rank["value"] == pytest.approx(loss.item(), rel=TOLERANCE[torch.float32])


def test_group_of_one_is_alone_and_a_foreign_group_is_refused(tmp_path):
    for rank, found in enumerate(run("subgroup", tmp_path)):
        expected = soft_contrastive_loss(*part(rank, (9, 4)), backend="reference", **OPTIONS)
        assert found["alone"] == pytest.approx(expected.item(), rel=TOLERANCE[torch.float32])
        assert found["refused"].startswith("group must hold this process")


def test_no_gradient_is_asked_for_under_no_grad(tmp_path):
    expected = soft_contrastive_loss(*joint(((9, 4), (9, 4))), backend="reference", **OPTIONS)
    assert run("without_gradient", tmp_path) == pytest.approx([expected.item()] * 2, rel=TOLERANCE[torch.float32])


def test_ranks_that_disagree_are_told_on_every_rank_and_none_hangs(tmp_path):
    first, second = run("refusals", tmp_path)
    for name in first:
        if name in ("afterwards", "labels", "shape", "option"):
            continue
        for told in (first[name], second[name]):
            expected = f"the {name} must agree between ranks, got a difference between rank 0 and rank 1"
            assert told.startswith(expected), (name, told)
    assert "16 and 15" in first["width"]
    assert first["labels"].startswith("labels must be 0 (real) or 1 (fake)")
    assert first["shape"].startswith("embeddings must be floating point (N, C)")
    assert first["option"].startswith("gradient must be one of averaged, joint, got 'sum'")
    for name in ("labels", "shape", "option"):
        assert "got input that rank 0 refuses" in second[name], name
    assert first["afterwards"] == second["afterwards"]


def test_rank_that_dies_does_not_leave_the_other_waiting(tmp_path):
    statuses, found, _ = start("death", tmp_path)
    assert statuses[1] == 3
    assert statuses[0] not in (0, -9)
    assert found == [None, None]


def test_without_a_process_group_it_is_the_plain_loss():
    x, labels, h = part(0, (20, 6))
    for options in ({}, {"form": "literal", "reduction": "none"}):
        assert torch.equal(
            gathered_soft_contrastive_loss(x, labels, h, **OPTIONS, **options),
            soft_contrastive_loss(x, labels, h, **OPTIONS, **options),
        )
    with pytest.raises(ValueError, match="gradient must be one of averaged, joint, got 'mean'"):
        gathered_soft_contrastive_loss(x, labels, h, gradient="mean", **OPTIONS)


if __name__ == "__main__":
    program(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
