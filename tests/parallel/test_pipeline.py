"""The schedule, and what goes through it: the same as one stage after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small import config

from maxsep.parallel import collectives
from maxsep.parallel.mesh import make_mesh
from maxsep.parallel.pipeline import at_tick, bubble, pipelined

SIZES = [(1, 1), (2, 2), (2, 5), (4, 4), (4, 2)]  # stages, micro-batches


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_every_stage_takes_every_micro_batch_a_tick_after_the_stage_before(stages, micro_batches):
    ticks = range(micro_batches + stages - 1)
    when = {}
    for t in ticks:
        for stage in range(stages):
            number, busy = at_tick(t, stage, micro_batches)
            assert 0 <= number < micro_batches
            if busy:
                assert (stage, int(number)) not in when
                when[stage, int(number)] = t
    assert when == {(stage, number): stage + number for stage in range(stages) for number in range(micro_batches)}
    assert bubble(stages, micro_batches) == pytest.approx(1 - len(when) / len(ticks) / stages)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_outputs_figures_and_gradients_are_those_of_one_stage_after_the_other(stages, micro_batches):
    """What a stage computes is not finite for the zeros that come to idle ones: none of it may be seen."""
    rng = np.random.default_rng(0)
    weights_p = rng.uniform(0.5, 1.5, size=stages)
    inputs_ab = rng.uniform(1, 3, size=(micro_batches, 3))

    def layer(x_b, weight, number):
        return weight * jnp.log(x_b) + number + 1

    def loss(out_ab):
        return jnp.sum(jnp.sin(out_ab))

    def one_after_the_other(weights_p, inputs_ab):
        outs = list(inputs_ab)
        for weight in weights_p:
            outs = [layer(x_b, weight, number) for number, x_b in enumerate(outs)]
        return loss(jnp.stack(outs)), jnp.stack(outs)

    def on_stages(weight_p, inputs_ab):
        """The loss is counted on the last stage alone: all stages have the outputs."""

        def work(x_b, number):
            return layer(x_b, weight_p[0], number), {"calls": collectives.vary(jnp.ones(1, jnp.int32))}

        out_ab, figures = pipelined(lambda number: inputs_ab[number], work, micro_batches, ("stage",))
        last = collectives.index(("stage",)) == stages - 1
        return jax.lax.psum(jnp.where(last, loss(out_ab), 0), "stage"), (out_ab, figures["calls"])

    def differentiated(weights_p, inputs_ab):
        arguments = collectives.vary((weights_p, inputs_ab))
        gradients, (out_ab, calls_p) = jax.grad(on_stages, (0, 1), has_aux=True)(*arguments)
        dweights_p, dinputs_ab = gradients
        unsplit = ("attention", "expert")  # of size 1
        return jax.lax.psum((dweights_p, calls_p, out_ab[None]), unsplit), jax.lax.psum(dinputs_ab, collectives.AXES)

    c = config((stages, 1, 1), "pp", model={"layers": stages}, train={"batch_size": 64, "accumulation": 4})
    with jax.enable_x64(True), jax.set_mesh(make_mesh(c)):
        expected = jax.grad(one_after_the_other, (0, 1), has_aux=True)(jnp.asarray(weights_p), jnp.asarray(inputs_ab))
        (dweights, dinputs), outs = jax.device_get(expected)
        split = P("stage")
        function = jax.shard_map(differentiated, in_specs=(split, P()), out_specs=((split, split, split), P()))
        placed = jax.device_put(weights_p, jax.NamedSharding(jax.sharding.get_mesh(), split))
        (dweights_p, calls_p, outs_pab), dinputs_ab = jax.device_get(jax.jit(function)(placed, inputs_ab))
    np.testing.assert_array_equal(calls_p, micro_batches)
    for found, right in ((dweights_p, dweights), (dinputs_ab, dinputs), *((out_ab, outs) for out_ab in outs_pab)):
        np.testing.assert_allclose(found, right, rtol=1e-12)
