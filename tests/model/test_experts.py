"""Products over grouped rows against a loop over experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small import config

from maxsep.config.layouts import AXES
from maxsep.config.matrices import sizes
from maxsep.kernels import grouped
from maxsep.kernels.grouped import grouped_rows
from maxsep.model.blocked_experts import MOST_ROWS as BLOCK
from maxsep.model.experts import BLOCKS, GROUPED, RAGGED, Experts, form, forms, product
from maxsep.model.parameters import Parameters, drawn
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout
from maxsep.parallel.mesh import make_mesh

COUNTS = {
    "uneven": [3, 2 * BLOCK + 5, 1, 40],
    "empty": [0, 30, 0, 0],
    "none": [0, 0, 0, 0],
    "whole blocks": [BLOCK, 0, 2 * BLOCK, BLOCK],
    "all to the last": [0, 0, 0, 3 * BLOCK + 1],
}
PADDING = 13  # rows that belong to no expert


@pytest.mark.parametrize(
    ("activation", "counts"),
    [
        pytest.param(activation, COUNTS[name], id=f"{name}-{activation}", marks=[] if fast else pytest.mark.slow)
        for name in COUNTS
        for activation, fast in (("swiglu", True), ("gelu", name == "uneven"))
    ],
)
def test_grouped_is_a_loop_over_experts(activation, counts):
    c = config(model={"layers": 1, "experts": 4, "d_model": 6, "d_ff": 5, "activation": activation})
    rng = np.random.default_rng(0)
    rows = sum(counts) + PADDING
    x, g = rng.normal(size=(rows, 6)), rng.normal(size=(rows, 6))
    g[sum(counts) :] = 0  # nobody reads the padding
    share = rng.random(rows)
    with jax.enable_x64(True), jax.set_mesh(make_mesh(c)):
        own = declared_experts(c)
        graph, params = nnx.graphdef(own), drawn(own, 0)["params"]

        def on_device(params, x, share, g, counts):
            def loss(params, x, share):
                product, weights = nnx.merge(graph, params).grouped(x.dtype)
                y = product(x, share, counts, weights)
                return jnp.sum(y * g), y

            (dw, dx, dshare), y = jax.grad(loss, (0, 1, 2), has_aux=True)(*collectives.vary((params, x, share)))
            return jax.tree.map(lambda a: jax.lax.psum(a, AXES), (y, dx, dshare, dw))

        function = jax.jit(jax.shard_map(on_device, in_specs=P(), out_specs=P()))
        whole = jax.device_put(params, NamedSharding(jax.sharding.get_mesh(), P()))
        y, dx, dshare, dw = jax.device_get(function(whole, x, share, g, np.array(counts, np.int32)))
        w = {"in": params["w_in_edf"], "out": params["w_out_efd"]}
        if activation == "swiglu":
            w["gate"] = params["w_gate_edf"]
        w = {name: np.asarray(value) for name, value in w.items()}
    expected = {name: np.zeros_like(value) for name, value in w.items()}
    for row, e in enumerate(np.repeat(range(4), counts)):
        out, saved = oracle.expert_forward(x[row], w, e, activation)
        np.testing.assert_allclose(y[row], share[row] * out, atol=1e-12)
        back = oracle.expert_backward(share[row] * g[row], x[row], w, expected, e, activation, saved)
        np.testing.assert_allclose(dx[row], back, atol=1e-12)
        np.testing.assert_allclose(dshare[row], g[row] @ out, atol=1e-12)
    assert np.isfinite(y).all()
    assert not dx[sum(counts) :].any()
    assert not dshare[sum(counts) :].any()
    names = {"in": "w_in_edf", "gate": "w_gate_edf", "out": "w_out_efd"}
    for name, value in expected.items():
        np.testing.assert_allclose(dw[names[name]], value, atol=1e-11)


def declared_experts(c) -> Experts:
    return Experts(Parameters(Layout.of(c), sizes(c.model), jnp.dtype("float64")), c.model)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_padded_is_a_loop_over_experts(activation):
    c = config(model={"layers": 1, "experts": 3, "d_model": 6, "d_ff": 5, "activation": activation})
    rng = np.random.default_rng(0)
    x, share = rng.normal(size=(3, 7, 6)), rng.random((3, 7))
    with jax.enable_x64(True), jax.set_mesh(make_mesh(c)):
        own = declared_experts(c)
        own = nnx.merge(nnx.graphdef(own), drawn(own, 0)["params"])
        over = NamedSharding(jax.sharding.get_mesh(), P("expert"))
        y = np.asarray(own.padded(jax.device_put(x, over), jax.device_put(share, over)))
        w = {"in": np.asarray(own.w_in_edf[...]), "out": np.asarray(own.w_out_efd[...])}
        if activation == "swiglu":
            w["gate"] = np.asarray(own.w_gate_edf[...])
    for e in range(3):
        for row in range(7):
            out, _ = oracle.expert_forward(x[e, row], w, e, activation)
            np.testing.assert_allclose(y[e, row], share[e, row] * out, atol=1e-12)


@pytest.mark.parametrize("form", [*forms(BLOCKS), *forms(GROUPED)])
@pytest.mark.parametrize("counts", [[1, 0, 0, 1], [3, 9, 0, 20], [0, 0, 0, 0]], ids=str)
def test_every_form_for_inference_is_a_loop_over_experts(counts, form, monkeypatch):
    """Also that each finds its layer, and that none but XLA's product reads an expert without rows."""
    rng, rows = np.random.default_rng(0), sum(counts) + 3
    w = {
        "in": rng.normal(size=(2, 4, 16, 32)),
        "gate": rng.normal(size=(2, 4, 16, 32)),
        "out": rng.normal(size=(2, 4, 32, 16)),
    }
    x = rng.normal(size=(rows, 16))
    stored = {name: of.copy() for name, of in w.items()}
    if form != RAGGED:
        for of in stored.values():
            of[0] = np.nan
            of[1, np.array(counts) == 0] = np.nan
    monkeypatch.setattr(grouped, "grouped_rows", functools.partial(grouped_rows, interpret=True))
    exact = form != GROUPED  # which has no float64
    with jax.enable_x64(exact):
        y = np.asarray(
            jax.jit(product, static_argnums=(0, 1, 6))(
                form, "swiglu", x, np.array(counts, np.int32), (stored["gate"], stored["in"]), stored["out"], 1
            )
        )
    of_layer = {name: of[1] for name, of in w.items()}
    for row, e in enumerate(np.repeat(range(4), counts)):
        out, _ = oracle.expert_forward(x[row], of_layer, e, "swiglu")
        np.testing.assert_allclose(y[row], out, atol=1e-12 if exact else 1e-4 * np.abs(out).max())


def test_blocks_grow_with_the_rows():
    sizes = [form(BLOCKS, rows, 16) for rows in (1, 2, 8, 32, 128, 512, 4096, 2**20)]
    assert sizes == [1, 1, 2, 4, 8, 32, 128, 128]
    assert form(GROUPED, 1, 4) == GROUPED
