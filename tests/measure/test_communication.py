"""What a device sends, counted in the traced step, is what the formulas of docs/layouts.md say."""

import math
from dataclasses import replace

import jax
import pytest
from abstract import abstract, seed
from small import ROWS, named

from maxsep.config.layouts import AXES, row
from maxsep.config.validate import validate
from maxsep.measure.communication import STATISTICS, sent
from maxsep.measure.memory import bytes_on_device
from maxsep.parallel.pipeline import bubble
from maxsep.parallel.sharding import replicating_axes


def formula(c, state) -> dict[str, float]:
    """Bytes a step, in the symbols of docs/layouts.md."""
    model, train, axes = c.model, c.train, row(c.layout)
    size = dict(zip(AXES, c.mesh.shape, strict=True))

    def ways(letter):
        return math.prod(size[axis] for axis in axes.get(letter, ()))

    A, B, L, D = train.accumulation, train.batch_size // train.accumulation, model.layers, model.d_model
    c_bytes = {"bfloat16": 2, "float32": 4}[model.dtype]
    t = B * c.data.sequence_length // ways("b") // ways("s")
    again = model.remat == "full"

    def joined(letter) -> int:
        """Devices whose tokens are joined for a layer that `letter` splits."""
        tokens = axes["b"] + axes.get("s", ())
        return math.prod(size[axis] for axis in axes.get(letter, ()) if axis in tokens)

    def gather(letter) -> int:
        return t * D * c_bytes if joined(letter) > 1 else 0

    def scatter(letter) -> int:
        return joined(letter) * gather(letter)

    attention = (2 + again) * (gather("h") + scatter("h"))
    places = model.top_k * (model.capacity_factor or 0) * t
    if model.capacity_factor is None:
        places = ways("e") * t * min(model.top_k, model.experts // ways("e"))
    exchanges = (4 + 2 * again) * places * D * c_bytes if ways("e") > 1 else 0
    dispatch = exchanges + (2 + again) * gather("f") + 2 * scatter("f")
    vocabulary = 2 * (gather("v") + scatter("v"))
    P = ways("l")
    if P > 1 and "stage" in axes["v"]:
        vocabulary += 2 * t * D * c_bytes  # sums over stages of what is looked up, and of their parts of a gradient
    if P > 1:
        vocabulary += 2 * t * D * c_bytes  # final states to all stages, and back

    blocks, leaves = state.params["blocks"], jax.tree.leaves(state.params)
    copied = [w for w in leaves if math.prod(size[axis] for axis in replicating_axes(w.sharding.spec)) > 1]
    gradients, parameters = bytes_on_device(copied), 0
    if c.optimizer.zero1:  # each device gathers the parts that it shares
        moments = jax.tree.leaves(state.optimizer[1].mu)
        parameters = bytes_on_device(
            [part for part, w in zip(moments, leaves, strict=True) if bytes_on_device(part) < bytes_on_device(w)]
        )
    if ways("w") > 1:
        experts = bytes_on_device(blocks["moe"]["experts"])
        others = bytes_on_device((blocks["attention"], blocks["moe"]["router"]))
        tables = bytes_on_device((state.params["head_vd"], state.params["embedding"]))
        parts = math.prod(size.values())
        gradients += A * parts * (experts // ways("e") + others + tables // ways("v"))
        parameters += A * (2 * (experts + others) * c_bytes // 4 + tables)
    return {
        "attention": A * L // P * attention,
        "dispatch": A * L // P * dispatch,
        "stages": 2 * (A + P - 1) * t * D * c_bytes if P > 1 else 0,
        "embedding, head": A * vocabulary,
        "gradients": gradients,
        "parameters": parameters,
    }


OTHER = {"model": {"capacity_factor": None, "capacity_group": None, "remat": "none"}, "optimizer": {"zero1": False}}


@pytest.mark.parametrize("changes", [{}, pytest.param(OTHER, marks=pytest.mark.slow)], ids=["seed", "dropless"])
@pytest.mark.parametrize(
    ("layout", "mesh"),
    [(layout, meshes[0]) for layout, meshes in ROWS.items()]
    + [pytest.param("ma", (2, 8), marks=pytest.mark.slow), pytest.param("zero", (2, 2, 4), marks=pytest.mark.slow)],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
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
    for role, expected in formula(c, state).items():  # which leave out ids, weights of choices, and the softmax's sums
        assert counted[role] == pytest.approx(expected, rel=3e-3), role
