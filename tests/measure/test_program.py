"""What a compiled step sends, computes and holds: counted in it, against formulas and against its arrays."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from formulas import sent_bytes
from programs import optimised
from small import MA_IN_STAGES, ROWS, config

from maxsep.config import MeshConfig
from maxsep.config.validate import validate
from maxsep.measure import buffers, hlo, memory, program
from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

SHAPES = {  # of the model; none has two equal sizes that could be taken for each other
    "narrow": {"layers": 4, "d_model": 48, "d_ff": 40, "vocab_size": 256},
    "wide": {"layers": 4, "d_model": 96, "d_ff": 80, "vocab_size": 640},
    "mixed": {
        "layers": 4,
        "dense_layers": 2,
        "dense_d_ff": 224,
        "shared_experts": 1,
        "d_model": 48,
        "d_ff": 40,
        "vocab_size": 256,
    },
    "long": {"layers": 8, "d_model": 64, "d_ff": 144, "vocab_size": 384},
}
CASES = [pytest.param(MA_IN_STAGES, (2, 4, 2), "narrow", id="in_stages-narrow")]
for _layout, _meshes in ROWS.items():
    _name = "in_stages" if _layout == MA_IN_STAGES else _layout
    for _shape in SHAPES:
        if (_layout, _shape) != (MA_IN_STAGES, "narrow") and (_shape != "mixed" or _layout in ("ma", "tp", "zero")):
            _slow = _shape == ("mixed" if _layout == "tp" else "wide") and _layout in ("ma", "tp", "zero")
            _mark = pytest.mark.slow if _slow else pytest.mark.exhaustive
            CASES.append(pytest.param(_layout, _meshes[0], _shape, marks=_mark, id=f"{_name}-{_shape}"))
# What the source asks for, by role: no XLA here has chosen another.
KINDS = {
    "attention": {"all-gather", "reduce-scatter"},
    "dispatch": {"all-to-all"},
    "embedding, head": {"all-gather", "reduce-scatter", "all-reduce"},
    "stages": {"collective-permute"},
    "dense MLPs": {"all-gather", "reduce-scatter"},
    "gradients": {"reduce-scatter", "all-reduce"},
    "parameters": {"all-gather"},
}


@functools.cache
def compiled(layout: str, mesh: tuple[int, ...], shape: str):
    """The run, and its train step: the program, its plan, and the compiler's own figures."""
    c = config(
        train={"batch_size": 64, "accumulation": 4},
        optimizer={"zero1": layout != "zero"},
        data={"sequence_length": 64},
        model=SHAPES[shape] | {"capacity_factor": 1.25, "capacity_group": 8},
    )
    c = replace(c, layout=layout, mesh=MeshConfig(*(1, *mesh)[-3:]))
    validate(c)
    with jax.set_mesh(make_mesh(c)), tempfile.TemporaryDirectory() as folder:
        run = Run(c)
        made = run.lower_train_step().compile(compiler_options={"xla_dump_to": folder})
        module, plan = buffers.read(Path(folder))
        assert program.sent(module) == program.sent(hlo.parse(made.as_text())), "the text is written in another way"
        return run, module, plan, made.memory_analysis()


@pytest.mark.parametrize("layout, mesh, shape", CASES)
def test_the_program_sends_what_the_formulas_say(layout, mesh, shape):
    run, module, _, _ = compiled(layout, mesh, shape)
    found = program.sent(module, 1 - run.bubble)
    roles = program.by_role(found)
    for role, expected in sent_bytes(run.config, run.abstract_state).items():
        # Beside what is little anyway, a few scalars of the optimizer are many.
        assert roles[role] == pytest.approx(expected, rel=0.05, abs=1e-4 * roles.total()), role
    kinds = KINDS | {"dispatch": KINDS["attention"]} if layout in ("tp", "tp_pp") else KINDS
    for one in found:
        large = one.operand_bytes > 1e-3 * roles.total()
        assert not large or one.role == "statistics" or one.kind in kinds[one.role], one


@pytest.mark.parametrize("layout, mesh, shape", CASES)
def test_the_peak_is_the_sum_of_what_lies_in_memory(layout, mesh, shape):
    run, module, plan, told = compiled(layout, mesh, shape)
    kinds = buffers.by_kind(module, plan, run.abstract_state)
    state, batch = run.abstract_state, jax.ShapeDtypeStruct(run.batch_shape, jnp.int32, sharding=run.batch_sharding)
    arguments = memory.bytes_on_device((state, batch))
    assert arguments == plan.arguments == told.argument_size_in_bytes
    assert kinds["parameters"] + kinds["optimizer"] + kinds["batch"] == arguments
    assert plan.temporaries == told.temp_size_in_bytes
    assert sum(kinds.values()) == plan.peak
    assert 0 <= kinds["unused"] <= 0.02 * plan.peak
    own = memory.bytes_on_device(state.params["segments"]["moe"]["feed_forward"]["experts"])
    assert kinds["gradients"] >= own, "those of all micro-batches are added up in one place"
    if run.stages == 1:  # what a pipeline keeps of its ticks differs between versions of XLA
        # A layer's is added when it is made: there are the sum, a layer's, the head's, and never a second one of all.
        assert kinds["gradients"] < 1.8 * kinds["parameters"]
    assert kinds["copies"] >= 0
    assert kinds["activations"] > 0


def test_the_products_are_those_that_the_model_needs():
    """But for attention's: of one block of queries all keys are taken, and the scores are made again."""
    c = config(model=SHAPES["mixed"] | {"capacity_factor": 1.0})
    with jax.set_mesh(make_mesh(c)):
        run = Run(c)
        found = program.products(optimised(run.lower_train_step()))
    needed = 6 * c.model.layers * c.model.heads * c.model.head_size * c.data.sequence_length * run.tokens
    assert found == run.flops - needed + 2 * needed * 7 / 6


@pytest.mark.parametrize(
    "kind, result, operands, wire",
    [
        ("all-gather", "f32[32]", ["f32[8]"], 3 * 32),
        ("reduce-scatter", "f32[2]", ["f32[8]"], 3 / 4 * 32),
        ("all-reduce", "f32[8]", ["f32[8]"], 2 * 3 / 4 * 32),
        ("all-to-all", "(f32[2], f32[2], f32[2], f32[2])", ["f32[2]"] * 4, 3 / 4 * 32),
        ("collective-permute", "f32[8]", ["f32[8]"], 32),
    ],
)
def test_so_much_goes_on_the_wire_in_each_of_three_turns(kind, result, operands, wire):
    made = "\n".join(f"  %p.{number} = {shape} parameter({number})" for number, shape in enumerate(operands))
    groups = "source_target_pairs={{0,1},{1,2}}" if kind == "collective-permute" else "replica_groups={{0,1,2,3}}"
    names = ", ".join(f"%p.{number}" for number in range(len(operands)))
    path = 'metadata={op_name="jit(step)/moe/dispatch/x"}'
    text = f"""HloModule step, num_partitions=4

%body (q: f32[8]) -> f32[8] {{
{made}
  ROOT %c.1 = {result} {kind}({names}), {groups}, {path}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  ROOT %w.1 = f32[8] while(%p.0), condition=%none, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}

%none (r: f32[8]) -> pred[] {{
  ROOT %r.1 = pred[] constant(true)
}}
"""
    assert program.sent(hlo.parse(text)) == [program.Sent("dispatch", kind, 3, 3 * 32, 3 * wire)]


def test_products_are_counted_through_loops():
    def f(x_ab, w_lbb):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_ab, w_lbb)[0].sum()

    shapes = jax.ShapeDtypeStruct((24, 40), jnp.float32), jax.ShapeDtypeStruct((3, 40, 40), jnp.float32)
    forward, backward = (optimised(jax.jit(g).lower(*shapes)) for g in (f, jax.grad(f, (0, 1))))
    once = 3 * 2 * 24 * 40 * 40
    assert program.products(forward) == once
    assert program.products(backward) == 3 * once


def test_products_that_depend_on_the_data_are_not_counted():
    def f(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    made = optimised(jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32), 3))
    assert program.products(made) is None


def test_the_fullest_moment_counts_what_takes_anothers_place_once():
    def value(name, offset, size, first, last, argument=None):
        return buffers.Value(name, hlo.Array("f32", (size // 4,)), argument, offset, size, first, last)

    values = (
        value("early", 0, 400, 0, 5),
        value("later", 0, 400, 5, 9),  # takes the place of the one before, at the moment that it ends
        value("beside", 400, 80, 4, 6),
        value("after", 400, 40, 7, 9),
        value("argument", 0, 4000, 0, 3, argument=0),
    )
    plan = buffers.Plan(arguments=10, results=1, constants=2, temporaries=500, values=values)
    assert plan.moment in (4, 5)
    assert {one.name: own for one, own in plan.there(None, 5)} == {"later": 400, "early": 0, "beside": 80}
    assert [one.name for one, _ in plan.there(0, 3)] == ["argument"]
    assert plan.peak == 513
