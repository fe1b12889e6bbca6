"""Layout never changes the result: loss and gradients of a step, and 20 losses, on every mesh shape.

In float32 rounding can tip a choice between two experts whose scores are almost equal; whether it does depends on the
machine. So float32 is compared for one step only, on numbers that leave a gap at every choice. Longer runs and whatever
else is compared between meshes are in float64, where a sum in another order moves nothing that matters.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from programs import END_OF_TEXT, drawn, gradients, leaves_differ, parameters, run, trained
from small import MA_IN_STAGES, MESHES, SEED, config, named, text

from maxsep.config import ConfigError, MeshConfig
from maxsep.config.layouts import AXES, row

ROUNDING = {"float32": 1e-5, "float64": 1e-12}  # of a leaf's largest entry; of a loss
GAP = 1e-5  # between the scores of the last chosen and the next expert; float32's rounding moves a score by 2e-6


def devices_apart(c) -> tuple[int, int]:
    """Parts of a sequence, and of the batch, whose choices are dispatched apart: axes of F join them."""
    axes, sizes = row(c.layout), dict(zip(AXES, c.mesh.shape, strict=True))
    return tuple(math.prod(sizes[axis] for axis in axes.get(x, ()) if axis not in axes.get("f", ())) for x in "sb")


# Each config is compared with the dense oracle on its mesh; those of the fast suite have each value of each switch.
FLOAT64 = {"dtype": "float64"}
SIGMOID, BIAS = {"router_score": "sigmoid", "router_scale": 2.5}, {"router_bias_rate": 0.01}
GROUPS, SHARED = {"router_groups": 8, "router_top_groups": 2}, {"shared_experts": 2}
OVER_SEQUENCES, OVER_THE_BATCH = {"balance_over": "sequence"}, {"balance_over": "batch"}
MICRO = {"batch_size": 32, "accumulation": 2}
TWO_DENSE = {"layers": 3, "dense_layers": 2, "dense_d_ff": 48}
STEPS = {
    "4x4, unrolled, dots, k 3, gelu, norms of each head, raw weights, ids that the tokenizer lacks": {
        "mesh": (4, 4),
        "model": {
            "scan_layers": False,
            "remat": "dots",
            "top_k": 3,
            "activation": "gelu",
            "qk_norm": "head",
            "normalize_top_k": False,
        },
    },
    "2x2 capacity, kv heads split, full, k 1, a norm over all heads, documents, zero1": {
        "mesh": (2, 2),
        "model": {
            "layers": 1,
            "capacity_factor": 1.0,
            "kv_heads": 4,
            "qk_norm": "all",
            "remat": "full",
            "top_k": 1,
            "vocab_size": 256,
        },
        "data": {"cross_document_attention": False},
        "optimizer": {"zero1": True},
    },
    "ma_folded 4x4, full, many rounds, kv heads replicated, clipped": {
        "layout": "ma_folded",
        "mesh": (4, 4),
        "model": {"layers": 1, "remat": "full", "exchange_factor": 0.2, "kv_heads": 2, "clip_qkv": 1.0},
    },
    "tp 8x2, a dense layer, capacity, accumulation, kv heads replicated, tied": {
        "layout": "tp",
        "mesh": (8, 2),
        "model": {"dense_layers": 1, "dense_d_ff": 48, "capacity_factor": 1.25, "kv_heads": 4, "tied_embedding": True},
        "train": {"batch_size": 32, "accumulation": 2},
    },
    "zero 4x4, kv heads replicated, documents": {
        "layout": "zero",
        "mesh": (4, 4),
        "model": FLOAT64 | {"kv_heads": 2},
        "data": {"cross_document_attention": False},
    },
    "4x4, sigmoid, bias, groups, scale, gated shared experts": {
        "mesh": (4, 4),
        "model": FLOAT64 | SIGMOID | BIAS | GROUPS | SHARED | {"layers": 1, "shared_gate": True},
    },
}
TWO_STAGES, FOUR_STAGES = ({"batch_size": 16 * stages, "accumulation": stages} for stages in (2, 4))
SLOW_STEPS = {
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
    "zero 4x4, capacity, accumulation, documents": {
        "layout": "zero",
        "mesh": (4, 4),
        "model": {"capacity_factor": 1.25, "kv_heads": 2},
        "train": {"batch_size": 32, "accumulation": 2},
        "data": {"cross_document_attention": False},
    },
    "ma_folded 2x8, unrolled, dots, k 3, gelu, many rounds": {
        "layout": "ma_folded",
        "mesh": (2, 8),
        "model": FLOAT64
        | {"scan_layers": False, "remat": "dots", "top_k": 3, "activation": "gelu", "exchange_factor": 0.2},
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
    "4x4, two dense layers": {"mesh": (4, 4), "model": FLOAT64 | TWO_DENSE},
    "ma_folded 2x8, two dense layers, capacity, unrolled, dots, gelu": {
        "layout": "ma_folded",
        "mesh": (2, 8),
        "model": FLOAT64
        | TWO_DENSE
        | {"capacity_factor": 1.25, "scan_layers": False, "remat": "dots", "activation": "gelu"},
    },
    "tp 8x2, two dense layers, accumulation, full, zero1": {
        "layout": "tp",
        "mesh": (8, 2),
        "model": FLOAT64 | TWO_DENSE | {"remat": "full"},
        "train": {"batch_size": 32, "accumulation": 2},
        "optimizer": {"zero1": True},
    },
    "zero 2x2x4, two dense layers, unrolled, documents": {
        "layout": "zero",
        "mesh": (2, 2, 4),
        "model": FLOAT64 | TWO_DENSE | {"scan_layers": False},
        "data": {"cross_document_attention": False},
    },
    "ma_folded 4x4, a bias of softmax, over sequences, many rounds": {
        "layout": "ma_folded",
        "mesh": (4, 4),
        "model": FLOAT64 | BIAS | OVER_SEQUENCES | {"exchange_factor": 0.3},
    },
    "tp 8x2, sigmoid, raw weights, groups, over the batch, capacity, full": {
        "layout": "tp",
        "mesh": (8, 2),
        "model": FLOAT64
        | SIGMOID
        | GROUPS
        | OVER_THE_BATCH
        | {"normalize_top_k": False, "capacity_factor": 1.25, "remat": "full"},
        "train": MICRO,
    },
    "zero 4x4, shared experts, a dense layer, bias, over the batch, dots": {
        "layout": "zero",
        "mesh": (4, 4),
        "model": FLOAT64 | BIAS | SHARED | OVER_THE_BATCH | {"dense_layers": 1, "dense_d_ff": 48, "remat": "dots"},
        "train": MICRO,
    },
    "pp 2x1x8, sigmoid, bias, groups, shared experts, over the batch": {
        "layout": "pp",
        "mesh": (2, 1, 8),
        "model": FLOAT64 | SIGMOID | BIAS | GROUPS | SHARED | OVER_THE_BATCH,
        "train": {"batch_size": 48, "accumulation": 3},
    },
    "own, dense layers over two axes, weights at rest": {
        "layout": "b=expert s=attention h=attention e=expert m=attention+expert f=stage v=stage w=stage+expert",
        "mesh": (2, 2, 4),
        "model": FLOAT64 | TWO_DENSE,
    },
    "pp 2x1x8, capacity, kv heads, documents": {
        "layout": "pp",
        "mesh": (2, 1, 8),
        "model": {"capacity_factor": 1.25, "kv_heads": 2},
        "train": TWO_STAGES,
        "data": {"cross_document_attention": False},
    },
    "tp_pp 2x8x1, full, tied, capacity, more micro-batches": {
        "layout": "tp_pp",
        "mesh": (2, 8, 1),
        "model": {"remat": "full", "kv_heads": 4, "tied_embedding": True, "capacity_factor": 1.25, "qk_norm": "all"},
        "train": {"batch_size": 20, "accumulation": 5},
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
EXHAUSTIVE_STEPS = {
    "pp 4x1x4, unrolled, dots, k 3, gelu, zero1": {
        "layout": "pp",
        "mesh": (4, 1, 4),
        "model": FLOAT64
        | {
            "layers": 4,
            "scan_layers": False,
            "remat": "dots",
            "top_k": 3,
            "activation": "gelu",
            "exchange_factor": 0.2,
        },
        "train": FOUR_STAGES,
        "optimizer": {"zero1": True},
    },
    "ma in stages 4x2x2, full, capacity, zero1": {
        "layout": MA_IN_STAGES,
        "mesh": (4, 2, 2),
        "model": FLOAT64 | {"layers": 4, "remat": "full", "capacity_factor": 1.0, "capacity_group": 4},
        "train": FOUR_STAGES,
        "optimizer": {"zero1": True},
    },
    "1x1": {"mesh": (1, 1)},
    "1x1, sigmoid": {"model": FLOAT64 | SIGMOID},
    "1x1, groups": {"model": FLOAT64 | GROUPS},
    "1x1, bias": {"model": FLOAT64 | BIAS},
    "1x1, shared experts": {"model": FLOAT64 | SHARED},
    "1x1, over sequences": {"model": FLOAT64 | OVER_SEQUENCES},
    "1x1, over the batch": {"model": FLOAT64 | OVER_THE_BATCH, "train": {"accumulation": 4}},
    "2x8, over sequences": {"mesh": (2, 8), "model": FLOAT64 | OVER_SEQUENCES, "train": MICRO},
    "tp_pp 2x8x1, bias, over sequences, gated shared experts": {
        "layout": "tp_pp",
        "mesh": (2, 8, 1),
        "model": FLOAT64 | BIAS | OVER_SEQUENCES | SHARED | {"shared_gate": True},
        "train": MICRO,
    },
    "2x8 unrolled, dots, k 3, gelu, many rounds": {
        "mesh": (2, 8),
        "model": {"scan_layers": False, "remat": "dots", "top_k": 3, "activation": "gelu", "exchange_factor": 0.3},
    },
    "1x16 capacity, accumulation": {
        "mesh": (1, 16),
        "model": {"layers": 1, "capacity_factor": 1.25, "capacity_group": 16},
        "train": {"batch_size": 32, "accumulation": 2},
    },
    "ma_folded 4x4, kv heads replicated, documents": {
        "layout": "ma_folded",
        "mesh": (4, 4),
        "model": {"kv_heads": 2},
        "data": {"cross_document_attention": False},
    },
    "16x1 kv heads replicated, documents": {
        "mesh": (16, 1),
        "model": {"kv_heads": 4, "vocab_size": 2000},
        "data": {"cross_document_attention": False},
    },
    "zero 16x1, full": {"layout": "zero", "mesh": (16, 1), "model": {"remat": "full"}},
    "zero 1x16": {"layout": "zero", "mesh": (1, 16), "model": FLOAT64},
    "tp 16x1, a norm over all heads, clipped": {
        "layout": "tp",
        "mesh": (16, 1),
        "model": FLOAT64 | {"kv_heads": 4, "qk_norm": "all", "clip_qkv": 1.0},
    },
    "tp_pp 4x2x2, documents, zero1": {
        "layout": "tp_pp",
        "mesh": (4, 2, 2),
        "model": FLOAT64 | {"layers": 4},
        "train": FOUR_STAGES,
        "data": {"cross_document_attention": False},
        "optimizer": {"zero1": True},
    },
    "own, stages that each compute the head": {
        "layout": "l=stage b=expert h=attention",
        "mesh": (2, 2, 4),
        "model": FLOAT64,
        "train": TWO_STAGES,
    },
}
STEPS |= SLOW_STEPS | EXHAUSTIVE_STEPS
FEWER_IDS = 180  # of 200: the tokenizer's ids, in the step that has fewer


class Dense(NamedTuple):
    """What the oracle makes of a step."""

    params: dict
    batch: np.ndarray
    loss: float
    cross_entropy: float
    dropped: int
    gradients: dict
    buffers: dict


def ids_of(name: str) -> int:
    return FEWER_IDS if "ids that the tokenizer lacks" in name else config(**STEPS[name]).model.vocab_size


@functools.cache
def dense(name: str) -> Dense:
    """With padded targets, and a vocabulary that is no multiple of 128 nor of the mesh."""
    c, ids = config(**STEPS[name]), ids_of(name)
    batch = text(c, 1)[0] % ids
    batch[:, -1, 20:] = -1
    batch[:, :, 11] = END_OF_TEXT
    rows, length = batch.shape[1], batch.shape[2] - 1
    groups = oracle.device_groups(rows, length, *devices_apart(c), c.model.capacity_group)
    end_of_text = None if c.data.cross_document_attention else END_OF_TEXT
    known = replace(c, model=replace(c.model, vocab_size=ids))
    buffers = drawn(run(c, ids).abstract_state.buffers, [SEED, 17])
    (bias_le,) = jax.tree.leaves(buffers) or [None]
    with jax.enable_x64(True):
        loss = functools.partial(
            oracle.model_loss, batch_abt=batch, config=known, groups=groups, end_of_text=end_of_text, bias_le=bias_le
        )
        differentiated = jax.jit(jax.value_and_grad(loss, has_aux=True))
        for draw in range(10):  # one draw in some twenty has a smaller gap
            params = parameters(c, draw)
            outputs = jax.device_get(differentiated(jax.tree.map(jnp.asarray, params)))
            (total, (cross_entropy, dropped, gap)), gradients = outputs
            if gap >= GAP:
                return Dense(params, batch, total, cross_entropy, dropped, gradients, buffers)
    raise AssertionError("rounding may choose other experts than the oracle")


def marks(name: str) -> list:
    return [
        mark
        for mark, found in ((pytest.mark.slow, SLOW_STEPS), (pytest.mark.exhaustive, EXHAUSTIVE_STEPS))
        if name in found
    ]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in STEPS])
def test_a_step_equals_the_dense_model(name):
    """Loss and every gradient. The rows of ids that no text has get none, so these have no probability."""
    c, expected, ids = config(**STEPS[name]), dense(name), ids_of(name)
    found, metrics = gradients(c, expected.params, expected.batch, ids=ids, buffers=expected.buffers)
    rounding = ROUNDING[c.model.dtype]
    assert metrics["total_loss"] == pytest.approx(expected.loss, rel=rounding)
    assert metrics["loss"] == pytest.approx(expected.cross_entropy, rel=rounding)
    assert metrics["dropped_l"].sum() == expected.dropped
    assert (expected.dropped > 0) == (c.model.capacity_factor is not None)
    differ = leaves_differ(found, expected.gradients)
    assert max(differ.values()) <= rounding, differ
    head = found["embedding"]["table_vd"] if c.model.tied_embedding else found["head_vd"]
    assert not head[ids:].any() and head[:ids].any(axis=1).all()


@pytest.mark.parametrize(
    ("layout", "mesh", "near"),
    [
        pytest.param(
            "ma", (2, 2), "ma_folded 4x4, full, many rounds, kv heads replicated, clipped", marks=pytest.mark.exhaustive
        ),
        pytest.param("tp_pp", (2, 4, 2), "zero 4x4, kv heads replicated, documents", marks=pytest.mark.slow),
        pytest.param("ma", (2, 8), "zero 4x4, kv heads replicated, documents", marks=pytest.mark.exhaustive),
    ],
)
def test_bfloat16_is_near_the_dense_model(layout, mesh, near):
    """`near` names the step of which it is another layout, mesh and type."""
    c, expected, shape = config(**STEPS[near]), dense(near), MeshConfig(*(1, *mesh)[-3:])
    model, train = replace(c.model, dtype="bfloat16"), replace(c.train, accumulation=shape.stage)
    batch = expected.batch.reshape(shape.stage, -1, expected.batch.shape[-1])
    rough_c = replace(c, layout=layout, mesh=shape, model=model, train=train)
    found, rough = gradients(rough_c, expected.params, batch)
    assert rough["loss"] == pytest.approx(expected.cross_entropy, rel=0.02)
    # Choices of experts flip where scores are close, so single entries differ; the whole points the same way.
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, expected.gradients))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.95
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


@pytest.mark.exhaustive  # the fast suite has it in test_layouts.py, and the masks themselves in model/test_moe.py
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


DISPATCHES = {
    "dropless": {"model": FLOAT64},
    "drops": {
        "model": FLOAT64 | {"capacity_factor": 1.0, "capacity_group": 4},
        "data": {"sequence_length": 64},
    },
}


@pytest.mark.exhaustive  # the fast suite has `ma` in test_layouts.py, the slow one in huggingface/test_training.py
@pytest.mark.parametrize("mesh", MESHES[1:], ids=named)
@pytest.mark.parametrize("dispatch", DISPATCHES)
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
