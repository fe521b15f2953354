"""How training computes: number format, memory layout, compilation, batch norm over processes.

Training alone: scores, calibration and what is exported are those of the plain float32 model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import timm.layers
import torch
from torch import Tensor, nn

from cpp_ext.library import BuildError
from train.config import ComputeConfig
from train.errors import ConfigError
from train.ranks import ALONE, Ranks


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The torch device that was asked for; several processes on one machine take a GPU each.

    Raises:
        ConfigError: it is not there, or several processes would have to share one GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.local_size > 1 and name.startswith("cuda"):
        if name != "cuda" or ranks.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"--device {name}",
                got=f"{ranks.local_size} processes and {torch.cuda.device_count()} GPUs on this machine",
                wanted="--device cuda or auto, and one GPU for each process",
                remedy="start as many processes as there are GPUs with torchrun --nproc-per-node, or pass --device cpu",
            )
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name}",
            got=str(error).split("\n", 1)[0],
            wanted="a device that this machine has",
            remedy="pass --device cpu, or auto",
        ) from error
    return device


def check_compute(compute: ComputeConfig, device: torch.device, ranks: Ranks) -> None:
    """Refuse what cannot run here before any work is done.

    Raises:
        ConfigError: naming the option.
    """
    if compute.sync_batch_norm and (device.type != "cuda" or ranks.size == 1):
        raise ConfigError(
            "--sync-batch-norm",
            got=f"{ranks.describe()} on {device.type}",
            wanted="several processes on GPUs: torch has no such batch norm for a CPU",
            remedy="leave it out, or keep the encoder frozen with --no-stage1.train-encoder",
        )
    if compute.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "--precision bf16",
            got=torch.cuda.get_device_name(device),
            wanted="a GPU that computes in bfloat16 (compute capability 8.0 and later)",
            remedy="pass --precision fp32",
        )
    if compute.compile and device.type == "cpu":
        from cpp_ext.toolchain import find_cxx  # which has to know compilers, and with them Unix

        try:
            find_cxx()
        except BuildError as error:
            raise ConfigError(
                "--compile",
                got=error.got,
                wanted="a C++ compiler, which torch.compile uses on a CPU",
                remedy="install one, for example g++, or leave --compile out",
            ) from error


def prepare_model(model: nn.Module, compute: ComputeConfig) -> nn.Module:
    """The model in the layout and with the batch norm that training asks for; the same parameters."""
    if compute.channels_last:
        model.to(memory_format=torch.channels_last)
    return timm.layers.convert_sync_batchnorm(model) if compute.sync_batch_norm else model


def autocast(compute: ComputeConfig, device: torch.device) -> AbstractContextManager[object]:
    """Where bfloat16 is used: convolutions and linear layers; parameters, rows and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute.precision == "bf16")


def compiled(function: Callable[[Tensor], Tensor], compute: ComputeConfig) -> Callable[[Tensor], Tensor]:
    """`function`, compiled where --compile says so."""
    if not compute.compile:
        return function
    # One graph for each batch size: which sizes came first, and so a resume, must not change what is computed.
    chosen: Callable[[Tensor], Tensor] = torch.compile(function, dynamic=False)
    return chosen
