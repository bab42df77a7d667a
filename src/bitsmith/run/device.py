"""Where forwards and searches run: on the processor, or through torch on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, get_args

import torch

from bitsmith.errors import BitsmithError, printable
from bitsmith.formats.accelerator import Accelerator, accelerated_by

DeviceName = Literal["cpu", "cuda", "auto"]
CPU = torch.device("cpu")

_TASK_TOKENS = 512
_GPU_TASK_TOKENS = 8192

_current = CPU


def device_named(name: str) -> torch.device:
    """Return the device called `cpu` or `cuda`; `auto` is a GPU where torch sees one, else the processor.

    Raises BitsmithError for another name, and for `cuda` where torch sees none.
    """
    if name not in get_args(DeviceName):
        raise BitsmithError(f"unknown device {printable(name)!r}; known: {', '.join(get_args(DeviceName))}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise BitsmithError(
            f"--device cuda: {why} (torch {torch.__version__}); --device auto takes the CPU then"
        )
    return torch.device("cuda", torch.cuda.current_device())


def described(device: torch.device) -> str:
    """Return a device's name for a record: `cpu`, or `cuda` with the GPU's name and torch's version."""
    if device.type != "cuda":
        return device.type
    return f"cuda ({torch.cuda.get_device_name(device)}, torch {torch.__version__})"


def current_device() -> torch.device:
    """Return the device that `on_device` set, the processor outside it."""
    return _current


@contextmanager
def on_device(name: str) -> Iterator[torch.device]:
    """Let forwards, searches and error feedback of the process run on the device called `name`.

    In float32, without TF32. May be nested. Raises as `device_named` does.
    """
    device = device_named(name)
    with using(device):
        yield device


@contextmanager
def using(device: torch.device) -> Iterator[None]:
    """Let forwards, searches and error feedback of the process run on `device`."""
    global _current  # noqa: PLW0603 (one device at a time, like the limit of BLAS threads)
    before, _current = _current, device
    try:
        with _without_tf32() if device.type == "cuda" else nullcontext(), accelerated_by(_encoder(device)):
            yield
    finally:
        _current = before


def _encoder(device: torch.device) -> Accelerator | None:
    if device.type == "cpu":
        return None
    from bitsmith.run.torch_encode import TorchEncoder  # noqa: PLC0415 (itself imports this module)

    return TorchEncoder(device)


@contextmanager
def _without_tf32() -> Iterator[None]:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def task_tokens(device: torch.device) -> int:
    """Return how many tokens a task of a forward takes: a GPU wants more at a time than a core."""
    return _TASK_TOKENS if device.type == "cpu" else _GPU_TASK_TOKENS
