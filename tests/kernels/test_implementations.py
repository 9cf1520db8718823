"""`implementation=None` leaves out kernels that the GPUs at hand cannot run."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import implementations
from pallas_kernels.implementations import Operation


@pytest.mark.parametrize(
    ("backend", "capabilities", "foreign"),
    [
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


def test_an_older_jax_runs_no_hopper_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(implementations, "_HOPPER_JAX", (99, 1))
    operation = Operation("odd", "nowhere", ("reference", "mosaic_gpu"), {"cuda": "mosaic_gpu"})

    def choose(implementation: str | None) -> Any:
        return operation.choose(
            implementation,
            (jnp.ones(2),),
            bound=lambda name: {"reference": lambda x: x + 1}[name],
            refusal=lambda name: None,
        )

    assert choose(None).tolist() == [2, 2]
    message = f"odd by mosaic_gpu: kernels for Hopper GPUs need JAX 99.1 .* is {jax.__version__}"
    with pytest.raises(NotImplementedError, match=message):
        choose("mosaic_gpu")


def test_on_cpus_alone_no_kernel_is_traced_unless_a_program_is_lowered_for_another_platform(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    names = ("mosaic_gpu", "mosaic_tpu")
    assert all(map(implementations._foreign, names))
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        assert not any(map(implementations._foreign, names))


@pytest.mark.parametrize(("backend", "warns", "told"), [("gpu", True, 1), ("gpu", False, 0)])
def test_where_no_kernel_takes_the_arguments_a_gpu_is_warned_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    warns: bool,
    told: int,
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(implementations, "_foreign", lambda name: False)
    names = ("reference", "mosaic_gpu")
    operation = Operation("odd", "nowhere", names, {"cuda": "mosaic_gpu"}, warns=warns)
    implementations.warn.cache_clear()
    for _ in range(2):
        found = operation.choose(
            None,
            (jnp.ones(2),),
            bound=lambda name: lambda x: x + 1,
            refusal=lambda name: "pages of 24 tokens",
        )
        assert found.tolist() == [2, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert (
        messages
        == ["odd: no kernel runs on this GPU, only the slow reference: pages of 24 tokens"] * told
    )
