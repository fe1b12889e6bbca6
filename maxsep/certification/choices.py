"""Which experts tokens choose in two types of numbers: how many choose others, and how close their scores were."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from maxsep.certification.precision import Reference, exactly
from maxsep.certification.rig import END_OF_TEXT, alone, on_devices, on_host
from maxsep.config import Config
from maxsep.model.router import Router
from maxsep.parallel import collectives
from maxsep.parallel.mesh import mesh_of
from maxsep.parallel.sharding import on_mesh
from maxsep.training.step import Program


def note(own: Config, reference: Reference) -> str:
    """How many tokens choose other experts in the type of `own` than in float64, on one device, in words."""
    variables, batch_bt = reference.start.variables, reference.batch[0]
    narrow = chosen(own, variables, batch_bt, jax.local_devices()[0])
    with jax.enable_x64(True):
        wide = chosen(exactly(own), variables, batch_bt, jax.local_devices(backend="cpu")[0])
    counts, gap = flipped(wide, narrow, (batch_bt[:, :-1] >= 0).ravel())
    tokens, what = int((batch_bt[:, :-1] >= 0).sum()), own.model.products
    close = f"; in the first, of scores that were at most {gap:.1e} apart" if counts[0] else ""
    layers = ", ".join(map(str, counts))
    return f"choices: of {tokens} tokens chose other experts in {what} than in float64, by layer: {layers}{close}"


class Chosen(NamedTuple):
    """Of one layer's tokens, padding among them."""

    ids_tn: np.ndarray
    probability_te: np.ndarray  # scores that sum to 1


def chosen(config: Config, variables: Any, batch_bt: np.ndarray, device: jax.Device) -> list[Chosen]:
    """The choices of each layer that has experts, in a forward pass of records [b, S + 1] on one device.

    `variables`: the model's, on the host.
    """
    model = replace(config.model, scan_layers=False, remat="none")  # a router's results leave no loop
    found: list[tuple[jax.Array, jax.Array]] = []
    topk = Router.topk

    def seen(router: Router, x_td: jax.Array):
        routing = topk(router, x_td)
        found.append((routing.ids_tn, routing.statistics.probability_te))
        return routing

    with jax.set_mesh(mesh_of(np.array([device]).reshape(1, 1, 1))), mock.patch.object(Router, "topk", seen):
        program = Program(replace(alone(config), model=model), END_OF_TEXT, platform=device.platform)
        like = on_mesh(jax.eval_shape(program.init)).variables

        def on_device(variables, batch_abt):
            own = nnx.merge(program.graph, *collectives.vary((variables["params"], variables["buffers"])))
            own.losses(batch_abt, 0, None, END_OF_TEXT)
            return list(found)

        whole = jax.shard_map(on_device, in_specs=(program.specs, P()), out_specs=P(("stage", "attention", "expert")))
        return [Chosen(*layer) for layer in on_host(jax.jit(whole)(on_devices(variables, like), batch_bt[None]))]


def flipped(exact: Sequence[Chosen], own: Sequence[Chosen], real_t: np.ndarray) -> tuple[list[int], float]:
    """In each layer the tokens that chose other experts, and in the first layer the widest gap between their scores.

    The gap is in float64's scores: the least of those that it chose, less the least of those that the type chose. Later
    layers get other numbers wherever the first has flipped.
    """
    counts, gap = [], 0.0
    for layer, (wide, narrow) in enumerate(zip(exact, own, strict=True)):
        other_t = (np.sort(wide.ids_tn, axis=1) != np.sort(narrow.ids_tn, axis=1)).any(axis=1) & real_t
        counts.append(int(other_t.sum()))
        if layer == 0 and counts[0]:
            least = [np.take_along_axis(wide.probability_te, of.ids_tn, axis=1).min(axis=1) for of in (wide, narrow)]
            gap = float((least[0] - least[1])[other_t].max())
    return counts, gap
