"""Layout never changes the result: loss and gradients of a step, and 20 losses, on every mesh shape.

In float32 rounding can tip a choice between two experts whose scores are almost equal; whether it does depends on the
machine. So float32 is compared for one step only, on numbers that leave a gap at every choice. Longer runs and whatever
else is compared between meshes are in float64, where a sum in another order moves nothing that matters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from small import MESHES, SEED, config, named, text

from maxsep.config import Config, ConfigError
from maxsep.parallel.mesh import make_mesh
from maxsep.training.run import Run

END_OF_TEXT = 3
ROUNDING = {"float32": 1e-5, "float64": 1e-12}  # of a leaf's largest entry; of a loss
GAP = 1e-5  # between the scores of the last chosen and the next expert; float32's rounding moves a score by 2e-6


def wide(c: Config):
    """The context in which a config's program is made and run."""
    return jax.enable_x64(c.model.dtype == "float64")


@functools.cache
def run(c: Config) -> Run:
    with wide(c), jax.set_mesh(make_mesh(c)):
        made = Run(c, END_OF_TEXT)
    made.gradients = jax.jit(made.program._gradients)
    made.train_step = functools.cache(made.compile_train_step)
    return made


def placed(tree, like):
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x, like.dtype), like.sharding), tree, like)


def gradients(c: Config, params, batch, step: int = 0):
    """Gradients and metrics of a step at `params`, as the train step computes them."""
    r = run(c)
    with wide(c), jax.set_mesh(r.mesh):
        batch = jax.device_put(batch, r.batch_sharding)
        return jax.device_get(r.gradients(placed(params, r.abstract_state.params), batch, np.int32(step)))


def parameters(c: Config, draw: int = 0):
    """Parameters of a config in float64, larger than a new model's: no gradient is lost in rounding."""
    rng = np.random.default_rng([SEED, 5, draw])

    def drawn(path, x):
        noise = rng.normal(size=x.shape)
        return 1 + noise / 4 if path[-1].key == "scale" else noise / 4

    return jax.tree_util.tree_map_with_path(drawn, run(c).abstract_state.params)


def leaves_differ(got, expected) -> dict[str, float]:
    """Largest difference of each leaf as a share of its largest entry."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    pairs = zip(paths, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return {path: float(np.abs(a - b).max() / np.abs(b).max()) for path, a, b in pairs}


# Each config is compared with the dense oracle on its mesh; together they have each value of each switch.
STEPS = {
    "1x1": {"mesh": (1, 1)},
    "4x4": {"mesh": (4, 4)},
    "2x8 unrolled, dots, k 3, gelu": {
        "mesh": (2, 8),
        "model": {"scan_layers": False, "remat": "dots", "top_k": 3, "activation": "gelu"},
    },
    "8x2 kv heads replicated, full, tied, zero1": {
        "mesh": (8, 2),
        "model": {"kv_heads": 2, "remat": "full", "tied_embedding": True},
        "optimizer": {"zero1": True},
    },
    "16x1 kv heads replicated, documents": {
        "mesh": (16, 1),
        "model": {"kv_heads": 4, "vocab_size": 2000},
        "data": {"cross_document_attention": False},
    },
    "1x16 capacity, accumulation": {
        "mesh": (1, 16),
        "model": {"layers": 1, "capacity_factor": 1.25, "capacity_group": 16},
        "train": {"batch_size": 32, "accumulation": 2},
    },
    "2x2 capacity, kv heads split, unrolled, full, k 1": {
        "mesh": (2, 2),
        "model": {
            "capacity_factor": 1.0,
            "kv_heads": 4,
            "scan_layers": False,
            "remat": "full",
            "top_k": 1,
            "vocab_size": 256,
        },
        "data": {"cross_document_attention": False},
        "optimizer": {"zero1": True},
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_the_dense_model(name):
    """Loss and every gradient, with padded targets and a vocabulary that is no multiple of 128 nor of the mesh."""
    c = config(**STEPS[name])
    batch = text(c, 1)[0]
    batch[:, -1, 20:] = -1
    batch[:, :, 11] = END_OF_TEXT
    rows, length = batch.shape[1], batch.shape[2] - 1
    groups = oracle.device_groups(rows, length, c.mesh.attention, c.mesh.expert, c.model.capacity_group)
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
    "mesh", [(4, 4), *(pytest.param(m, marks=pytest.mark.slow) for m in [(1, 1), (2, 8)])], ids=named
)
def test_bfloat16_is_near_float32(mesh):
    params, batch = parameters(config()), text(config(), 1)[0]
    exact, metrics = gradients(config((1, 1)), params, batch)
    found, rough = gradients(config(mesh, model={"dtype": "bfloat16"}), params, batch)
    assert rough["loss"] == pytest.approx(metrics["loss"], rel=0.02)
    # Choices of experts flip where scores are close, so single entries differ; the whole points the same way.
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, exact))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.95
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


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


FLOAT64 = {"dtype": "float64"}
DISPATCHES = {
    "dropless": {"model": FLOAT64},
    "drops": {
        "model": FLOAT64 | {"capacity_factor": 1.0, "capacity_group": 4},
        "data": {"sequence_length": 64},
    },
}


@functools.cache
def initial(c: Config):
    r = run(c)
    with wide(c), jax.set_mesh(r.mesh):
        return jax.device_get(r.new_state())


@functools.cache
def trained(c: Config, weights: Config | None = None) -> tuple[list[float], float, list[int]]:
    """Losses of `train.steps` steps on the same text, the largest change of a router weight, choices dropped a step.

    `weights` is the config whose new state it starts from: c, or one of another mesh or seed. That a mesh does not
    change it is a test of its own, in training/test_step.py.
    """
    r = run(c)
    new = initial(weights or c)
    with wide(c), jax.set_mesh(r.mesh):
        state, step = placed(new, r.abstract_state), r.train_step()
        losses, dropped = [], []
        for batch in text(c, c.train.steps):
            state, metrics = step(state, jax.device_put(batch, r.batch_sharding))
            losses.append(float(metrics["loss"]))
            dropped.append(int(metrics["dropped_l"].sum()))
        before, after = (s.params["blocks"]["moe"]["router"]["w_lde"] for s in (new, jax.device_get(state)))
    return losses, float(np.abs(after - before).max()), dropped


@pytest.mark.parametrize(
    ("dispatch", "mesh"),
    [
        pytest.param(dispatch, mesh, id=f"{dispatch}-{named(mesh)}", marks=[] if mesh == quick else pytest.mark.slow)
        for dispatch, quick in (("dropless", (4, 4)), ("drops", (2, 8)))
        for mesh in MESHES[1:]
    ],
)
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
    alone = config(**DISPATCHES["dropless"])
    losses, _, _ = trained(alone)
    others, _, _ = trained(alone, config(**DISPATCHES["dropless"], train={"seed": SEED + 1}))
    assert np.abs(np.subtract(losses, others)).min() > 1e-4 * losses[0]


def test_what_only_changes_the_cost():
    """ZeRO-1, unrolled layers and rematerialisation."""
    alone = config(**DISPATCHES["dropless"])
    expected, _, _ = trained(alone)
    cost = {"optimizer": {"zero1": True}, "model": FLOAT64 | {"scan_layers": False, "remat": "full"}}
    losses, _, _ = trained(config((4, 4), **cost), alone)
    assert losses == pytest.approx(expected, rel=ROUNDING["float64"])
