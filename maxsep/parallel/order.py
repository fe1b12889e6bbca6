"""The order of the devices on the mesh: which axis lies inside a node, so that less is sent from node to node."""

import math
from typing import NamedTuple

from maxsep.config import Config
from maxsep.config.segments import moe_layers
from maxsep.parallel.collectives import Axes
from maxsep.parallel.layout import Layout
from maxsep.parallel.weights import kinds


class Sent(NamedTuple):
    """Bytes of a step among the devices along `axes`: of a `ring` all that its devices come to hold, or add up."""

    axes: Axes
    kind: str  # ring, or exchange: all-to-all, each device sends every other its part
    bytes: float


def inner(config: Config, near: int) -> str:
    """`mesh.inner`, or the axis with which a device sends less to other nodes; where that is equal, which sends more.

    Args:
        config: with its mesh.
        near: devices of a node.
    """
    if config.mesh.inner != "auto":
        return config.mesh.inner
    sent = _sent(config)
    axes = [axis for axis in ("expert", "attention") if config.mesh.sizes[axis] > 1]
    along = {axis: sum(one.bytes for one in sent if axis in one.axes) for axis in axes or ["expert"]}
    return min(along, key=lambda axis: (between(config, axis, near, sent), -along[axis]))


def between(config: Config, inner: str, near: int, sent: list[Sent] | None = None) -> float:
    """Bytes of a step that a device sends to other nodes, of `near` devices, with the axis `inner` innermost."""
    sizes, outer = config.mesh.sizes, {"expert": "attention", "attention": "expert"}[inner]
    inside = {inner: min(sizes[inner], near), outer: min(sizes[outer], max(1, near // sizes[inner]))}
    total = 0.0
    for axes, kind, size in _sent(config) if sent is None else sent:
        devices, here = (math.prod(of.get(axis, 1) for axis in axes) for of in (sizes, inside))
        if kind == "exchange":
            total += size * (devices - here) / devices
        elif here < devices:  # the ring leaves each node once: its devices there share the way
            total += size * (devices - 1) / devices / here
    return total


def _sent(config: Config) -> list[Sent]:
    """What layers send in a step, and along which axes; statistics and what stages hand over do not depend on it."""
    model, train, layout = config.model, config.train, Layout.of(config, "cpu")
    cast = {"bfloat16": 2, "float32": 4, "float64": 8}[model.dtype]
    wide = max(4, cast)  # of a weight, and of its gradient
    tokens = train.batch_size * config.data.sequence_length / layout.ways("b") / layout.ways("s")
    passes = 2 + (model.remat == "full")
    own, moe = model.layers / layout.ways("l"), moe_layers(model) / layout.ways("l")
    dense = model.dense_layers + (moe if model.shared_experts else 0)  # no stages with dense layers

    def joined(letter: str, times: float) -> Sent:
        """Tokens gathered where `letter` is split, and what was made of them added up."""
        axes = tuple(axis for axis in layout.axes(letter) if axis in layout.token_axes)
        return Sent(axes, "ring", times * 2 * layout.ways(letter) * tokens * model.d_model * cast)

    experts = layout.ways("e")
    copies = min(model.top_k * model.exchange_factor, experts * min(model.top_k, model.experts / experts))
    if model.capacity_factor is not None:
        copies = model.top_k * model.capacity_factor
    sent = [
        joined("h", own * passes),
        joined("f", moe * passes),
        joined("m", dense * passes),
        joined("v", 2),
        # Rows go there and back, and their gradients; rematerialisation repeats the way there.
        Sent(layout.axes("e"), "exchange", moe * (passes + 2) * copies * tokens * model.d_model * cast),
    ]
    # Of each weight a micro-batch gathers its bytes: layers forward and backward, the vocabulary's once.
    for kind in kinds(config, layout):
        gathered = 2 * cast if "l" in kind.letters else wide
        # Their gradients are scattered in each micro-batch where weights are gathered, and else added up once a step.
        sent.append(Sent(kind.stored, "ring", train.accumulation * kind.count * (gathered + wide)))
        sent.append(Sent(kind.copied, "ring", 2 * wide * kind.count))
    return sent
