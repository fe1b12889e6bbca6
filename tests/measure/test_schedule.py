"""A compiled program as work in order: loops, branches, and what runs beside kernels."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import optimised

from maxsep.measure import hlo, program, schedule
from maxsep.measure.schedule import Branches, Collective, Kernel, Loop, Schedule, Wait
from maxsep.parallel.rounds import in_rounds

HEAD = "HloModule m, num_partitions=4\n\n"
BODY = """%wrapped (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g.1 = f32[32]{0} all-gather(%p), replica_groups=[2,2]<=[4], dimensions={0}, metadata={op_name="jit(f)/head/x"}
}
"""
GROUPS = "replica_groups=[2,2]<=[4]"
START = f"""  %s = ((f32[8]), f32[32]) all-gather-start(%x), {GROUPS}, metadata={{op_name="jit(f)/head/x"}}\n"""
PAIR = "  %s = ((f32[8]), f32[32]) async-start(%x), calls=%wrapped\n"


def parsed(start: str, done: str) -> Schedule:
    text = f"""{HEAD}{BODY}
ENTRY %main (x: f32[8]) -> f32[32] {{
  %x = f32[8]{{0}} parameter(0)
{start}  %k = f32[8]{{0}} negate(%x)
  %d = f32[32]{{0}} {done}(%s)
  ROOT %r = f32[32]{{0}} add(%d, %d)
}}
"""
    return schedule.of(hlo.parse(text))


@pytest.mark.parametrize("form", [(START, "all-gather-done"), (PAIR, "async-done")], ids=["sugared", "wrapped"])
def test_an_asynchronous_collective_runs_until_it_is_waited_for(form):
    gather = Collective("all-gather", {"embedding, head": 1.0}, 32, 0, "s")
    found = parsed(*form)
    assert found.steps == (gather, Kernel({}, 64), Wait("s"), Kernel({}, 3 * 128))
    assert found.groups == (((0, 1), (2, 3)),)


CHAINED = """%{name} (p: f32[8]) -> f32[32] {{
  %{name}.p = f32[8]{{0}} parameter(0)
  %{name}.g = f32[32]{{0}} all-gather(%{name}.p), replica_groups=[2,2]<=[4], frontend_attributes={{chain_id="0"}}
  ROOT %{name}.r = f32[32]{{0}} {root}
}}
"""


def test_one_that_a_tpu_fuses_with_what_runs_beside_it_counts_once():
    roots = {
        "start": 'custom-call(%start.g), custom_call_target="AsyncCollectiveStart"',
        "beside": "negate(%beside.g)",
        "done": 'custom-call(%done.g), custom_call_target="AsyncCollectiveDone"',
    }
    bodies = "".join(CHAINED.format(name=name, root=root) for name, root in roots.items())
    lines = [f"  %f.{name} = f32[32]{{0}} fusion(%x), kind=kCustom, calls=%{name}\n" for name in roots]
    text = (
        f"{HEAD}{bodies}\nENTRY %main (x: f32[8]) -> f32[32] {{\n  %x = f32[8]{{0}} parameter(0)\n{''.join(lines)}}}\n"
    )
    gather, beside, wait = schedule.of(hlo.parse(text)).steps
    assert (gather.kind, gather.size, gather.name, wait) == ("all-gather", 32, "f.start", Wait("f.start"))
    assert isinstance(beside, Kernel)


def test_a_loops_length_is_known_where_it_counts_to_a_constant():
    text = """HloModule m

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]) parameter(0)
  ROOT %t = (s32[], f32[8]) tuple(%b#0, %b#1)
}

%until (u: (s32[], f32[8])) -> pred[] {
  %u = (s32[], f32[8]) parameter(0)
  %n = s32[]{:T(128)} constant(12), metadata={op_name="jit(f)/while"}
  ROOT %lt = pred[] compare(%u#0, %n), direction=LT
}

ENTRY %main (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%x), condition=%until, body=%body
}
"""
    assert schedule.of(hlo.parse(text)).steps == (Loop(12, ()),)
    carried = schedule.of(hlo.parse(text.replace("%n)", "%u#0)")))
    assert carried.unknown == {"a loop whose length depends on the data, in other": 1}


def test_one_that_xla_calls_synchronous_is():
    start = START.replace(" metadata", ' backend_config={"collective_backend_config":{"is_sync":true}}, metadata')
    found = parsed(start, "all-gather-done")
    assert [step.name for step in found.steps if isinstance(step, Collective)] == [None]
    assert not any(isinstance(step, Wait) for step in found.steps)


def test_what_cannot_be_counted_is_named():
    def f(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    found = schedule.of(optimised(jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32), 3)))
    assert found.flops() == {"f32": 2 * 8**3}, "one turn"
    assert found.unknown == {"a loop whose length depends on the data, in other": 1}


def test_further_rounds_count_as_none_and_are_named():
    def f(x, n):
        return in_rounds(lambda number, x, plan: x @ x + number, n, x, ())

    module = optimised(jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32), 3))
    found = schedule.of(module)
    assert found.flops() == {"f32": 2 * 8**3} and program.products(module) == 2 * 8**3
    assert found.unknown == {"a loop of further rounds, in other": 1}


@pytest.fixture(scope="module")
def pipeline() -> hlo.Module:
    """A stage of two that has work in some of five ticks."""
    mesh = jax.make_mesh((2,), ("stage",), axis_types=(AxisType.Explicit,))

    def tick(x, works):
        x = jax.lax.cond(works[0], lambda x: x @ x, lambda x: x, x)
        return jax.lax.ppermute(x, "stage", [(0, 1)]), None

    def stages(x, works):
        return jax.lax.scan(tick, x, works)[0]

    with jax.set_mesh(mesh):
        f = jax.shard_map(stages, in_specs=(P("stage"), P(None, "stage")), out_specs=P("stage"), check_vma=False)
        shapes = (((16, 8), "float32", P("stage")), ((5, 2), "bool", P(None, "stage")))
        abstract = [jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, at)) for dims, dtype, at in shapes]
        return optimised(jax.jit(lambda x, works: f(x, works)).lower(*abstract))


def test_a_stage_that_waits_does_no_work(pipeline):
    found = schedule.of(pipeline, busy=0.8)
    assert found.flops().total() == pytest.approx(program.products(pipeline, 0.8)) == pytest.approx(0.8 * 5 * 2 * 8**3)

    def kinds(steps):
        for step in steps:
            yield type(step)
            for inner in {Loop: lambda s: [s.body], Branches: lambda s: s.branches}.get(type(step), lambda s: [])(step):
                yield from kinds(inner)

    assert {Loop, Branches, Kernel, Collective} <= set(kinds(found.steps))


def test_a_schedule_survives_json(pipeline):
    found = schedule.of(pipeline, 0.8)
    assert schedule.from_json(json.loads(json.dumps(schedule.to_json(found)))) == found
