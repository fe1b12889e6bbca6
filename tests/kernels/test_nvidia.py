"""Where kernels for NVIDIA GPUs can run."""

from types import SimpleNamespace

import jax
import pytest

from maxsep.kernels import nvidia


@pytest.mark.parametrize(
    "capability, says",
    [
        ("8.0", None),
        ("10.0", None),
        ("7.5", "this machine has Some, older than Ampere"),
        ("gfx942", "this machine has Some, which is not NVIDIA's"),  # ROCm's
        (None, "this machine has Some, which is not NVIDIA's"),
    ],
)
def test_since_ampere(monkeypatch, capability, says):
    device = SimpleNamespace(device_kind="Some", **({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert nvidia.obstacle("gpu") == says


def test_a_process_without_a_gpu_compiles_for_one():
    assert nvidia.obstacle("gpu") is None
    assert nvidia.obstacle("tpu") == "the platform is tpu"
