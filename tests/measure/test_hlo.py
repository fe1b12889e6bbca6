"""A compiled program's text as instructions."""

import jax
import jax.numpy as jnp
import pytest

from maxsep.measure import hlo

HEAD = "HloModule step, num_partitions=8\n\nENTRY %main (p: f32[8]) -> f32[8] {\n"


def collective(attributes: str) -> tuple[hlo.Module, hlo.Instruction]:
    module = hlo.parse(
        f"{HEAD}  ROOT %a.1 = f32[8]{{0}} all-reduce(%p), channel_id=1, {attributes}, metadata={{}}\n}}\n"
    )
    return module, module.by_name["a.1"]


@pytest.mark.parametrize(
    "attributes, groups",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups={{0},{1,2,3},{4,5}}", [[0], [1, 2, 3], [4, 5]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            "replica_groups=mesh['stage'=1,'attention'=4,'expert'=2] {'attention','expert'}",
            [[0, 1, 2, 3, 4, 5, 6, 7]],
        ),
        ("replica_groups=mesh['stage'=1,'attention'=4,'expert'=2] {'attention'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['stage'=1,'attention'=2,'expert'=2] {'stage'}", [[0], [1], [2], [3]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("source_target_pairs={{0,0},{1,2}}", [[1, 2]]),
        ("source_target_pairs={{0,0},{1,1}}", []),
    ],
)
def test_a_collective_has_these_groups(attributes, groups):
    module, instruction = collective(attributes)
    assert module.groups(instruction) == groups
    assert module.devices(instruction) == max(map(len, groups), default=1)


def test_a_line_is_taken_apart():
    text = (
        "  ROOT %x.2 = (f64[4,2]{1,0}, /*index=1*/bf16[3]{0}, pred[], u4[3]{0}) all-to-all(%a, %b#1), channel_id=1, "
        'replica_groups={{0,1}}, metadata={op_name="jit(f)/(moe/dispatch/x:head/y)"}\n}\n'
    )
    found = hlo.parse(HEAD + text).by_name["x.2"]
    assert [array.bytes for array in found.arrays] == [64, 6, 1, 2]
    assert found.operands == ("a", "b#1")
    assert found.paths == ["jit(f)/moe/dispatch/x", "jit(f)/head/y"]


def test_loops_and_conditionals_count_as_often_as_they_run():
    def f(x, n):
        x = jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), x)
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tan(x), x)

    module = hlo.parse(jax.jit(f).lower(jnp.ones(64), 3).compile().as_text())
    times = {i.opcode: times for i, times in module.run(busy=0.4) if i.opcode in ("sine", "tan")}
    assert times == {"sine": pytest.approx(2), "tan": None}
