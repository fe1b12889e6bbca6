"""The oracle's hand-written gradient against differences of its forward pass."""

from dataclasses import replace

import numpy as np
import oracle
import pytest

from maxsep.config import ModelConfig

MODEL = ModelConfig(experts=5, top_k=2, d_model=4, d_ff=3, load_balancing_coefficient=0.3, router_z_coefficient=0.2)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradient_is_the_slope(activation):
    model = replace(MODEL, activation=activation, capacity_factor=1.0)
    rng = np.random.default_rng(0)
    w = {"router": rng.normal(size=(4, 5)), "in": rng.normal(size=(5, 4, 3)), "out": rng.normal(size=(5, 3, 4))}
    if activation == "swiglu":
        w["gate"] = rng.normal(size=(5, 4, 3))
    x, direction, mask = rng.normal(size=(12, 4)), rng.normal(size=(12, 4)), rng.random((12, 2, 4))
    groups = oracle.device_groups(2, 6, 2, 1, None)

    def loss(x, w):
        y, stats, _ = oracle.moe(x, w, model, groups, mask)
        assert 0 < stats["dropped"] < 24
        return (y * direction).sum() + 0.3 * stats["load_balancing"] + 0.2 * stats["router_z"]

    _, _, gradient = oracle.moe(x, w, model, groups, mask, direction)
    for name, value in {"x": x, **w}.items():
        step = rng.normal(size=value.shape)

        def moved(h, name=name, value=value, step=step):
            value = value + h * step
            return loss(value, w) if name == "x" else loss(x, {**w, name: value})

        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
        assert slope == pytest.approx((gradient[name] * step).sum(), rel=1e-6)
