"""What a device sends in a traced program, by role: counted before anything is compiled, on a mesh of any size.

Bytes are those of the operands: what a collective takes in on one device. How much of it crosses a link depends on the
collective and on how it is made of the links there are.
"""

import math
import re
from collections import Counter

import jax
from jax.sharding import AbstractMesh

from maxsep.measure.memory import bytes_on_device
from maxsep.parallel.rounds import further

COLLECTIVES = re.compile("all_gather|reduce_scatter|all_to_all|psum|pmax|pmin|ppermute")

# The role of what is sent in a `jax.named_scope`; the innermost counts.
ROLES = {
    "attention": "attention",
    "dispatch": "dispatch",
    "dense": "dense MLPs",
    "embedding": "embedding, head",
    "head": "embedding, head",
    "pipeline": "stages",
    "gradient_reduction": "gradients",
    "parameters": "parameters",
    "optimizer": "parameters",
}
STATISTICS = "statistics"  # what lies in none of them: losses and counts
_SCOPE = re.compile(rf"(?<!\w)({'|'.join(ROLES)})(?!\w)")


def sent(function, *abstract_arguments, mesh: AbstractMesh, busy: float = 1) -> Counter[str]:
    """Operand bytes a device, by role, of one call.

    Args:
        function: to be traced, under `mesh`.
        abstract_arguments: shapes with shardings.
        mesh: on which it runs.
        busy: share of a pipeline's ticks in which a stage has work. So much counts of what conditionals send: there are
            no others. Of a loop counts one turn, and none of the further rounds of an exchange.
    """
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(function)(*abstract_arguments).jaxpr
    out: Counter[str] = Counter()
    _count(jaxpr, 1, busy, "", dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)), out)
    return out


def _count(jaxpr, times: float, busy: float, scope: str, sizes: dict[str, int], out: Counter[str]) -> None:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        where = f"{scope}/{equation.source_info.name_stack}"
        if COLLECTIVES.match(name):
            axes = params.get("axes", params.get("axis_name"))
            if math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes)) > 1:
                out[role(where)] += times * sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
        elif name == "reshard":  # outside of `shard_map`: a gather where the result is split less
            before, after = (bytes_on_device(x.aval) for x in (equation.invars[0], equation.outvars[0]))
            if after > before:
                out[role(where)] += times * before
        inner = times * {"scan": params.get("length", 1), "cond": busy, "while": not further(where)}.get(name, 1)
        for value in params.values():
            for nested in value if isinstance(value, tuple) else (value,):  # a conditional has several
                nested = getattr(nested, "jaxpr", nested)  # of a closed one
                if hasattr(nested, "eqns"):
                    _count(nested, inner, busy, where, sizes, out)


def role(scope: str) -> str:
    """Of what is sent in the scopes that `scope` lists, the innermost last."""
    scopes = _SCOPE.findall(scope)
    return ROLES[scopes[-1]] if scopes else STATISTICS
