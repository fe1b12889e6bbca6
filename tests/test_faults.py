"""Faults planted in what devices add up and send: each is seen in the gradient or the figure that names it."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import first_step, leaves_differ, parameters
from small import config, text

from maxsep.config.layouts import AXES
from maxsep.model import transformer
from maxsep.model.layers import Embedding
from maxsep.parallel import collectives, pipeline
from maxsep.parallel.layout import Layout
from maxsep.parallel.sharding import replicating_axes
from maxsep.training import step
from maxsep.training.step import Program

EXACT = 1e-9
DROPS = {"capacity_factor": 1.0, "capacity_group": 4}


def expert_gradients_not_summed(monkeypatch):
    """Devices that hold the same experts keep one device's gradient."""

    def reduce(self, gradient, spec, zero):
        if "expert" not in replicating_axes(spec):
            first = collectives.index(replicating_axes(spec)) == 0
            gradient = jnp.where(first, gradient, 0)
        return true_reduce(self, gradient, spec, zero)

    true_reduce = Program._reduce
    monkeypatch.setattr(Program, "_reduce", reduce)


def attention_gradients_summed_over_heads_too(monkeypatch):
    def reduce(self, gradient, spec, zero):
        gradient = true_reduce(self, gradient, spec, zero)
        of_heads = "attention" not in replicating_axes(spec) and gradient.ndim == 4
        return lax.psum(gradient, "attention") if of_heads else gradient

    true_reduce = Program._reduce
    monkeypatch.setattr(Program, "_reduce", reduce)


def norm_counts_copies(monkeypatch):
    """Every device adds up what it holds."""

    def norm(gradients):
        def square(leaf):
            sizes = jax.typeof(leaf).sharding.mesh.shape
            copies = np.prod([sizes[axis] for axis in replicating_axes(jax.typeof(leaf).sharding.spec)])
            return copies * jnp.sum(jnp.square(leaf))

        return jnp.sqrt(sum(square(leaf) for leaf in jax.tree.leaves(gradients)))

    monkeypatch.setattr(step.optax.tree, "norm", norm)


def statistic_counted_on_every_device(monkeypatch):
    monkeypatch.setattr(Layout, "total", lambda self, x, apart, along=AXES: lax.psum(collectives.vary(x), along))


def idle_ticks_counted(monkeypatch):
    """A stage works on whatever comes, also before the first micro-batch and after the last."""
    at_tick = pipeline.at_tick
    monkeypatch.setattr(pipeline, "at_tick", lambda *args: (at_tick(*args)[0], True))


def stage_forgotten_in_the_order(monkeypatch):
    """All stages take the micro-batch that the first one works on to be theirs."""
    at_tick = pipeline.at_tick
    monkeypatch.setattr(pipeline, "at_tick", lambda t, *others: (at_tick(t, 0, others[1])[0], at_tick(t, *others)[1]))


def layers_of_a_stage_reversed(monkeypatch):
    def scan(f, x, layers):
        blocks, numbers = layers
        reverse = collectives.index(("stage",)) == 1
        return lax.scan(f, x, (jax.tree.map(lambda w: jnp.where(reverse, w[::-1], w), blocks), numbers))

    monkeypatch.setattr(transformer, "lax", SimpleNamespace(scan=scan))


def micro_batch_sent_twice(monkeypatch):
    """The first is, and the last is not."""
    pipelined = transformer.pipelined

    def wrong(first, *others):
        return pipelined(lambda number: first(jnp.maximum(number - 1, 0)), *others)

    monkeypatch.setattr(transformer, "pipelined", wrong)


def embedding_gradients_summed_over_stages_twice(monkeypatch):
    call = Embedding.__call__

    def wrong(self, tokens_bs, dtype):
        x_bsd, stages = call(self, tokens_bs, dtype), lax.axis_size("stage")
        return stages * x_bsd - lax.stop_gradient((stages - 1) * x_bsd)

    monkeypatch.setattr(Embedding, "__call__", wrong)


SEGMENT, TABLE = "['segments']['moe']", "['embedding']['table_vd']"
MOE, ATTENTION = f"{SEGMENT}['feed_forward']['experts']", f"{SEGMENT}['attention']"
FAULTS = {
    expert_gradients_not_summed: ("ma", {f"{MOE}['{w}_edf']" for w in ("w_in", "w_gate")} | {f"{MOE}['w_out_efd']"}),
    attention_gradients_summed_over_heads_too: ("ma", {f"{ATTENTION}['{w}_dkq']" for w in ("wk", "wv")}),
    norm_counts_copies: ("ma", {"grad_norm"}),
    statistic_counted_on_every_device: ("tp", {"dropped_l"}),
    idle_ticks_counted: ("pp", {"load_le", "dropped_l", "load_balancing_loss"}),
    stage_forgotten_in_the_order: ("pp", {"loss", "['head_vd']"}),
    layers_of_a_stage_reversed: ("pp", {"loss", f"{ATTENTION}['wq_dhq']"}),
    micro_batch_sent_twice: ("pp", {"loss", TABLE}),
    embedding_gradients_summed_over_stages_twice: ("pp", {"grad_norm", TABLE}),
}


def differing(c, expected) -> set[str]:
    """Gradients and figures of a first step that are not those of one device."""
    gradients, figures = first_step(c, *step_inputs(c))
    wrong = {name for name, share in leaves_differ(gradients, expected[0]).items() if share > EXACT}
    for name, value in expected[1].items():
        if name != "exchange_rounds" and not np.allclose(figures[name], value, rtol=EXACT, atol=0):
            wrong.add(name)
    return wrong


def fault_config(layout, alone=False):
    if layout == "pp":  # dropout shows which micro-batch a stage takes its own to be
        more = {"layers": 4, "expert_dropout": 0.1}, {"batch_size": 12, "accumulation": 3}, (2, 1, 2)
    else:
        more = {"layers": 1}, {}, (2, 2)
    model, train, mesh = more
    return config(
        (1, 1) if alone else mesh, "ma" if alone else layout, model={"dtype": "float64", **DROPS, **model}, train=train
    )


def step_inputs(c):
    return parameters(c), text(c, 1)[0]


@functools.cache
def one_device(c):
    return first_step(c, *step_inputs(c))


@pytest.mark.parametrize("layout", ["ma", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tp", "pp"))])
def test_without_a_fault_nothing_differs(layout):
    assert differing(fault_config(layout), one_device(fault_config(layout, alone=True))) == set()


SLOW = (norm_counts_copies, statistic_counted_on_every_device, idle_ticks_counted, micro_batch_sent_twice)


def faults():
    for fault in FAULTS:
        mark = pytest.mark.slow if fault in SLOW else pytest.mark.exhaustive
        yield pytest.param(fault, id=fault.__name__, marks=[] if fault is expert_gradients_not_summed else mark)


@pytest.mark.parametrize("fault", list(faults()))
def test_a_fault_is_seen(fault, monkeypatch):
    layout, shows = FAULTS[fault]
    expected = one_device(fault_config(layout, alone=True))
    fault(monkeypatch)
    assert shows <= differing(fault_config(layout), expected)
