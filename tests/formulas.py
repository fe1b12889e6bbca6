"""The formulas of docs/layouts.md, in its symbols."""

import math

import jax

from maxsep.config.layouts import AXES, row
from maxsep.measure.memory import bytes_on_device
from maxsep.parallel.sharding import replicating_axes


def sent_bytes(c, state) -> dict[str, float]:
    """Operand bytes a device and step by role, of a config and its abstract state; without what is small beside them:
    ids, weights of choices, the softmax's sums.
    """
    model, train, axes = c.model, c.train, row(c.layout)
    size = dict(zip(AXES, c.mesh.shape, strict=True))

    def ways(letter):
        return math.prod(size[axis] for axis in axes.get(letter, ()))

    A, B, D = train.accumulation, train.batch_size // train.accumulation, model.d_model
    L, M = model.layers, model.dense_layers  # all of them, and those with a dense MLP
    c_bytes = {"bfloat16": 2, "float32": 4, "float64": 8}[model.dtype]
    w_bytes = max(4, c_bytes)  # of a weight and its gradient
    t = B * c.data.sequence_length // ways("b") // ways("s")
    again = model.remat == "full"

    def joined(letter) -> int:
        """Devices whose tokens are joined for a layer that `letter` splits."""
        tokens = axes["b"] + axes.get("s", ())
        return math.prod(size[axis] for axis in axes.get(letter, ()) if axis in tokens)

    def gather(letter) -> int:
        return t * D * c_bytes if joined(letter) > 1 else 0

    def scatter(letter) -> int:
        return joined(letter) * gather(letter)

    attention = (2 + again) * (gather("h") + scatter("h"))
    if model.capacity_factor is None:
        room = math.ceil(model.exchange_factor * t * model.top_k / ways("e"))
        places = ways("e") * min(room, t * min(model.top_k, model.experts // ways("e")))
    else:
        group = model.capacity_group or t
        places = t // group * model.experts * math.ceil(group * model.top_k * model.capacity_factor / model.experts)
    exchanges = (4 + again) * places * D * c_bytes if ways("e") > 1 else 0
    dispatch = exchanges + (2 + again) * gather("f") + 2 * scatter("f")
    dense = (2 + again) * gather("m") + 2 * scatter("m")
    vocabulary = 2 * (gather("v") + scatter("v"))
    P = ways("l")
    if P > 1 and "stage" in axes["v"]:
        vocabulary += 2 * t * D * c_bytes  # sums over stages of what is looked up, and of their parts of a gradient
    if P > 1:
        vocabulary += 2 * t * D * c_bytes  # final states to all stages, and back

    segments, leaves = state.params["segments"].values(), jax.tree.leaves(state.params)
    copied = [w for w in leaves if math.prod(size[axis] for axis in replicating_axes(w.sharding.spec)) > 1]
    gradients, parameters = bytes_on_device(copied), 0
    if c.optimizer.zero1:  # each device gathers the parts that it shares
        moments = jax.tree.leaves(state.optimizer[1].mu)
        parameters = bytes_on_device(
            [part for part, w in zip(moments, leaves, strict=True) if bytes_on_device(part) < bytes_on_device(w)]
        )
    if ways("w") > 1:
        experts = bytes_on_device([segment["feed_forward"].get("experts", {}) for segment in segments])
        parts = [segment["feed_forward"] for segment in segments]
        mlps = bytes_on_device([part if "w_in_dm" in part else part.get("shared", {}) for part in parts])
        routers = bytes_on_device([segment["feed_forward"].get("router", {}) for segment in segments])
        others = bytes_on_device([segment["attention"] for segment in segments]) + routers
        tables = bytes_on_device((state.params["head_vd"], state.params["embedding"]))
        everything = math.prod(size.values())
        gradients += A * everything * (experts // ways("e") + mlps // ways("m") + others + tables // ways("v"))
        parameters += A * (2 * (experts + mlps + others) * c_bytes // w_bytes + tables)
    return {
        "attention": A * L // P * attention,
        "dispatch": A * (L - M) // P * dispatch,
        "dense MLPs": A * (M + (L - M if model.shared_experts else 0)) // P * dense,
        "stages": 2 * (A + P - 1) * t * D * c_bytes if P > 1 else 0,
        "embedding, head": A * vocabulary,
        "gradients": gradients,
        "parameters": parameters,
    }
