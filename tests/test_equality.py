"""Layout never changes the result: loss and gradients of a step, and 20 losses, on every mesh shape.

In float32 rounding can tip a choice between two experts whose scores are almost equal; whether it does depends on the
machine. So float32 is compared for one step only, on numbers that leave a gap at every choice. Longer runs and whatever
else is compared between meshes are in float64, where a sum in another order moves nothing that matters.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from programs import END_OF_TEXT, gradients, leaves_differ, parameters, placed, trained
from small import MA_IN_STAGES, MESHES, SEED, config, named, text

from maxsep.config import ConfigError
from maxsep.config.layouts import AXES, row
from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

ROUNDING = {"float32": 1e-5, "float64": 1e-12}  # of a leaf's largest entry; of a loss
GAP = 1e-5  # between the scores of the last chosen and the next expert; float32's rounding moves a score by 2e-6


def devices_apart(c) -> tuple[int, int]:
    """Parts of a sequence, and of the batch, whose choices are dispatched apart: axes of F join them."""
    axes, sizes = row(c.layout), dict(zip(AXES, c.mesh.shape, strict=True))
    return tuple(math.prod(sizes[axis] for axis in axes.get(x, ()) if axis not in axes.get("f", ())) for x in "sb")


# Each config is compared with the dense oracle on its mesh; together they have each value of each switch.
STEPS = {
    "1x1": {"mesh": (1, 1)},
    "4x4, norms of each head, raw weights": {
        "mesh": (4, 4),
        "model": {"qk_norm": "head", "normalize_top_k": False},
    },
    "2x8 unrolled, dots, k 3, gelu": {
        "mesh": (2, 8),
        "model": {"scan_layers": False, "remat": "dots", "top_k": 3, "activation": "gelu"},
    },
    "8x2 kv heads replicated, full, tied, zero1, a norm over all heads, clipped": {
        "mesh": (8, 2),
        "model": {
            "dtype": "float64",
            "kv_heads": 2,
            "remat": "full",
            "tied_embedding": True,
            "qk_norm": "all",
            "clip_qkv": 1.0,
        },
        "optimizer": {"zero1": True},
    },
    "1x16 capacity, accumulation": {
        "mesh": (1, 16),
        "model": {"layers": 1, "capacity_factor": 1.25, "capacity_group": 16},
        "train": {"batch_size": 32, "accumulation": 2},
    },
    "2x2 capacity, kv heads split, unrolled, full, k 1, a norm over all heads, raw weights": {
        "mesh": (2, 2),
        "model": {
            "capacity_factor": 1.0,
            "kv_heads": 4,
            "qk_norm": "all",
            "normalize_top_k": False,
            "scan_layers": False,
            "remat": "full",
            "top_k": 1,
            "vocab_size": 256,
        },
        "data": {"cross_document_attention": False},
        "optimizer": {"zero1": True},
    },
    "ma_folded 4x4, kv heads replicated, documents": {
        "layout": "ma_folded",
        "mesh": (4, 4),
        "model": {"kv_heads": 2},
        "data": {"cross_document_attention": False},
    },
    "tp 8x2, capacity, accumulation, kv heads replicated, tied": {
        "layout": "tp",
        "mesh": (8, 2),
        "model": {"capacity_factor": 1.25, "kv_heads": 4, "tied_embedding": True},
        "train": {"batch_size": 32, "accumulation": 2},
    },
    "zero 4x4, capacity, accumulation, documents": {
        "layout": "zero",
        "mesh": (4, 4),
        "model": {"capacity_factor": 1.25, "kv_heads": 2},
        "train": {"batch_size": 32, "accumulation": 2},
        "data": {"cross_document_attention": False},
    },
}
FLOAT64 = {"dtype": "float64"}
TWO_STAGES, FOUR_STAGES = ({"batch_size": 16 * stages, "accumulation": stages} for stages in (2, 4))
SLOW_STEPS = {
    "16x1 kv heads replicated, documents": {
        "mesh": (16, 1),
        "model": {"kv_heads": 4, "vocab_size": 2000},
        "data": {"cross_document_attention": False},
    },
    "ma_folded 2x8, unrolled, dots, k 3, gelu": {
        "layout": "ma_folded",
        "mesh": (2, 8),
        "model": FLOAT64 | {"scan_layers": False, "remat": "dots", "top_k": 3, "activation": "gelu"},
    },
    "tp 4x4, unrolled, full, k 3, gelu, zero1": {
        "layout": "tp",
        "mesh": (4, 4),
        "model": FLOAT64 | {"scan_layers": False, "remat": "full", "top_k": 3, "activation": "gelu"},
        "optimizer": {"zero1": True},
    },
    "zero 2x2x4, unrolled, dots, k 3, raw weights, gelu": {
        "layout": "zero",
        "mesh": (2, 2, 4),
        "model": FLOAT64
        | {"scan_layers": False, "remat": "dots", "top_k": 3, "activation": "gelu", "kv_heads": 2}
        | {"qk_norm": "head", "normalize_top_k": False},
        "optimizer": {"zero1": True},
    },
    "zero 16x1, full": {"layout": "zero", "mesh": (16, 1), "model": {"remat": "full"}},
    "zero 1x16": {"layout": "zero", "mesh": (1, 16), "model": FLOAT64},
    "tp 16x1, a norm over all heads, clipped": {
        "layout": "tp",
        "mesh": (16, 1),
        "model": FLOAT64 | {"kv_heads": 4, "qk_norm": "all", "clip_qkv": 1.0},
    },
    "pp 2x1x8, capacity, kv heads, documents": {
        "layout": "pp",
        "mesh": (2, 1, 8),
        "model": {"capacity_factor": 1.25, "kv_heads": 2},
        "train": TWO_STAGES,
        "data": {"cross_document_attention": False},
    },
    "pp 4x1x4, unrolled, dots, k 3, gelu, zero1": {
        "layout": "pp",
        "mesh": (4, 1, 4),
        "model": FLOAT64 | {"layers": 4, "scan_layers": False, "remat": "dots", "top_k": 3, "activation": "gelu"},
        "train": FOUR_STAGES,
        "optimizer": {"zero1": True},
    },
    "tp_pp 2x8x1, full, tied, capacity, more micro-batches": {
        "layout": "tp_pp",
        "mesh": (2, 8, 1),
        "model": {"remat": "full", "kv_heads": 4, "tied_embedding": True, "capacity_factor": 1.25, "qk_norm": "all"},
        "train": {"batch_size": 20, "accumulation": 5},
    },
    "tp_pp 4x2x2, documents, zero1": {
        "layout": "tp_pp",
        "mesh": (4, 2, 2),
        "model": FLOAT64 | {"layers": 4},
        "train": FOUR_STAGES,
        "data": {"cross_document_attention": False},
        "optimizer": {"zero1": True},
    },
    "ma in stages 4x2x2, full, capacity, zero1": {
        "layout": MA_IN_STAGES,
        "mesh": (4, 2, 2),
        "model": FLOAT64 | {"layers": 4, "remat": "full", "capacity_factor": 1.0, "capacity_group": 4},
        "train": FOUR_STAGES,
        "optimizer": {"zero1": True},
    },
    "own, stages that each compute the head": {
        "layout": "l=stage b=expert h=attention",
        "mesh": (2, 2, 4),
        "model": FLOAT64,
        "train": TWO_STAGES,
    },
    "own, stages over two axes, weights at rest": {
        "layout": "l=stage+attention b=expert e=expert v=attention w=stage+expert",
        "mesh": (2, 2, 4),
        "model": FLOAT64 | {"layers": 4},
        "train": FOUR_STAGES,
        "optimizer": {"zero1": True},
    },
    "own, copies of the tokens, heads over two axes": {
        "layout": "b=expert s=attention h=stage+attention f=stage v=expert",
        "mesh": (2, 2, 4),
        "model": FLOAT64 | {"capacity_factor": 1.25, "kv_heads": 2, "qk_norm": "all", "clip_qkv": 1.0},
    },
    "own, tensor parallel experts in ma, weights at rest": {
        "layout": "b=stage+expert s=attention h=attention e=attention+expert f=stage v=stage w=stage+expert",
        "mesh": (2, 2, 4),
        "model": {"capacity_factor": 1.25, "capacity_group": 8},
        "optimizer": {"zero1": True},
    },
}
STEPS |= SLOW_STEPS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_STEPS else name for name in STEPS]
)
def test_a_step_equals_the_dense_model(name):
    """Loss and every gradient, with padded targets and a vocabulary that is no multiple of 128 nor of the mesh."""
    c = config(**STEPS[name])
    batch = text(c, 1)[0]
    batch[:, -1, 20:] = -1
    batch[:, :, 11] = END_OF_TEXT
    rows, length = batch.shape[1], batch.shape[2] - 1
    groups = oracle.device_groups(rows, length, *devices_apart(c), c.model.capacity_group)
    end_of_text = None if c.data.cross_document_attention else END_OF_TEXT
    with jax.enable_x64(True):
        loss = functools.partial(oracle.model_loss, batch_abt=batch, config=c, groups=groups, end_of_text=end_of_text)
        differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
        for draw in range(10):  # one draw in some twenty has a smaller gap
            params = parameters(c, draw)
            outputs = jax.device_get(differentiated(jax.tree.map(jnp.asarray, params)))
            (total, (cross_entropy, dropped, gap)), expected = outputs
            if gap >= GAP:
                break
    assert gap >= GAP, "rounding may choose other experts than the oracle"
    found, metrics = gradients(c, params, batch)
    rounding = ROUNDING[c.model.dtype]
    assert metrics["total_loss"] == pytest.approx(total, rel=rounding)
    assert metrics["loss"] == pytest.approx(cross_entropy, rel=rounding)
    assert metrics["dropped_l"].sum() == dropped
    assert (dropped > 0) == (c.model.capacity_factor is not None)
    differ = leaves_differ(found, expected)
    assert max(differ.values()) <= rounding, differ


@pytest.mark.parametrize(
    ("layout", "mesh"),
    [("ma", (4, 4)), *(pytest.param(*at, marks=pytest.mark.slow) for at in [("ma", (2, 8)), ("tp_pp", (2, 4, 2))])],
)
def test_bfloat16_is_near_float32(layout, mesh):
    two = {"accumulation": 2}
    params, batch = parameters(config(train=two)), text(config(train=two), 1)[0]
    exact, metrics = gradients(config(train=two), params, batch)
    found, rough = gradients(config(mesh, layout, model={"dtype": "bfloat16"}, train=two), params, batch)
    assert rough["loss"] == pytest.approx(metrics["loss"], rel=0.02)
    # Choices of experts flip where scores are close, so single entries differ; the whole points the same way.
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, exact))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.95
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


@pytest.mark.slow  # the fast suite has it in test_layouts.py, and the masks themselves in model/test_moe.py
def test_expert_dropout_is_the_same_on_every_mesh():
    """Its masks follow the token through meshes and micro-batches; another step has other ones."""
    changes = {"train": {"accumulation": 2}, "model": {"expert_dropout": 0.3, "dtype": "float64"}}
    c = config(**changes)
    params, batch = parameters(c), text(c, 1)[0]
    expected, with_dropout = gradients(c, params, batch)
    found, metrics = gradients(config((2, 8), **changes), params, batch)
    assert metrics["loss"] == pytest.approx(with_dropout["loss"], rel=ROUNDING["float64"])
    differ = leaves_differ(found, expected)
    assert max(differ.values()) <= ROUNDING["float64"], differ
    _, next_step = gradients(c, params, batch, step=1)
    assert abs(next_step["loss"] - with_dropout["loss"]) > 1e-4 * with_dropout["loss"]


def test_padded_ids_are_never_produced():
    """The padding's rows get no gradient, so they have no probability."""
    c = config((4, 4))
    found, _ = gradients(c, parameters(c), text(c, 1)[0])
    assert c.model.padded_vocab_size > c.model.vocab_size
    for table in (found["head_vd"], found["embedding"]["table_vd"]):
        assert not table[c.model.vocab_size :].any()
        assert table[: c.model.vocab_size].any()


def test_ids_that_the_tokenizer_lacks_are_never_produced():
    c = config((4, 4))
    few = 180  # of 200
    with jax.set_mesh(make_mesh(c)):
        r = Run(c, END_OF_TEXT, few)
        params = placed(parameters(c), r.abstract_state.params)
        batch = jax.device_put(text(c, 1)[0] % few, r.batch_sharding)
        found, _ = jax.device_get(jax.jit(r.program._gradients)(params, batch, np.int32(0)))
    assert not found["head_vd"][few:].any()
    assert found["head_vd"][:few].any(axis=1).all()


DISPATCHES = {
    "dropless": {"model": FLOAT64},
    "drops": {
        "model": FLOAT64 | {"capacity_factor": 1.0, "capacity_group": 4},
        "data": {"sequence_length": 64},
    },
}
QUICK = ("drops", (2, 8))


def equalities():
    """Each dispatch on each mesh. The slow suite holds one of the two on each, in turns."""
    for number, mesh in enumerate(MESHES[1:]):
        for dispatch in DISPATCHES:
            slow = dispatch == list(DISPATCHES)[number % 2]
            mark = [] if (dispatch, mesh) == QUICK else pytest.mark.slow if slow else pytest.mark.exhaustive
            yield pytest.param(dispatch, mesh, id=f"{dispatch}-{named(mesh)}", marks=mark)


@pytest.mark.parametrize(("dispatch", "mesh"), list(equalities()))
def test_twenty_losses_are_the_same(dispatch, mesh):
    alone = config(**DISPATCHES[dispatch])
    expected, moved, dropped = trained(alone)
    assert expected[0] - expected[-1] >= 1, "it learns"
    assert moved > 0.01, "so does the router"
    assert (max(dropped) > 0) == (dispatch == "drops")
    losses, _, also_dropped = trained(config(mesh, **DISPATCHES[dispatch]), alone)
    assert losses == pytest.approx(expected, rel=ROUNDING["float64"])
    assert also_dropped == dropped


def test_a_mesh_that_cuts_a_capacity_group_is_refused():
    changes = {"model": {"capacity_factor": 1.0, "capacity_group": 4}, "data": {"sequence_length": 32}}
    with pytest.raises(ConfigError, match=r"^model.capacity_group: got 4; takes a divisor of .* \(2\)$"):
        config((16, 1), **changes)


def test_another_seed_has_other_losses():
    alone = config(**DISPATCHES["drops"])
    losses, _, _ = trained(alone)
    others, _, _ = trained(alone, config(**DISPATCHES["drops"], train={"seed": SEED + 1}))
    assert np.abs(np.subtract(losses, others)).min() > 1e-4 * losses[0]


def test_what_only_changes_the_cost():
    """ZeRO-1, unrolled layers and rematerialisation."""
    alone = config(**DISPATCHES["drops"])
    expected, _, _ = trained(alone)
    cheaper = DISPATCHES["drops"]["model"] | {"scan_layers": False, "remat": "full"}
    other = config((4, 4), **DISPATCHES["drops"] | {"model": cheaper, "optimizer": {"zero1": True}})
    losses, _, _ = trained(other, alone)
    assert losses == pytest.approx(expected, rel=ROUNDING["float64"])
