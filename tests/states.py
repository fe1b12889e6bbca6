"""Training states of odd shapes and types, to be saved and read again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict
    buffers: dict
    optimizer: tuple


def mesh_of(attention, expert):
    return jax.make_mesh((1, attention, expert), ("stage", "attention", "expert"), axis_types=(AxisType.Explicit,) * 3)


def abstract(mesh, rows=64, dtype=jnp.float32):
    """A state's shapes, split and replicated in several ways, with every kind of number."""
    replicated = NamedSharding(mesh, P())

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = {
        "embedding": array((rows, 32), dtype, None, "attention"),
        "layers": {"w_edf": array((2, 16, 8, 32), dtype, None, "expert"), "scale": array((2, 32), dtype)},
        "blocks": [array((16, 16), jnp.bfloat16, ("attention", "expert")), array((16,), jnp.uint32, "expert")],
    }
    optimizer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), jax.eval_shape(OPTIMIZER.init, params)
    )
    step, buffers = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), {"bias_e": array((16,), jnp.float32)}
    return State(step, params, buffers, optimizer)


def model(state) -> dict:
    """The fields of which a model is made."""
    return {"params": state.params, "buffers": state.buffers}


def filled(shapes, seed):
    """Arrays of random bits that are finite: denormals and signed zeros among them."""
    rng = np.random.default_rng(seed)

    def fill(x):
        unsigned = np.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = np.frombuffer(rng.bytes(x.size * x.dtype.itemsize), unsigned)
        if jnp.issubdtype(x.dtype, jnp.floating):  # without the exponent of NaN and infinity, which is all ones
            bits = bits & ~unsigned.type(1 << jnp.finfo(x.dtype).nmant)
        return jax.device_put(bits.view(x.dtype).reshape(x.shape), x.sharding)

    return jax.tree.map(fill, shapes)


def bits(state):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]
