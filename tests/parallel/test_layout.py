"""A layout on a mesh: shardings by name, and tokens that are joined and parted again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small import config

from maxsep.config.layouts import AXES
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout
from maxsep.parallel.mesh import make_mesh


def test_layout_splits_what_it_names():
    layout = Layout.of(config((4, 2)))
    assert layout.spec("bsd") == P(("expert",), ("attention",), None)
    assert layout.spec("ldhq") == P(None, None, ("attention",), None)
    assert layout.spec("ld-") == P(None, None, None)
    assert (layout.ways("e"), layout.ways("h"), layout.ways("d")) == (2, 4, 1)


def test_a_row_of_ones_own():
    layout = Layout.of(config((4, 2), "b=expert+attention h=stage"))
    assert layout.spec("bsh") == P(("expert", "attention"), None, ("stage",))
    assert (layout.ways("b"), layout.ways("e")) == (8, 1)


def test_key_value_heads_are_split_where_they_divide():
    assert Layout.of(config((4, 2), model={"kv_heads": 8})).ways("k") == 4
    assert Layout.of(config((8, 2), model={"kv_heads": 4})).ways("k") == 1
    assert Layout.of(config((8, 2), "zero", model={"kv_heads": 4})).ways("k") == 1


def test_weights_at_rest():
    layout = Layout.of(config((4, 4), "zero"))
    everything = ("stage", "attention", "expert")
    assert layout.at_rest("ldhq", (2, 16, 16, 4)) == (P(None, everything[1:], None, None), (everything[1:], -3))
    assert layout.at_rest("ledf", (2, 16, 16, 32)) == (P(None, "expert", "attention", None), (("attention",), -2))
    assert layout.at_rest("ldhq", (16, 6, 6, 4)) == (P(None, None, None, "attention"), (("attention",), -1))
    assert layout.at_rest("ldhq", (16, 7, 7, 7)) == (P(None, None, None, None), None)
    assert Layout.of(config((4, 4))).at_rest("ldhq", (2, 16, 16, 4)) == (P(None, None, "attention", None), None)


COPIES = "b=expert s=attention h=attention+stage"  # devices along `stage` hold the same tokens


@pytest.mark.parametrize("axes", [(), ("attention",), ("expert",), ("stage", "attention"), ("expert", "attention")])
def test_what_is_joined_and_parted_is_multiplied_by_the_devices_that_joined(axes):
    c = config((2, 2, 4), COPIES)
    layout, devices = Layout.of(c), make_mesh(c)
    b, s = 8, 6
    numbers = jnp.arange(b * s * 3.0).reshape(b, s, 3)
    ids = jnp.arange(b * s).reshape(b, s)

    def on_device(x_bsd, ids_bs):
        x_bsd, ids_bs = collectives.vary((layout.join(x_bsd, axes), layout.join_ids(ids_bs, axes)))
        agree = jnp.all(x_bsd[..., 0] == ids_bs * 3)
        return jax.lax.pmean(layout.part(x_bsd, axes), "stage"), jax.lax.pmin(agree.astype(int), AXES)

    with jax.set_mesh(devices):
        spec, of_ids = layout.spec("bs-"), layout.spec("b-")
        call = jax.jit(jax.shard_map(on_device, in_specs=(spec, of_ids), out_specs=(spec, P())))
        placed = (jax.device_put(x, jax.NamedSharding(devices, at)) for x, at in ((numbers, spec), (ids, of_ids)))
        y_bsd, agree = call(*placed)
    assert agree
    size = {"stage": 2, "attention": 2, "expert": 4}
    assert np.array_equal(y_bsd, numbers * np.prod([size[axis] for axis in axes], dtype=int))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_copies_count_once_in_a_total(dtype):
    c = config((2, 2, 4), COPIES)
    layout, devices = Layout.of(c), make_mesh(c)
    numbers = jnp.arange(8).astype(dtype)

    def on_device(x_t):
        large = jnp.full((), 2**30, dtype)  # all copies of it are more than int32 holds
        copied = jax.lax.psum(jnp.sum(x_t), "attention")
        return (
            layout.total(jnp.sum(x_t), layout.token_axes),
            layout.total(copied, ("expert",)),
            layout.total(large, ()),
        )

    with jax.set_mesh(devices):
        whole, of_expert, large = jax.jit(jax.shard_map(on_device, in_specs=P(("expert", "attention")), out_specs=P()))(
            jax.device_put(numbers, jax.NamedSharding(devices, P(("expert", "attention"))))
        )
    assert whole == 28 and whole.dtype == dtype
    assert of_expert == 28
    assert large == 2**30


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_gathered_weights_are_summed_in_the_weights_own_type(dtype):
    c = config((1, 16), "b=expert")
    devices = make_mesh(c)
    w = np.linspace(1, 2, 32, dtype=np.float32)

    def on_device(w, scale):
        def loss(w):
            whole = collectives.gather_weight(w, w.astype(dtype), ("expert",), 0)
            return jnp.sum(whole.astype(jnp.float32) * scale), whole

        return jax.grad(loss, has_aux=True)(collectives.vary(w))

    with jax.set_mesh(devices):
        shard = functools.partial(jax.device_put, device=jax.NamedSharding(devices, P(AXES)))
        call = jax.jit(jax.shard_map(on_device, in_specs=P(AXES), out_specs=P(AXES)))
        scales = np.array([1.0] + [2.0**-9] * 15, np.float32)  # in bfloat16 1 + 2**-9 is 1
        gradient, whole = jax.device_get(call(shard(w), shard(scales)))
    assert gradient.dtype == np.float32
    assert np.array_equal(gradient, np.full(32, 1 + 15 * 2.0**-9, np.float32))
    assert whole.dtype == dtype and np.array_equal(whole[:32], w.astype(dtype))
