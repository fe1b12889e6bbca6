"""What the compiled program does: counted by instruction in the program that `train.py` runs."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from programs import optimised
from small import config, named

from maxsep.measure.hlo import Instruction, Module
from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

# All different: T tokens a device, E experts, C capacity, D and F widths.
T, E, C, D, F = 23, 12, 5, 40, 56
ZERO = (2, 4)  # the mesh of the tests of `zero`
OF_A_LAYER = sorted(4 * [D * 4 * 10] + [D * E] + 3 * [E // ZERO[1] * D * F])  # its sizes: projections, router, experts


class Compiled:
    """Programs of a run, compiled when they are asked for."""

    def __init__(self, run: Run):
        self.run = run

    @functools.cached_property
    def forward(self) -> Module:
        run = self.run
        batch = jax.ShapeDtypeStruct(run.eval_shape, jnp.int32, sharding=run.batch_sharding)
        with jax.set_mesh(run.mesh):
            return optimised(run.eval_step.lower(run.abstract_state.variables, batch))

    @functools.cached_property
    def step(self) -> Module:
        with jax.set_mesh(self.run.mesh):
            return optimised(self.run.lower_train_step())


def compiled(mesh: tuple[int, ...], layout: str = "ma", rows: int = 0, accumulation: int = 1, **model) -> Compiled:
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
        return Compiled(Run(c))


@pytest.fixture(
    scope="module",
    params=[
        (2, 4),
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in [(4, 1), (1, 4)]),
    ],
    ids=named,
)
def programs(request):
    return request.param, compiled(request.param)


def exchanges(program: Module) -> list[Instruction]:
    return [i for i in program.by_name.values() if i.collective == "all-to-all"]


def test_a_layer_of_the_forward_pass_has_three_exchanges(programs):
    """The rows there and back, and the router's weights of them."""
    (_, expert), forward = programs[0], programs[1].forward
    bodies = [i.body for i in forward.by_name.values() if i.body]
    assert bodies, "the layers are a loop"
    found = [sum(i.collective == "all-to-all" for i in forward.within(body)) for body in bodies]
    assert sorted(found)[-1] == (3 if expert > 1 else 0)
    assert len(exchanges(forward)) == (3 if expert > 1 else 0)
    of_weights = [i for i in exchanges(forward) if sum(a.elements for a in i.arrays) == E * C]
    assert len(of_weights) == (expert > 1)


@pytest.mark.parametrize("which", ["forward", pytest.param("step", marks=pytest.mark.slow)])
def test_no_tensor_of_tokens_experts_and_capacity(programs, which):
    program = getattr(programs[1], which)
    seen = {array.dims for i in program.by_name.values() for array in i.arrays if array.dims}
    assert math.ceil(T * 2 * 1.25 / E) == C
    assert any({C, E} <= set(dims) or E * C in dims for dims in seen), "the buckets, so that C is the capacity"
    for dims in seen:
        assert not {T, E, C} <= set(dims)
        assert math.prod(dims) % (T * E * C), dims


def test_tensor_parallelism_exchanges_no_tokens():
    assert exchanges(compiled((2, 2), "tp").forward) == []


def test_folded_experts_are_exchanged_over_the_whole_mesh():
    forward = compiled((2, 2), "ma_folded").forward
    (body,) = (i.body for i in forward.by_name.values() if i.body)
    assert [forward.devices(i) for i in forward.within(body) if i.collective == "all-to-all"] == [4, 4, 4]
    assert len(exchanges(forward)) == 3


@pytest.mark.slow  # the fast suite counts what stages send in measure/test_program.py
def test_between_stages_go_activations_and_no_weights():
    """Of two stages and five micro-batches of three sequences: all that is sent."""
    stages, rows, micro_batches = 2, 3, 5
    step = compiled((stages, 1, 1), "pp", rows, micro_batches, layers=4, experts=6).step
    sent = [i for i in step.by_name.values() if i.collective and step.devices(i) > 1]
    permutes = [i for i in sent if i.collective == "collective-permute"]
    loops = [i for i in step.by_name.values() if i.body]
    ticks = [step.trips(i) for i in loops if any(j in permutes for j in step.computations[i.body])]
    assert ticks == [micro_batches + stages - 1] * 2, "forward and backward, one permute a tick"
    activations = rows * T * D
    assert [array.elements for i in permutes for array in i.arrays] == [activations] * 2
    others = [array.elements for i in sent if i not in permutes for array in i.arrays]
    large = sorted(size for size in others if size > rows * T)  # a figure a token, in the softmax of the head
    # The embedding's rows, summed over stages, forward and backward; the final states of all micro-batches likewise.
    assert large == 2 * [activations] + 2 * [micro_batches * activations]
    assert not exchanges(step)


@pytest.mark.slow
def test_a_stage_of_tensor_parallelism_exchanges_no_tokens():
    assert exchanges(compiled((2, 2, 2), "tp_pp", rows=4, accumulation=2, layers=2).step) == []


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(r, marks=getattr(pytest.mark, m))
        for r, m in (("none", "slow"), ("full", "slow"), ("dots", "exhaustive"))
    ],
)
def test_a_layers_weights_are_gathered_once_forward_and_once_backward(remat):
    """In `zero`: a layer at a time, inside the loop over micro-batches, and never the whole stack.

    The fast suite counts the bytes, in measure/test_communication.py.
    """
    step = compiled(ZERO, "zero", rows=8, accumulation=2, remat=remat).step
    gathered = weights_gathered(step)
    assert sorted(gathered.values()) == [OF_A_LAYER, OF_A_LAYER]  # the bodies of the loops over layers
    assert step.entry not in gathered


@pytest.mark.slow
def test_no_layers_weights_are_gathered_before_the_loop_over_micro_batches():
    """Also where layers are unrolled. There JAX 0.10 keeps them from the forward to the backward pass."""
    step = compiled(ZERO, "zero", rows=8, accumulation=2, scan_layers=False).step
    ((body, weights),) = weights_gathered(step).items()
    assert body in [i.body for i in step.computations[step.entry]]
    assert weights in (sorted(OF_A_LAYER * 2), sorted(OF_A_LAYER * 4))  # of two layers


def weights_gathered(step: Module) -> dict[str, list[int]]:
    """Sizes of the layers' weights that each computation gathers; other gathers are of tokens, or of a table."""
    others = {ZERO[0] * T * ZERO[0] * D, 256 // ZERO[0] * D}
    assert not others & set(OF_A_LAYER)
    gathered = {
        name: [array for i in instructions if i.collective == "all-gather" for array in i.arrays]
        for name, instructions in step.computations.items()
    }
    sizes = {name: sorted(a.elements for a in arrays if a.dtype == "f32") for name, arrays in gathered.items()}
    return {name: weights for name, found in sizes.items() if (weights := [n for n in found if n not in others])}
