"""Every layout gives what one device gives: the losses and figures of twelve steps, also after moves between layouts.

That each gradient is right is in test_equality.py; test_faults.py plants faults in what devices add up.
"""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from programs import run, trained
from small import ROWS, SEED, config
from states import filled

import train
from maxsep.config import cli
from maxsep.output.checkpoint import Checkpoints

EXACT = 1e-9
DROPLESS, DROPS = {"capacity_factor": None}, {"capacity_factor": 1.0, "capacity_group": 4}
SWITCHES = {  # dispatch, expert dropout, ZeRO-1
    "dropless": (DROPLESS, 0.0, False),
    "drops, dropout, zero1": (DROPS, 0.1, True),
    "drops, dropout": (DROPS, 0.1, False),
    "dropless, dropout, zero1": (DROPLESS, 0.1, True),
    "drops, zero1": (DROPS, 0.0, True),
}


def switched(switches: str, mesh=(1, 1), layout="ma", layers=4, accumulation=4, steps=12):
    dispatch, dropout, zero1 = SWITCHES[switches]
    return config(
        mesh,
        layout,
        model={"layers": layers, "dtype": "float64", "expert_dropout": dropout, **dispatch},
        train={"steps": steps, "batch_size": 16 * accumulation, "accumulation": accumulation},
        optimizer={"zero1": zero1},
    )


def check_losses(alone, c):
    expected, found = trained(alone), trained(c, alone)
    assert expected.losses[0] - expected.losses[-1] >= 0.5, "it learns"
    assert (max(expected.dropped) > 0) == (c.model.capacity_factor is not None)
    assert found.losses == pytest.approx(expected.losses, rel=EXACT)
    assert found.dropped == expected.dropped


CHEAPER = {"remat": "full"}  # and ZeRO-1: what only changes the cost, as unrolled layers in test_equality.py


@pytest.mark.parametrize(
    ("layout", "mesh", "cheaper"),
    [
        ("ma", (2, 8), CHEAPER),
        ("tp_pp", (2, 8, 1), {}),
        pytest.param("zero", (4, 4), {}, marks=pytest.mark.slow),
        pytest.param("ma_folded", (4, 4), {}, marks=pytest.mark.slow),
        pytest.param("tp", (8, 2), {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layout_has_the_losses_of_one_device(layout, mesh, cheaper):
    small = functools.partial(switched, "drops, dropout", layers=2, accumulation=2, steps=8)
    c = small(mesh, layout)
    zero1 = replace(c.optimizer, zero1=bool(cheaper))
    check_losses(small(), replace(c, model=replace(c.model, **cheaper), optimizer=zero1))


def every_switch():
    """Each layout with each of `SWITCHES`. The slow suite holds a pipeline with one; others are above."""
    for layout in ROWS:
        for name in SWITCHES:
            slow = layout == "pp" and name == "drops, dropout, zero1"
            yield pytest.param(layout, name, marks=pytest.mark.slow if slow else pytest.mark.exhaustive)


@pytest.mark.parametrize(("layout", "switches"), list(every_switch()))
def test_a_layout_has_the_losses_of_one_device_with_every_switch(layout, switches):
    """The two meshes take turns."""
    mesh = ROWS[layout][list(SWITCHES).index(switches) % 2]
    check_losses(switched(switches), switched(switches, mesh, layout))


@pytest.mark.parametrize("layouts", [["ma_folded", "tp_pp"], pytest.param(list(ROWS), marks=pytest.mark.slow)], ids=len)
def test_a_checkpoint_moves_between_layouts(tmp_path, layouts):
    """Of parameters and moments, one leaf of each kind of sharding that a layout has."""

    def abstract(layout, mesh):
        model, train = {"layers": 4}, {"batch_size": 64, "accumulation": 4}
        return run(config(mesh, layout, model=model, train=train, optimizer={"zero1": True})).abstract_state

    states = [abstract("zero", (2, 2, 4)), *(abstract(layout, ROWS[layout][0]) for layout in layouts)]
    shardings = zip(*([x.sharding for x in jax.tree.leaves(state)] for state in states), strict=True)
    numbers = {kind: number for number, kind in enumerate(shardings)}.values()
    assert len(numbers) >= 8

    def few(state):
        leaves = jax.tree.leaves(state)
        return [leaves[number] for number in numbers]

    saved = filled(few(states[0]), SEED)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {})
        for state in states[1:]:
            restored = checkpoints.restore(few(state)).state
            assert [x.sharding for x in restored] == [x.sharding for x in few(state)]
            for leaf, expected in zip(restored, saved, strict=True):
                assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


TRIP = [
    ("ma", (1, 4, 4)),
    ("tp_pp", (2, 8, 1)),
    ("pp", (4, 1, 4)),
    ("zero", (1, 4, 4)),
    ("ma_folded", (1, 2, 8)),
    ("ma", (1, 1, 1)),
]


@pytest.mark.parametrize(
    "trip",
    [pytest.param(TRIP[1::2], marks=pytest.mark.slow), pytest.param(TRIP, marks=pytest.mark.exhaustive)],
    ids=len,
)
def test_a_run_that_moves_between_layouts_stays_on_its_curve(tmp_path, data, trip):
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
        "router_bias_rate": 0.01,
        "balance_over": "batch",
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
            "optimizer.decay_steps": 3 * len(trip),
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

    undisturbed = go(tmp_path / "alone", *trip[-1], 3 * len(trip))
    for number, (layout, mesh) in enumerate(trip, 1):
        moved = go(tmp_path / "moved", layout, mesh, 3 * number)
    last = 3 * len(trip)
    assert sorted(step for step, split in moved if split == "train") == list(range(1, last + 1))
    assert sorted(step for step, split in moved if split == "eval") == list(range(3, last + 1, 3))
    assert undisturbed[1, "train"] - undisturbed[last, "train"] > 0.5
    for at, loss in undisturbed.items():
        assert moved[at] == pytest.approx(loss, rel=EXACT), at
