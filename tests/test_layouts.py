"""Every layout gives what one device gives: the losses and figures of twelve steps, also after moves between layouts.

That each gradient is right is in test_equality.py. Here faults are planted in what devices add up: each must be seen.
"""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import first_step, leaves_differ, parameters, run, trained
from small import ROWS, SEED, config, text

import train
from maxsep.config import cli
from maxsep.config.layouts import AXES
from maxsep.model import transformer
from maxsep.model.layers import Embedding
from maxsep.output.checkpoint import Checkpoints
from maxsep.parallel import collectives, pipeline
from maxsep.parallel.layout import Layout
from maxsep.parallel.sharding import replicating_axes
from maxsep.training import step
from maxsep.training.step import Program

EXACT = 1e-9
DROPLESS, DROPS = {"capacity_factor": None}, {"capacity_factor": 1.0, "capacity_group": 4}
SWITCHES = {  # dispatch, expert dropout, ZeRO-1
    "dropless": (DROPLESS, 0.0, False),
    "drops, dropout, zero1": (DROPS, 0.1, True),
    "drops, dropout": (DROPS, 0.1, False),
    "dropless, dropout, zero1": (DROPLESS, 0.1, True),
    "drops, zero1": (DROPS, 0.0, True),
}


def switched(switches: str, mesh=(1, 1), layout="ma", layers=4, accumulation=4):
    dispatch, dropout, zero1 = SWITCHES[switches]
    return config(
        mesh,
        layout,
        model={"layers": layers, "dtype": "float64", "expert_dropout": dropout, **dispatch},
        train={"steps": 12, "batch_size": 16 * accumulation, "accumulation": accumulation},
        optimizer={"zero1": zero1},
    )


def check_losses(alone, c):
    expected, found = trained(alone), trained(c, alone)
    assert expected.losses[0] - expected.losses[-1] >= 0.5, "it learns"
    assert (max(expected.dropped) > 0) == (c.model.capacity_factor is not None)
    assert found.losses == pytest.approx(expected.losses, rel=EXACT)
    assert found.dropped == expected.dropped


# The losses of `ma` are in test_equality.py; the other pipelines are slow.
@pytest.mark.parametrize("layout", ["ma_folded", "tp", "tp_pp", "zero"])
def test_a_layout_has_the_losses_of_one_device(layout):
    small = functools.partial(switched, "drops, dropout", layers=2, accumulation=2)
    check_losses(small(), small(ROWS[layout][0], layout))


TURNS = ["dropless", "drops, dropout, zero1"]  # each value of each switch


@pytest.mark.parametrize(
    ("layout", "switches"),
    [
        # `ma` has more of its own in test_equality.py.
        pytest.param(
            layout, name, marks=pytest.mark.slow if name in TURNS and layout != "ma" else pytest.mark.exhaustive
        )
        for layout in ROWS
        for name in SWITCHES
    ],
)
def test_a_layout_has_the_losses_of_one_device_with_every_switch(layout, switches):
    """The two meshes take turns."""
    mesh = ROWS[layout][list(SWITCHES).index(switches) % 2]
    check_losses(switched(switches), switched(switches, mesh, layout))


def test_a_checkpoint_moves_between_all_layouts(tmp_path):
    def abstract(layout, mesh):
        model, train = {"layers": 4}, {"batch_size": 64, "accumulation": 4}
        return run(config(mesh, layout, model=model, train=train, optimizer={"zero1": True})).abstract_state

    rng = np.random.default_rng(SEED)
    shapes = abstract("zero", (2, 2, 4))
    saved = jax.tree.map(
        lambda x: jax.device_put(np.frombuffer(rng.bytes(x.size * 4), x.dtype).reshape(x.shape), x.sharding), shapes
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {})
        for layout in ROWS:
            wanted = abstract(layout, ROWS[layout][0])
            restored, _ = checkpoints.restore(wanted)
            assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, wanted)
            for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
                assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


TRIP = [
    ("ma", (1, 4, 4)),
    ("tp_pp", (2, 8, 1)),
    ("pp", (4, 1, 4)),
    ("zero", (1, 4, 4)),
    ("ma_folded", (1, 2, 8)),
    ("ma", (1, 1, 1)),
]


@pytest.mark.slow
def test_a_run_that_moves_between_layouts_stays_on_its_curve(tmp_path, data):
    """train.py, three steps and an evaluation on each."""
    values = {
        "layers": 4,
        "d_model": 32,
        "heads": 16,
        "experts": 16,
        "d_ff": 32,
        "vocab_size": 257,
        "dtype": "float64",
        "expert_dropout": 0.1,
        "capacity_factor": 1.0,
        "capacity_group": 4,
    }

    def go(folder, layout, mesh, steps):
        flags = {
            "layout": layout,
            "mesh.stage": mesh[0],
            "mesh.attention": mesh[1],
            "mesh.expert": mesh[2],
            "train.steps": steps,
            "train.batch_size": 64,
            "train.accumulation": 4,
            "train.log_every": 1,
            "train.eval_every": 3,
            "optimizer.warmup_steps": 2,
            "optimizer.decay_steps": 3 * len(TRIP),
            "optimizer.learning_rate": 1e-2,
            "data.source": "files",
            "data.path": data,
            "data.cache": tmp_path / "cache",
            "data.sequence_length": 32,
            "data.tokenizer": "bytes",
            **{f"model.{name}": value for name, value in values.items()},
        }
        argv = ["train.py", f"--workdir={folder}", "--config=configs/base.py"]
        argv += [f"--config.{name}={value}" for name, value in flags.items()]
        assert cli.run(train.main, train.define, train.__doc__, "configs/tiny.py", argv=argv) == cli.DONE
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {(row["step"], row["split"]): row["loss"] for row in rows}

    undisturbed = go(tmp_path / "alone", *TRIP[-1], 3 * len(TRIP))
    for number, (layout, mesh) in enumerate(TRIP, 1):
        moved = go(tmp_path / "moved", layout, mesh, 3 * number)
    last = 3 * len(TRIP)
    assert sorted(step for step, split in moved if split == "train") == list(range(1, last + 1))
    assert sorted(step for step, split in moved if split == "eval") == list(range(3, last + 1, 3))
    assert undisturbed[1, "train"] - undisturbed[last, "train"] > 0.5
    for at, loss in undisturbed.items():
        assert moved[at] == pytest.approx(loss, rel=EXACT), at


# Faults: what a layout's sums could get wrong, planted in the code that train.py runs.


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


MOE, ATTENTION, TABLE = "['blocks']['moe']['experts']", "['blocks']['attention']", "['embedding']['table_vd']"
FAULTS = {
    expert_gradients_not_summed: ("ma", {f"{MOE}['{w}_ledf']" for w in ("w_in", "w_gate")} | {f"{MOE}['w_out_lefd']"}),
    attention_gradients_summed_over_heads_too: ("ma", {f"{ATTENTION}['{w}_ldkq']" for w in ("wk", "wv")}),
    norm_counts_copies: ("ma", {"grad_norm"}),
    statistic_counted_on_every_device: ("tp", {"dropped_l"}),
    idle_ticks_counted: ("pp", {"load_le", "dropped_l", "load_balancing_loss"}),
    stage_forgotten_in_the_order: ("pp", {"loss", "['head_vd']"}),
    layers_of_a_stage_reversed: ("pp", {"loss", f"{ATTENTION}['wq_ldhq']"}),
    micro_batch_sent_twice: ("pp", {"loss", TABLE}),
    embedding_gradients_summed_over_stages_twice: ("pp", {"grad_norm", TABLE}),
}


def differing(c, expected) -> set[str]:
    """Gradients and figures of a first step that are not those of one device."""
    gradients, figures = first_step(c, *step_inputs(c))
    wrong = {name for name, share in leaves_differ(gradients, expected[0]).items() if share > EXACT}
    for name, value in expected[1].items():
        if not np.allclose(figures[name], value, rtol=EXACT, atol=0):
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


@pytest.mark.parametrize("layout", ["ma", "tp", pytest.param("pp", marks=pytest.mark.slow)])
def test_without_a_fault_nothing_differs(layout):
    assert differing(fault_config(layout), one_device(fault_config(layout, alone=True))) == set()


def faults():
    for fault, (layout, _) in FAULTS.items():
        yield pytest.param(fault, id=fault.__name__, marks=pytest.mark.slow if layout == "pp" else [])


@pytest.mark.parametrize("fault", list(faults()))
def test_a_fault_is_seen(fault, monkeypatch):
    layout, shows = FAULTS[fault]
    expected = one_device(fault_config(layout, alone=True))
    fault(monkeypatch)
    assert shows <= differing(fault_config(layout), expected)
