"""Operations counted by hand, and the peaks of data sheets."""

import dataclasses

import jax
import pytest
from jax.sharding import AxisType

from maxsep.config import ModelConfig
from maxsep.measure import flops

BENCH = ModelConfig(layers=4, d_model=256, heads=8, experts=16, top_k=2, d_ff=512, vocab_size=8192)


def test_flops_of_the_bench_shape():
    # 161.5 GFLOP a step of 4096 tokens, as the peers' scripts count them.
    assert round(flops.flops_per_token(BENCH, 256) * 4096 / 1e9, 1) == 161.5
    layer = 4 * 256 * 256 + 2 * 256 * 128 + 256 * 16 + 2 * 3 * 256 * 512
    assert flops.flops_per_token(BENCH, 256) == 6 * (4 * layer + 256 * 8192)


@pytest.mark.parametrize(
    "change, products",
    [
        ({"kv_heads": 2}, -4 * 2 * 256 * 6 * 32),  # of keys and values, 6 heads less
        ({"head_dim": 64}, 4 * (4 * 256 * 8 * 32 + 2 * 8 * 32 * 128)),  # projections and scores twice as wide
        ({"activation": "gelu"}, -4 * 2 * 256 * 512),  # one matrix less in each chosen expert
        ({"top_k": 3}, 4 * 3 * 256 * 512),
        ({"experts": 32}, 4 * 256 * 16),  # only the router sees them
        ({"vocab_size": 8191}, -256),
        ({"tied_embedding": True}, 0),  # the output head is multiplied all the same
        ({"remat": "full"}, 0),  # what is computed twice is needed once
        ({"capacity_factor": 1.0}, 0),
        ({"shared_experts": 1, "shared_gate": True}, 4 * (3 * 256 * 512 + 256)),
        # A layer's router and two experts, and an MLP instead.
        ({"dense_layers": 1, "dense_d_ff": 1000}, 3 * 256 * 1000 - 256 * 16 - 2 * 3 * 256 * 512),
    ],
)
def test_flops_follow_the_model(change, products):
    other = dataclasses.replace(BENCH, **change)
    assert flops.flops_per_token(other, 256) - flops.flops_per_token(BENCH, 256) == 6 * products


def test_longer_sequences_only_add_attention():
    assert flops.flops_per_token(BENCH, 512) - flops.flops_per_token(BENCH, 256) == 6 * 4 * 2 * 256 * 128


@dataclasses.dataclass
class Device:
    device_kind: str
    platform: str = "gpu"


@pytest.mark.parametrize(
    "kind, bfloat16, tf32, float32",
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA A10G", 70, 35, 31.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("Tesla V100-SXM2-16GB", None, 15.7, 15.7),  # without TF32
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("TPU v4", 275, 275 / 3, 275 / 6),
        ("TPU v5 lite", 197, 197 / 3, 197 / 6),
        ("TPU v5p", 459, 459 / 3, 459 / 6),
        ("Radeon", None, None, None),
    ],
)
def test_peaks_by_device_kind(kind, bfloat16, tf32, float32):
    for products, expected in (("bfloat16", bfloat16), ("tf32", tf32), ("float32", float32)):
        peak = flops.peak_flops(Device(kind), products)
        assert peak == (expected and pytest.approx(expected * 1e12))


def test_no_name_hides_a_longer_one():
    kinds = list(flops.PEAKS)
    assert not [(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :] if b.startswith(a)]


def test_machine_peak():
    assert flops.machine_peak([Device("NVIDIA H200")] * 4, "bfloat16") == pytest.approx(4 * 989.4e12)
    assert flops.machine_peak([Device("NVIDIA H200"), Device("Radeon")], "bfloat16") is None
    # Simulated devices share one machine: its peak is measured once, whatever mesh is set.
    mesh = jax.make_mesh((4, 4), ("attention", "expert"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        assert 1e9 < flops.machine_peak(jax.devices(), "tf32") < 1e14  # which a CPU makes in float32
    assert flops.mfu(1000.0, 2e9, 4e12) == 0.5
    assert flops.mfu(1000.0, 2e9, None) is None
