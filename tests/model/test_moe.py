"""The MoE layer on every mesh shape equals the dense oracle: output, statistics and every gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small import MESHES, SEED, config, named

from maxsep.config.matrices import sizes
from maxsep.model.moe import MoE
from maxsep.model.parameters import Parameters
from maxsep.model.tokens import Tokens
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout
from maxsep.parallel.mesh import make_mesh
from maxsep.parallel.sharding import replicating_axes

B, S = 16, 32
KEY = 7
NAMES = {
    "router": ("router", "w_de"),
    "in": ("experts", "w_in_edf"),
    "gate": ("experts", "w_gate_edf"),
    "out": ("experts", "w_out_efd"),
}
DISPATCH = {
    "dropless": {"capacity_factor": None},
    "capacity": {"capacity_factor": 1.0},
    "groups": {"capacity_factor": 1.25, "capacity_group": 2},
}
TOLERANCE = {"float64": 1e-11, "float32": 1e-5}
GAP = 1e-5  # no two scores differ by less, unless they are equal: rounding must not choose another expert


def numbers(model, case: str):
    """Tokens [B, S, D], weights and direction in float64; the case says where the tokens go."""
    rng = np.random.default_rng([SEED, 3])
    E, D, F = model.experts, model.d_model, model.d_ff
    x = rng.normal(size=(B, S, D))
    w = {
        "router": rng.normal(size=(D, E)),
        "in": rng.normal(size=(E, D, F)) / 4,
        "out": rng.normal(size=(E, F, D)) / 4,
    }
    if model.activation == "swiglu":
        w["gate"] = rng.normal(size=(E, D, F)) / 4
    x[..., 0] = 1  # makes the router's first row a bias
    if case == "one expert":
        w["router"][0, 5] = 40
    elif case == "empty experts":
        w["router"][0, ::2] = -40
        w["router"][0, 9] = 4
    elif case == "ties":  # whole numbers, so that equal scores are equal to the bit on every device
        x[..., 1:] = rng.integers(-1, 2, size=(B, S, D - 1))
        x[:2] = 0
        w["router"] = rng.integers(-1, 2, size=(D, E)).astype(float)
    else:
        assert case == "uneven"
        w["router"][0] = np.linspace(-3, 3, E)
    for _ in range(10):  # one token in some ten thousand lies too close
        near = close_calls(x @ w["router"], model.top_k)
        x[near, 1:] = rng.normal(size=(near.sum(), D - 1))
    return x, w, rng.normal(size=(B, S, D))


def close_calls(scores_bse, top_k: int):
    """The tokens whose last chosen and next score differ by less than GAP but are not equal."""
    if top_k == scores_bse.shape[-1]:
        return np.zeros(scores_bse.shape[:-1], bool)
    ranked = np.sort(scores_bse, axis=-1)[..., ::-1]
    gap_bs = ranked[..., top_k - 1] - ranked[..., top_k]
    return (gap_bs > 0) & (gap_bs < GAP)


def tokens_of(number_bs) -> Tokens:
    """Of a batch without padding."""
    return Tokens(None, number_bs, number_bs >= 0, jnp.full(number_bs.shape[:1], S), jnp.asarray(B * S), jnp.asarray(B))


@functools.lru_cache(maxsize=4)  # hundreds of programs at once are more mappings of memory than Linux allows
def layer(mesh: tuple[int, int], fields: tuple):
    """The MoE layer's output, statistics and gradients as one compiled function, and the shardings of its arguments."""
    c = config(mesh, model={"layers": 1, **dict(fields)}, data={"sequence_length": S})
    layout, model, devices = Layout.of(c), c.model, make_mesh(c)
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    with jax.set_mesh(devices):
        graph, abstract = nnx.split(MoE(Parameters(layout, sizes(model), dtype), model))
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, nnx.to_pure_dict(abstract))

    def on_device(x_bsd, params, direction_bsd, token_bs):
        def loss(x_bsd, params):
            key = jax.random.key(KEY) if model.expert_dropout else None
            y_bsd, stats = nnx.merge(graph, params).train(x_bsd, tokens_of(token_bs), key, None)
            stats = stats._replace(rounds=lax.psum(collectives.vary(stats.rounds), collectives.AXES))
            auxiliary = (
                model.load_balancing_coefficient * stats.load_balancing + model.router_z_coefficient * stats.router_z
            )
            return lax.psum(jnp.sum(y_bsd * direction_bsd), collectives.AXES) + auxiliary, (y_bsd, stats._asdict())

        (dx, dw), (y, stats) = jax.grad(loss, (0, 1), has_aux=True)(*collectives.vary((x_bsd, params)))
        y, dx = lax.psum((y, dx), "stage")  # of size 1
        dw = jax.tree.map(lambda g, spec: lax.psum(g, replicating_axes(spec)), dw, specs)
        return y, stats, dx, dw

    tokens = layout.spec("bsd")
    arguments = (tokens, specs, tokens, layout.spec("bs"))
    function = jax.jit(jax.shard_map(on_device, in_specs=arguments, out_specs=(tokens, P(), tokens, specs)))
    return c, devices, function, arguments


def check(mesh, case, **fields):
    with jax.enable_x64(fields["dtype"] == "float64"):
        c, devices, function, specs = layer(mesh, tuple(sorted(fields.items())))
        model = c.model
        x, w, direction = numbers(model, case)
        assert not close_calls(x @ w["router"], model.top_k).any()
        params = {"router": {}, "experts": {}}
        for name, value in w.items():
            section, leaf = NAMES[name]
            params[section][leaf] = value.astype(model.dtype)
        tokens = np.arange(B * S, dtype=np.int32).reshape(B, S)
        arguments = x.astype(model.dtype), params, direction.astype(model.dtype), tokens
        with jax.set_mesh(devices):
            placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(devices, spec)), arguments, specs)
            y, stats, dx, dw = jax.device_get(function(*placed))
        mask = None
        if model.expert_dropout:
            mask = dropout_mask(model.expert_dropout, model.top_k, model.d_model, model.dtype)

    groups = ()
    if model.capacity_factor is not None:
        groups = oracle.device_groups(B, S, *mesh, model.capacity_group)
    flat = (x.reshape(B * S, -1), {name: value.copy() for name, value in w.items()})
    expected_y, expected, gradient = oracle.moe(*flat, model, groups, mask, direction.reshape(B * S, -1))

    tolerance = TOLERANCE[model.dtype]
    close(y.reshape(B * S, -1), expected_y, tolerance, "output")
    # The gradient of the scores is a difference of terms of order 1. Where one expert gets all the weight they cancel,
    # and float32's rounding is left of them; x takes it to the router's gradient, the router's weights to that of x.
    least = {}
    if model.dtype == "float32":
        least = {"x": np.abs(w["router"]).max(), "router": np.abs(x).max()}
    close(dx.reshape(B * S, -1), gradient["x"], tolerance, "gradient of x", least.get("x", 0.0))
    for name in w:
        section, leaf = NAMES[name]
        close(dw[section][leaf], gradient[name], tolerance, f"gradient of {name}", least.get(name, 0.0))
    assert stats["load_e"].tolist() == expected["load_e"].tolist()
    assert stats["dropped"] == expected["dropped"]
    assert stats["rounds"] == rounds(model, mesh, x @ w["router"])
    for name in ("load_balancing", "router_z"):
        assert stats[name] == pytest.approx(expected[name], rel=tolerance)
    return expected


def rounds(model, mesh, scores_bse) -> int:
    """The rounds of the exchange, summed over devices: as many as the fullest pair of those that exchange needs."""
    attention, expert = mesh
    if model.capacity_factor is not None or expert == 1:
        return attention * expert
    ids_bsn = np.argsort(-scores_bse, axis=-1, kind="stable")[..., : model.top_k]
    local, tokens = model.experts // expert, B * S // attention // expert
    room = min(tokens * min(model.top_k, local), math.ceil(tokens * model.top_k * model.exchange_factor / expert))
    peers = ids_bsn.reshape(expert, B // expert, attention, S // attention, model.top_k) // local
    sent = [[np.bincount(peers[e, :, a].ravel(), minlength=expert) for e in range(expert)] for a in range(attention)]
    return sum(expert * max(1, math.ceil(np.max(of) / room)) for of in sent)


@functools.cache
def dropout_mask(rate: float, top_k: int, d_model: int, dtype: str):
    """As `MoE` documents: of the key, the token's number, the choice and the feature. JAX draws others with float64."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(KEY)))(np.arange(B * S))
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (top_k, d_model)))(keys)
    return np.asarray(keep) / (1 - rate)


def close(got, expected, tolerance, what, least=0.0):
    """Every difference is below `tolerance` of the largest entry, or of `least`."""
    largest = np.abs(expected).max()
    assert largest > 0, what
    assert np.abs(got - expected).max() <= tolerance * max(largest, least), what


FAST = {(1, 1): "dropless", (2, 2): "groups", (4, 4): "dropless", (1, 16): "capacity"}
CASES = ["uneven", "one expert", "empty experts", "ties"]


def turns():
    """Every mesh with every dispatch, four times. The slow suite has them once; the fast one has four of them."""
    for number, mesh in enumerate(MESHES):
        for of_dispatch, dispatch in enumerate(DISPATCH):
            for shift in range(4):
                fast = FAST.get(mesh) == dispatch and not shift
                turn = number + 2 * of_dispatch + shift
                marks = [] if fast else pytest.mark.exhaustive if shift else pytest.mark.slow
                yield pytest.param(mesh, dispatch, turn, id=f"{named(mesh)}-{dispatch}-{turn}", marks=marks)


@pytest.mark.parametrize(("mesh", "dispatch", "turn"), list(turns()))
def test_equals_the_oracle(mesh, dispatch, turn):
    """On every routing; top-k, activation, type, dropout and room take turns."""
    fields = DISPATCH[dispatch] | {
        "top_k": 1 + turn % 3,
        "activation": ("swiglu", "gelu")[turn % 2],
        "dtype": "float32" if turn % 4 == 3 else "float64",
        "expert_dropout": 0.25 if turn % 5 == 0 else 0.0,
        "exchange_factor": 0.2 if turn % 4 >= 2 else 1.5,
        "load_balancing_coefficient": 0.5,
        "router_z_coefficient": 0.1,
    }
    seen = {case: check(mesh, case, **fields) for case in CASES}
    assert seen["one expert"]["load_e"][5] == B * S
    assert (seen["empty experts"]["load_e"] == 0).sum() >= 8
    for stats in seen.values():
        assert (stats["dropped"] > 0) == (dispatch != "dropless")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("mesh", MESHES, ids=named)
def test_equals_the_oracle_in_every_combination(mesh, dispatch, activation, top_k, dtype, dropout):
    fields = {"activation": activation, "top_k": top_k, "dtype": dtype, "expert_dropout": dropout}
    for case in CASES:
        check(mesh, case, **DISPATCH[dispatch], **fields)


@pytest.mark.slow  # the fast suite compares what meshes drop in test_layouts.py
def test_larger_groups():
    """Groups of 8 on the meshes that keep them whole drop the same choices."""
    dropped = {
        check(mesh, "uneven", capacity_factor=0.75, capacity_group=8, dtype="float64")["dropped"]
        for mesh in [(2, 2), (4, 4)]
    }
    assert len(dropped) == 1


def test_as_many_experts_as_choices():
    check((2, 2), "uneven", experts=2, top_k=2, capacity_factor=0.7, dtype="float64")


@pytest.mark.slow
def test_as_many_experts_as_choices_without_drops_is_dense():
    check((1, 2), "uneven", experts=4, top_k=4, dtype="float64")


def test_ties_go_to_the_lowest_ids():
    """What the case "ties" has, among others: tokens of zeros, which score every expert the same."""
    model = config(model={"layers": 1}).model
    x, w, _ = numbers(model, "ties")
    _, stats, _ = oracle.moe(x[:2].reshape(-1, model.d_model), w, model)
    assert stats["load_e"].tolist() == [2 * S, 2 * S] + [0] * 14
