"""What a compilation finds of a program: it moves with the model as it should, and is that of train.py's."""

import functools
from dataclasses import replace

import jax
import pytest
from small import ROWS, config

from maxsep.config import Config
from maxsep.config.cluster import load_cluster
from maxsep.measure import hlo, program, schedule
from maxsep.parallel.mesh import make_mesh
from maxsep.parallel.start import settle
from maxsep.planning import compilation, rows
from maxsep.training.run import Run

DEVICES = (2, 2)  # attention x expert
MODEL = {"layers": 2, "d_model": 48, "d_ff": 40, "experts": 4, "capacity_factor": 1.0, "capacity_group": 4}


@functools.cache
def found(c: Config) -> dict:
    return compilation.compiled(c, None, load_cluster(f"cpu:1x{c.mesh.devices}"), None)


def of_model(**changed) -> dict:
    return found(config(DEVICES, model=MODEL | changed))


def flops(facts: dict) -> float:
    return schedule.from_json(facts["schedule"]).flops().total()


def sent(facts: dict, role: str) -> float:
    """Bytes of the operands of a device's collectives."""

    def of(steps) -> float:
        total = 0.0
        for step in steps:
            if isinstance(step, schedule.Loop):
                total += step.trips * of(step.body)
            elif isinstance(step, schedule.Collective):
                total += step.size * step.roles.get(role, 0)
        return total

    return of(schedule.from_json(facts["schedule"]).steps)


# Of one device: as many choices of its tokens go to experts elsewhere as come.
TOKENS = 16 * 32 // 4
CHOICES = TOKENS * 2
EXPERTS = 3 * 2 * MODEL["layers"] * CHOICES * 3 * MODEL["d_model"] * MODEL["d_ff"]  # forward, and twice that backward
HEAD = 3 * 2 * TOKENS * MODEL["d_model"] * 256  # of each device a part of the vocabulary, for more tokens


@pytest.mark.slow
def test_a_wider_expert_adds_its_products_and_its_weights():
    base, wide = of_model(), of_model(d_ff=2 * MODEL["d_ff"])
    assert flops(wide) - flops(base) == pytest.approx(EXPERTS)
    weights = MODEL["layers"] * 2 * 3 * MODEL["d_model"] * MODEL["d_ff"] * 4  # two experts on a device
    assert wide["memory"]["parameters"] - base["memory"]["parameters"] == weights
    assert wide["memory"]["optimizer"] - base["memory"]["optimizer"] == 2 * weights
    assert wide["memory"]["total"] - base["memory"]["total"] >= 4 * weights, "with gradients"
    assert sent(wide, "dispatch") == sent(base, "dispatch")


@pytest.mark.slow
def test_twice_the_capacity_doubles_the_exchange_and_the_experts_products():
    base, doubled = of_model(), of_model(capacity_factor=2.0)
    assert flops(doubled) - flops(base) == pytest.approx(EXPERTS)
    assert sent(doubled, "dispatch") == pytest.approx(2 * sent(base, "dispatch"), rel=0.01)
    assert sent(doubled, "attention") == sent(base, "attention") > 0
    assert doubled["memory"]["parameters"] == base["memory"]["parameters"]


@pytest.mark.slow
def test_twice_the_layers_double_all_but_the_head():
    base, deep = of_model(), of_model(layers=2 * MODEL["layers"])
    assert flops(deep) - HEAD == pytest.approx(2 * (flops(base) - HEAD))
    for role in ("attention", "dispatch"):
        assert sent(deep, role) == 2 * sent(base, role)
    assert deep["memory"]["activations"] > base["memory"]["activations"]


def is_that_of_train_py(c: Config) -> None:
    """Memory and collectives, whatever the order of the devices, which in train.py follows `mesh.inner`."""
    facts = found(c)
    settle(c, c.mesh.devices)
    c = replace(c, mesh=replace(c.mesh, inner="attention"))
    with jax.set_mesh(make_mesh(c)):
        run = Run(c)
        made = run.compile_train_step()
    sizes, kinds = made.memory_analysis(), dict(facts["memory"])
    total = kinds.pop("total")
    assert sum(kinds.values()) == total
    assert total - kinds["results"] - kinds["constants"] == sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    module, busy = hlo.parse(made.as_text()), 1 - run.bubble
    assert facts["schedule"] == schedule.to_json(schedule.of(module, busy))
    rates = replace(
        load_cluster("cpu:1x16"), memory_bytes=1, flops={"float32": 1}, memory_bandwidth=1, inside=1, between=1
    )
    (row,) = rows.of([c], [facts], rates)
    assert row.communication_bytes == pytest.approx(program.by_role(program.sent(module, busy))), "the ablation's"


@pytest.mark.slow
def test_the_program_is_that_of_train_py():
    is_that_of_train_py(config(DEVICES, model=MODEL))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ROWS)
def test_the_program_is_that_of_train_py_under_every_layout(layout):
    train = {"accumulation": 2, "batch_size": 32}
    is_that_of_train_py(config(ROWS[layout][0], layout, train=train, model=MODEL | {"experts": 16}))
