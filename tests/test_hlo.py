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
ZERO = (2, 4)  # the mesh of the tests of `zero`
OF_A_LAYER = sorted(4 * [D * 4 * 10] + [D * E] + 3 * [E // ZERO[1] * D * F])  # its sizes: projections, router, experts


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclass(frozen=True)
class Instruction:
    shape: str
    opcode: str
    called: tuple[str, ...]  # computations: of a loop's body, a fusion, a reduction
    body: str | None  # of a loop
    attributes: str  # operands and attributes, as they are written

    @property
    def sizes(self) -> list[int]:
        """Elements of the results."""
        return [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", self.shape)]

    @property
    def trips(self) -> int:
        """How often a loop runs."""
        return int(re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)[1])

    @property
    def sends(self) -> bool:
        """Whether it is a collective of more than one device."""
        if self.opcode not in COLLECTIVES:
            return False
        if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", self.attributes):  # since JAX 0.12
            sizes = dict(axis.split("=") for axis in mesh[1].split(","))
            return any(sizes[axis] != "1" for axis in mesh[2].split(",") if axis)
        return not re.search(r"replica_groups=\{(\{\d+\},?)+\}", self.attributes)


def parse(text: str) -> dict[str, list[Instruction]]:
    """HLO text as the instructions of each computation; those of conditionals are called by their branches."""
    computations, current = {}, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            current = computations[header[1]] = []
        elif found := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$", line):
            called = re.findall(r"(?:body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)", found[3])
            called += re.findall(r"%?([\w.-]+)", (re.search(r"branch_computations=\{(.*?)\}", found[3]) or ["", ""])[1])
            body = re.search(r"body=%?([\w.-]+)", found[3])
            current.append(Instruction(found[1], found[2], tuple(called), body and body[1], found[3]))
    return computations


def within(computations: dict, name: str) -> list[Instruction]:
    """Instructions of a computation and of all that it calls."""
    out = []
    for instruction in computations[name]:
        out += [instruction, *(i for called in instruction.called for i in within(computations, called))]
    return out


def compiled(mesh: tuple[int, ...], layout: str = "ma", rows: int = 0, accumulation: int = 1, **model) -> tuple:
    """Forward pass and train step of two layers, on micro-batches of `rows` (0: one each for `expert`)."""
    _, attention, expert = (1, *mesh)[-3:]
    widths = {"d_model": D, "d_ff": F, "experts": E, "heads": 4, "head_dim": 10, "capacity_factor": 1.25}
    c = config(
        mesh,
        layout,
        train={"batch_size": (rows or expert) * accumulation, "accumulation": accumulation},
        data={"sequence_length": T * attention},
        model=widths | model,
    )
    with jax.set_mesh(make_mesh(c)):
        r = Run(c)
        batch = jax.ShapeDtypeStruct(r.eval_shape, jnp.int32, sharding=r.batch_sharding)
        forward = r.eval_step.lower(r.abstract_state.params, batch).compile().as_text()
        return parse(forward), parse(r.compile_train_step().as_text())


@pytest.fixture(
    scope="module",
    params=[(2, 4), (4, 1), *(pytest.param(m, marks=pytest.mark.slow) for m in [(2, 2), (1, 1), (1, 4)])],
    ids=named,
)
def programs(request):
    return request.param, *compiled(request.param)


def peers(exchange: Instruction) -> int:
    """Devices of an all-to-all: it has a result from each."""
    return exchange.shape.count("[")


def exchanges(computations) -> list[Instruction]:
    return [i for instructions in computations.values() for i in instructions if i.opcode.startswith("all-to-all")]


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


def test_tensor_parallelism_exchanges_no_tokens():
    for computations in compiled((2, 2), "tp"):
        assert exchanges(computations) == []


def test_folded_experts_are_exchanged_twice_over_the_whole_mesh():
    forward, step = compiled((2, 2), "ma_folded")
    (body,) = (i.body for instructions in forward.values() for i in instructions if i.body)
    assert [peers(i) for i in within(forward, body) if i.opcode == "all-to-all"] == [4, 4]
    assert len(exchanges(forward)) == 2
    assert set(map(peers, exchanges(step))) == {4}


def test_between_stages_go_activations_and_no_weights():
    """Of two stages and five micro-batches of three sequences: all that is sent."""
    stages, rows, micro_batches = 2, 3, 5
    forward, step = compiled((stages, 1, 1), "pp", rows, micro_batches, layers=4, experts=6)
    sent = [i for instructions in step.values() for i in instructions if i.sends]
    permutes = [i for i in sent if i.opcode == "collective-permute"]
    bodies = [i for instructions in step.values() for i in instructions if i.body]
    ticks = [i.trips for i in bodies if any(j in permutes for j in step[i.body])]
    assert ticks == [micro_batches + stages - 1] * 2, "forward and backward, one permute a tick"
    activations = rows * T * D
    assert [i.sizes for i in permutes] == [[activations]] * 2
    others = [size for i in sent if i not in permutes for size in i.sizes]
    large = sorted(size for size in others if size > rows * T)  # a figure a token, in the softmax of the head
    # The embedding's rows, summed over stages, forward and backward; the final states of all micro-batches likewise.
    assert large == 2 * [activations] + 2 * [micro_batches * activations]
    assert not exchanges(forward) + exchanges(step)


@pytest.mark.slow
def test_a_stage_of_tensor_parallelism_exchanges_no_tokens():
    for computations in compiled((2, 2, 2), "tp_pp", rows=4, accumulation=2, layers=2):
        assert exchanges(computations) == []


@pytest.mark.parametrize("remat", ["none", *(pytest.param(r, marks=pytest.mark.slow) for r in ("full", "dots"))])
def test_a_layers_weights_are_gathered_once_forward_and_once_backward(remat):
    """In `zero`: a layer at a time, inside the loop over micro-batches, and never the whole stack."""
    _, step = compiled(ZERO, "zero", rows=8, accumulation=2, remat=remat)
    gathered = weights_gathered(step)
    assert sorted(gathered.values()) == [OF_A_LAYER, OF_A_LAYER]  # the bodies of the loops over layers
    assert entry(step) not in gathered


@pytest.mark.slow
def test_no_layers_weights_are_gathered_before_the_loop_over_micro_batches():
    """Also where layers are unrolled. There JAX 0.10 keeps them from the forward to the backward pass."""
    _, step = compiled(ZERO, "zero", rows=8, accumulation=2, scan_layers=False)
    ((body, weights),) = weights_gathered(step).items()
    assert body in [i.body for i in step[entry(step)]]
    assert weights in (sorted(OF_A_LAYER * 2), sorted(OF_A_LAYER * 4))  # of two layers


def weights_gathered(step: dict) -> dict[str, list[int]]:
    """Sizes of the layers' weights that each computation gathers; other gathers are of tokens, or of a table."""
    others = {ZERO[0] * T * ZERO[0] * D, 256 // ZERO[0] * D}
    assert not others & set(OF_A_LAYER)
    sizes = {
        name: sorted(size for i in instructions if i.opcode == "all-gather" and "f32" in i.shape for size in i.sizes)
        for name, instructions in step.items()
    }
    return {name: weights for name, found in sizes.items() if (weights := [n for n in found if n not in others])}


def entry(step: dict) -> str:
    return next(reversed(step))  # the last in the text
