"""The parts of a certificate on small configs: each passes, and sees what is planted in it."""

import functools

import jax
import pytest
from small import config

from maxsep.certification import choices, evidence, kernels, moves, planting, precision
from maxsep.certification.differences import compared
from maxsep.certification.plants import PLANTS, planted
from maxsep.certification.rig import Rig, alone
from maxsep.certification.scaled import in_own_type, scaled

SMALL = {"layers": 1, "experts": 4, "heads": 2}


def named(part: str):
    (plant,) = (plant for plant in PLANTS if plant.part == part)
    return plant


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [
        pytest.param("float32", "swiglu", marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("float32", "gelu"), ("bfloat16", "swiglu"))),
    ],
)
def test_kernels_compute_what_loops_do(dtype, activation):
    model = config(model=SMALL | {"dtype": dtype, "activation": activation, "attention_kernel": "xla"}).model
    for check in kernels.checks(model, "cpu"):
        assert check.passed, check


@pytest.mark.slow
def test_a_kernel_that_leaves_a_block_is_seen():
    plant = named("kernels")
    with planted(plant):
        found = kernels.checks(config(model=SMALL).model, "cpu")
        assert not next(check for check in found if check.quantity == plant.quantity).passed


@pytest.mark.slow
def test_a_state_moves_from_layout_to_layout(tmp_path):
    def wrong(folder):
        found = moves.checks([(rig, state) for rig in rigs], tmp_path / folder)
        return {(check.run, check.quantity) for check in found if not check.passed}

    with jax.enable_x64(True):
        ring = (("ma", (2, 2)), ("zero", (1, 2)))
        rigs = [Rig(config(mesh, layout, model=SMALL | {"dtype": "float64"})) for layout, mesh in ring]
        state, _ = rigs[0].train(rigs[0].new_state(), evidence.batches(rigs[0].config, 1)[0])
        state = jax.device_get(state)
        assert wrong("right") == set()
        with planted(named("moves")):
            quantities = ("fingerprints", "restored state", "next state")
            assert wrong("wrong") == {(run, of) for run in ("ma:2x2", "zero:1x2") for of in quantities}


@pytest.mark.parametrize(
    "dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), pytest.param("float32", marks=pytest.mark.exhaustive)]
)
def test_a_layout_loses_no_more_than_its_type_does_on_one_device(dtype):
    made = config((2, 2), "ma_folded", model=SMALL | {"dtype": dtype})
    own = in_own_type(made, scaled(made, [made]))
    reference = precision.Reference(own)
    found = list(precision.checks(reference, Rig(own)))
    assert {check.part for check in found} == {"dtype", "repeats"} and all(check.passed for check in found)
    assert max(reference.lost["gradients"].values()) < {"float32": 1e-4, "bfloat16": 0.5}[dtype]
    assert choices.note(own, reference).startswith(f"choices: of 48 tokens chose other experts in {dtype} than")


@pytest.mark.exhaustive
@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant.part == "layouts"], ids=lambda plant: plant.name)
def test_a_fault_is_seen_in_the_quantity_that_names_it(plant):
    made = planting.on(config(), plant.run, [plant])
    with jax.enable_x64(True):
        reference = lone(alone(made))
        with planted(plant):
            for quantity, found in evidence.gathered(Rig(made), reference["new state"]):
                (check,) = compared("layouts", plant.run, {quantity: found}, reference, evidence.TOLERANCE)
                if quantity == plant.quantity:
                    break
    assert not check.passed


@functools.cache
def lone(made):
    return dict(evidence.gathered(Rig(made)))
