"""What `implementation=None` leaves out: kernels that the GPUs at hand cannot run."""

from types import SimpleNamespace

import jax
import pytest

from pallas_kernels import implementations


@pytest.mark.parametrize(
    ("backend", "capabilities", "foreign"),
    [
        ("cpu", [None], False),
        ("gpu", ["9.0", "9.0"], False),
        ("gpu", ["8.0"], True),
        ("gpu", ["10.0"], True),
        ("gpu", [None], True),
    ],
)
def test_hopper_kernels_are_for_hopper(
    monkeypatch: pytest.MonkeyPatch, backend: str, capabilities: list[str | None], foreign: bool
):
    devices = [SimpleNamespace(compute_capability=capability) for capability in capabilities]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(implementations, "_other_gpus", implementations._other_gpus.__wrapped__)
    assert implementations._foreign("mosaic_gpu") == foreign
    assert not implementations._foreign("mosaic_tpu")
