"""Devices as the command line names them."""

from __future__ import annotations

import re

import torch
import typer

from flashtile.plan import Device


def torch_device(name: str | None) -> torch.device:
    """The device of that name, or with None the best one there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r} is not cpu or cuda", param_hint="--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no cuda device here", param_hint="--device")
    return torch.device(name)


def plan_device(name: str | None, arch: str) -> Device:
    """A device to plan for: one that is here, or with an arch any GPU."""
    if arch:
        if not re.fullmatch(r"sm_\d+|gfx[\da-f]+", arch):
            raise typer.BadParameter(
                f"{arch!r} is not of the form sm_90 or gfx942", param_hint="--arch"
            )
        return Device("cuda", arch, has_triton=True)
    return Device.of(torch_device(name))


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type != "cuda":
        return f"{torch.get_num_threads()} CPU threads"
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {Device.of(device).arch}, {gib:.0f} GiB"
