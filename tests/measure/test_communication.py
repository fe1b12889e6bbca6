"""What a device sends, counted in the traced step, is what the formulas of docs/layouts.md say."""

from dataclasses import replace

import pytest
from abstract import abstract, seed
from formulas import sent_bytes
from small import ROWS, named

from maxsep.config.validate import validate
from maxsep.measure.communication import STATISTICS, sent
from maxsep.parallel.pipeline import bubble

DENSE = {"dense_layers": 1, "dense_d_ff": 32_768, "shared_experts": 2, "router_bias_rate": 0.001}
FULL = {"model": {"remat": "full"} | DENSE}  # sends again what dots, the config's own, keeps
OTHER = {"model": {"capacity_factor": None, "capacity_group": None, "remat": "none"}, "optimizer": {"zero1": False}}


def cases():
    for layout, meshes in ROWS.items():
        for number, mesh in enumerate(meshes if layout in ("ma", "zero") else meshes[:1]):
            name = f"{layout}-{named(mesh)}"
            fast = layout in ("ma", "tp_pp", "zero") and number == 0
            yield pytest.param(layout, mesh, {}, id=f"{name}-seed", marks=[] if fast else pytest.mark.slow)
            if layout in ("ma", "zero") and number == 0:
                yield pytest.param(layout, mesh, FULL, id=f"{name}-full")
            yield pytest.param(layout, mesh, OTHER, id=f"{name}-dropless", marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(("layout", "mesh", "changes"), list(cases()))
def test_the_step_of_the_study_sends_what_the_formulas_say(layout, mesh, changes):
    c = seed(layout, mesh)
    c = replace(c, **{name: replace(getattr(c, name), **fields) for name, fields in changes.items()})
    validate(c)
    devices, program, state, batch = abstract(c)
    counted = sent(
        program.train_step, state, batch, mesh=devices, busy=1 - bubble(program.layout.ways("l"), c.train.accumulation)
    )
    statistics = counted.pop(STATISTICS)
    assert statistics < 1e-5 * counted.total()
    for role, expected in sent_bytes(
        c, state
    ).items():  # which leave out ids, weights of choices, and the softmax's sums
        assert counted[role] == pytest.approx(expected, rel=3e-3), role
