"""What computes attention and experts on this platform, beside loops in float64.

Inputs are drawn in the run's type, so both compute with the same numbers. Each result and each gradient is compared by
its largest difference, as a share of the largest entry.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from maxsep.certification.check import Check, worst_of
from maxsep.certification.differences import by_leaf
from maxsep.certification.rig import on_host
from maxsep.config import ModelConfig
from maxsep.config.layouts import AXES
from maxsep.kernels import Sizes
from maxsep.model import attention, experts
from maxsep.model.attention import attention_kernel
from maxsep.model.blocked_attention import blocked_attention
from maxsep.model.kv_cache import KeysValues
from maxsep.parallel import collectives
from maxsep.parallel.mesh import mesh_of

PART = "kernels"
TOLERANCE = {"bfloat16": 2e-2, "tf32": 4e-3, "float32": 1e-5, "float64": 1e-12}  # by ModelConfig.products
D, F, GROUPS, LAYERS = 32, 48, 5, 2  # of the experts: widths of no multiple of a tensor core's block

ROWS = {  # of each group
    "ragged": [3, 261, 1, 40, 77],
    "empty groups": [0, 30, 0, 0, 9],
    "aligned": [128, 0, 256, 128, 64],
    "all in the last": [0, 0, 0, 0, 385],
    "none": [0, 0, 0, 0, 0],
}
PADDING = 13  # rows of no group
SIZES = Sizes(rows=2048, filled=0.9, groups=8, d_model=256, d_ff=528)
SEQUENCES = {  # sequences, tokens, query heads, key/value heads, and whether documents part them
    "one token": (2, 1, 4, 4, False),
    "odd length": (2, 67, 4, 4, False),
    "documents": (3, 67, 4, 4, True),
    "shared heads": (2, 130, 6, 2, False),
    "shared heads, documents": (1, 259, 4, 1, True),
}
Arrays = dict[str, np.ndarray]


def checks(model: ModelConfig, platform: str) -> Iterator[Check]:
    """Each kernel that training and inference of `model` take on `platform`, on this process's first device."""
    kernel = attention_kernel(model, platform)
    for name, case in SEQUENCES.items():
        yield _check(model, f"attention ({kernel}), {name}", *_attention(model, platform, kernel, *case))
    yield _check(model, "attention of the cache", *_decoding(model))
    form = experts.kernel(model, platform)
    for name, rows in ROWS.items():
        yield _check(model, f"experts ({form}), {name}", *_experts(model, form, rows))
    for name, rows in ROWS.items():
        yield _check(model, f"experts of inference ({form}), {name}", *_used(model, form, rows))
    if form == experts.GROUPED:
        from maxsep.kernels import check  # here, as Pallas is slow to import

        wrong = check.wrong(SIZES, model.dtype)
        yield Check(PART, "", "grouped products of integers", float(wrong is not None), wrong or "", 0.0)


def left(model: ModelConfig, platform: str) -> list[str]:
    """Kernels that are for other platforms, in words."""
    takes = (attention_kernel(model, platform), "cudnn"), (experts.kernel(model, platform), experts.GROUPED)
    names = "cuDNN's attention", "grouped products (Pallas)"
    return [
        f"{name}: a kernel for NVIDIA GPUs, which this platform ({platform}) or type ({model.dtype}) does not take"
        for name, (own, other) in zip(names, takes, strict=True)
        if own != other
    ]


def _check(model: ModelConfig, quantity: str, found: Arrays, expected: Arrays) -> Check:
    """The worst of the results and gradients; an expected one without entries that are not 0 is exact."""
    tolerance = TOLERANCE[model.products]
    return worst_of(Check(PART, "", quantity, *of[::-1], tolerance) for of in by_leaf(found, expected, "").items())


def _on_device(function: Callable, *arrays: Any) -> Any:
    """What `function` makes of arrays on this process's first device, inside a `jax.shard_map`; on the host."""

    def on_device(*arrays):
        return jax.tree.map(lambda x: collectives.total(x, AXES), collectives.vary(function(*collectives.vary(arrays))))

    with jax.set_mesh(mesh_of(np.array(jax.local_devices()[:1]).reshape(1, 1, 1))):
        return on_host(jax.jit(jax.shard_map(on_device, in_specs=P(), out_specs=P()))(*arrays))


def _drawn(model: ModelConfig, seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), model.dtype) for name, shape in shapes.items()}


def _wide(arrays: dict[str, jax.Array]) -> Arrays:
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def _attention(model, platform, kernel, b, s, h, kv, parted) -> tuple[Arrays, Arrays]:
    q = model.head_size
    given = _drawn(model, 0, q=(b, s, h, q), k=(b, s, kv, q), v=(b, s, kv, q), g=(b, s, h, q))
    segments_bs = np.cumsum(np.random.default_rng(1).random((b, s)) < 0.1, axis=1, dtype=np.int32) if parted else None
    of = attention.fused_attention if kernel == "cudnn" else partial(blocked_attention, in_turns=platform == "cpu")

    def run(given):
        y, pull = jax.vjp(lambda q, k, v: of(q, k, v, segments_bs), *(given[name] for name in "qkv"))
        return dict(zip(("y", "dq", "dk", "dv"), (y, *pull(given["g"])), strict=True))

    expected = _attention_in_loops(**_wide(given), segments_bs=segments_bs)
    return _on_device(run, given), expected


def _attention_in_loops(q, k, v, g, segments_bs) -> Arrays:
    """Each head of each sequence by itself, and its gradients."""
    out = {"y": np.zeros_like(q), "dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    b, s, h, size = q.shape
    for row in range(b):
        seen = np.tril(np.ones((s, s), bool))
        if segments_bs is not None:
            seen &= segments_bs[row][:, None] == segments_bs[row]
        for head in range(h):
            of, scale = (row, slice(None), head * k.shape[2] // h), size**-0.5
            own = (row, slice(None), head)
            p = np.where(seen, np.exp(_scores(q[own], k[of], seen) * scale), 0)
            p /= p.sum(axis=1, keepdims=True)
            dp = g[own] @ v[of].T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * scale
            out["y"][own], out["dq"][own] = p @ v[of], ds @ k[of]
            out["dk"][of] += ds.T @ q[own]
            out["dv"][of] += p.T @ g[own]
    return out


def _scores(q_sq: np.ndarray, k_tq: np.ndarray, seen_st: np.ndarray) -> np.ndarray:
    """Products less the largest of their row among what is seen."""
    scores = q_sq @ k_tq.T
    return scores - np.where(seen_st, scores, -np.inf).max(axis=1, keepdims=True)


def _decoding(model: ModelConfig) -> tuple[Arrays, Arrays]:
    """One token of each sequence beside a cache of other lengths, of which some slots are empty."""
    b, h, kv, size, slots, slot = 3, 4, 2, model.head_size, 37, 29
    first_b = np.array([0, 11, slot], np.int32)  # the last has nothing before its token
    given = _drawn(model, 2, q=(b, 1, h, size), k=(b, 1, kv, size), v=(b, 1, kv, size), ks=(b, kv, slots, size))
    given |= _drawn(model, 3, vs=(b, kv, slots, size))

    def run(given):
        cache = KeysValues(given["ks"], given["vs"])
        return {"y": attention.cached_attention(given["q"], given["k"], given["v"], cache, slot, first_b)}

    of, y = _wide(given), np.zeros((b, 1, h, size))
    for row, first in enumerate(first_b):
        for head in range(h):
            shared = head * kv // h
            keys = np.concatenate([of["ks"][row, shared, first:slot], of["k"][row, :, shared]])
            values = np.concatenate([of["vs"][row, shared, first:slot], of["v"][row, :, shared]])
            p = np.exp(keys @ of["q"][row, 0, head] * size**-0.5)
            y[row, 0, head] = p / p.sum() @ values
    return _on_device(run, given), {"y": y}


def _weights(model: ModelConfig, seed: int, *layers: int) -> tuple[dict[str, jax.Array], list[str]]:
    """Of all groups, and the names of those that rows are multiplied by first."""
    inputs = ["w_gate", "w_in"] if model.activation == "swiglu" else ["w_in"]
    shapes = dict.fromkeys(inputs, (*layers, GROUPS, D, F)) | {"w_out": (*layers, GROUPS, F, D)}
    return {name: w * D**-0.5 for name, w in _drawn(model, seed, **shapes).items()}, inputs


def _experts(model: ModelConfig, form: str, rows: list[int]) -> tuple[Arrays, Arrays]:
    """The product of training, and its gradients; rows of no group come back as anything, without a gradient."""
    used, rows_e = sum(rows), jnp.array(rows, jnp.int32)
    weights, inputs = _weights(model, 4)
    given = _drawn(model, 5, x=(used + PADDING, D), g=(used + PADDING, D)) | weights
    given["g"] = given["g"].at[used:].set(0)
    wide = jnp.promote_types(model.dtype, jnp.float32)
    given["share"] = jnp.asarray(np.random.default_rng(6).random(used + PADDING), wide)
    names = ("x", "share", *weights)

    def run(given):
        def product(x, share, *w):
            return experts.grouped_mlp(form, model.activation, x, share, rows_e, (w[: len(inputs)], w[-1]))

        y, pull = jax.vjp(product, *(given[name] for name in names))
        pulled = dict(zip((f"d{name}" for name in names), pull(given["g"]), strict=True))
        return {"y": y[:used]} | pulled

    return _on_device(run, given), _experts_in_a_loop(model, _wide(given), inputs, rows)


def _used(model: ModelConfig, form: str, rows: list[int]) -> tuple[Arrays, Arrays]:
    """The product of inference, of one of several layers."""
    weights, inputs = _weights(model, 7, LAYERS)
    given = _drawn(model, 8, x=(sum(rows) + PADDING, D)) | weights
    how, rows_e = experts.form(form, sum(rows) + PADDING, GROUPS), jnp.array(rows, jnp.int32)

    def run(given):
        w = tuple(given[name] for name in inputs)
        return {"y": experts.product(how, model.activation, given["x"], rows_e, w, given["w_out"], 1)[: sum(rows)]}

    of = {name: x[1] if name in weights else x for name, x in _wide(given).items()}
    of |= {"share": np.ones(len(of["x"])), "g": np.zeros_like(of["x"])}
    return _on_device(run, given), {"y": _experts_in_a_loop(model, of, inputs, rows)["y"]}


def _experts_in_a_loop(model: ModelConfig, of: Arrays, inputs: list[str], rows: list[int]) -> Arrays:
    """Each group by itself: its rows' results times their shares, and all gradients."""
    names = ("x", "share", *inputs, "w_out")
    out = {f"d{name}": np.zeros_like(of[name]) for name in names} | {"y": np.zeros_like(of["x"])[: sum(rows)]}
    end = 0
    for e, count in enumerate(rows):
        own, end = slice(end, end + count), end + count
        x, g, share = of["x"][own], of["g"][own], of["share"][own, None]
        hidden = [x @ of[name][e] for name in inputs]
        h, slopes = _activated(model.activation, *hidden)
        y = h @ of["w_out"][e]
        out["y"][own], out["dshare"][own] = share * y, (g * y).sum(axis=1)
        out["dw_out"][e] = (share * h).T @ g
        dh = share * g @ of["w_out"][e].T
        for name, slope in zip(inputs, slopes, strict=True):
            out[f"d{name}"][e] = x.T @ (dh * slope)
            out["dx"][own] += (dh * slope) @ of[name][e].T
    return out


def _activated(activation: str, *hidden: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """SwiGLU of gate and input, or GELU of the input, and its derivative by each."""
    if activation == "swiglu":
        gate, up = hidden
        sigmoid = 1 / (1 + np.exp(-gate))
        return gate * sigmoid * up, [up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid]
    from scipy.special import erf  # JAX brings SciPy

    (x,) = hidden
    cdf = (1 + erf(x / 2**0.5)) / 2
    return x * cdf, [cdf + x * np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5]
