"""What the compiled program does: counted by instruction in the program that `train.py` runs."""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from small import config, named

from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

# All different: T tokens a device, E experts, C capacity, D and F widths.
T, E, C, D, F = 23, 12, 5, 40, 56


@dataclass(frozen=True)
class Instruction:
    shape: str
    opcode: str
    called: tuple[str, ...]  # computations: of a loop's body, a fusion, a reduction
    body: str | None  # of a loop


def parse(text: str) -> dict[str, list[Instruction]]:
    """HLO text as the instructions of each computation."""
    computations, current = {}, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            current = computations[header[1]] = []
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$", line):
            called = re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)", found[3])
            body = re.search(r"body=%?([\w.-]+)", found[3])
            current.append(Instruction(found[1], found[2], tuple(called), body and body[1]))
    return computations


def within(computations: dict, name: str) -> list[Instruction]:
    """Instructions of a computation and of all that it calls."""
    out = []
    for instruction in computations[name]:
        out += [instruction, *(i for called in instruction.called for i in within(computations, called))]
    return out


def run(mesh: tuple[int, int]) -> Run:
    attention, expert = mesh
    return Run(
        config(
            mesh,
            train={"batch_size": expert},
            data={"sequence_length": T * attention},
            model={"d_model": D, "d_ff": F, "experts": E, "heads": 4, "head_dim": 10, "capacity_factor": 1.25},
        )
    )


@pytest.fixture(
    scope="module",
    params=[(2, 4), (4, 1), *(pytest.param(m, marks=pytest.mark.slow) for m in [(2, 2), (1, 1), (1, 4)])],
    ids=named,
)
def programs(request):
    with jax.set_mesh(make_mesh(config(request.param, model={"heads": 4, "experts": 4}, train={"batch_size": 4}))):
        r = run(request.param)
        batch = jax.ShapeDtypeStruct(r.eval_shape, jnp.int32, sharding=r.batch_sharding)
        forward = r.eval_step.lower(r.abstract_state.params, batch).compile().as_text()
        step = r.compile_train_step().as_text()
    return request.param, parse(forward), parse(step)


def test_a_layer_of_the_forward_pass_has_two_exchanges(programs):
    (_, expert), forward, _ = programs
    bodies = [i.body for instructions in forward.values() for i in instructions if i.body]
    assert bodies, "the layers are a loop"
    exchanges = [sum(i.opcode == "all-to-all" for i in within(forward, body)) for body in bodies]
    assert sorted(exchanges)[-1] == (2 if expert > 1 else 0)
    everywhere = sum(i.opcode.startswith("all-to-all") for instructions in forward.values() for i in instructions)
    assert everywhere == (2 if expert > 1 else 0)


def test_no_tensor_of_tokens_experts_and_capacity(programs):
    _, *both = programs
    seen = set()
    for computations in both:
        for instructions in computations.values():
            for instruction in instructions:
                for dims in re.findall(r"\w+\[([\d,]+)\]", instruction.shape):
                    seen.add(tuple(map(int, dims.split(","))))
    assert math.ceil(T * 2 * 1.25 / E) == C
    assert any({C, E} <= set(dims) or E * C in dims for dims in seen), "the buckets, so that C is the capacity"
    for dims in seen:
        assert not {T, E, C} <= set(dims)
        assert math.prod(dims) % (T * E * C), dims
