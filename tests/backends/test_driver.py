"""What is asked of a driver, by one that stands in for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.backends import driver


class _Driver:
    """Counts what it is asked for; knows two errors."""

    def __init__(self, context: int | None, result: int = 0) -> None:
        self.context, self.result, self.asked = context, result, []  # type: ignore[var-annotated]

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        context._obj.value = self.context
        return self.result

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 10 + ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        context._obj.value = 100 + device.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        self.asked.append(context.value)
        return 0

    def cuGetErrorName(self, result: int, text: Any) -> int:  # noqa: N802
        text._obj.value = {201: b"CUDA_ERROR_INVALID_CONTEXT", 700: b"CUDA_ERROR_X"}.get(result)
        return 0

    def cuGetErrorString(self, result: int, text: Any) -> int:  # noqa: N802
        text._obj.value = {700: b"an address"}.get(result)
        return 0


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes a driver for the process's. The current device is 3."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def take(fake: Any) -> Any:
        monkeypatch.setattr(driver, "library", lambda: fake)
        return fake

    return take


def test_a_thread_without_a_context_gets_the_devices(on_cuda: Any) -> None:
    fake = on_cuda(_Driver(None))
    driver.enter()
    assert fake.asked == [113]


def test_a_threads_own_context_stays(on_cuda: Any) -> None:
    fake = on_cuda(_Driver(5))
    driver.enter()
    assert fake.asked == []


@pytest.mark.parametrize(("name", "value"), [("version.cuda", None), ("cuda.is_initialized", bool)])
def test_no_driver_is_looked_for(
    name: str, value: Any, on_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AMD, on the CPU, and in a forked process."""
    on_cuda(None)
    monkeypatch.setattr(f"torch.{name}", value)
    driver.enter()


def test_a_launch_is_tried_again_where_only_a_context_was_missing(on_cuda: Any) -> None:
    fake = on_cuda(_Driver(None))
    assert driver.refused(201)
    assert fake.asked == [113]


def test_errors_are_raised_by_their_names(on_cuda: Any) -> None:
    on_cuda(_Driver(5))
    with pytest.raises(RuntimeError, match=r"^CUDA driver: CUDA_ERROR_X: an address$"):
        driver.refused(700)
    with pytest.raises(RuntimeError, match=r"^CUDA driver: 12345: unknown$"):
        driver.refused(12345)
    on_cuda(_Driver(None, result=201))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_CONTEXT"):
        driver.enter()
