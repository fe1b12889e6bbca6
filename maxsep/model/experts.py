"""The experts: a gated (SwiGLU) or plain (GELU) two-layer network each, and their products over grouped tokens."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxsep.config import ModelConfig
from maxsep.kernels import DTYPES, nvidia
from maxsep.model.activation import activate
from maxsep.model.parameters import Parameters, use
from maxsep.parallel import collectives

BLOCK = 128  # rows of one product in the CPU's dropless path
BLOCKS, GROUPED, RAGGED = "blocks", "grouped", "ragged_dot"
KERNELS = {  # of dropless experts
    # On CPUs XLA's ragged product computes every expert on every row.
    BLOCKS: "blocks of rows, as many as there are",
    GROUPED: "grouped products (Pallas)",
    RAGGED: "lax.ragged_dot",
}
PRODUCT = "grouped_product"  # names their results for rematerialisation, which sees no products in them
Weights = tuple[tuple[jax.Array, ...], jax.Array]  # w_gate and w_in, or w_in [E, D, F]; w_out [E, F, D]


class Experts(nnx.Module):
    """Weights of all experts of a layer, and what they compute."""

    def __init__(self, parameters: Parameters, model: ModelConfig):
        self.w_in_edf = parameters.normal("edf", model.d_model**-0.5)
        if model.activation == "swiglu":
            self.w_gate_edf = parameters.normal("edf", model.d_model**-0.5)
        self.w_out_efd = parameters.normal("efd", (model.d_ff * 2 * model.layers) ** -0.5)
        self.activation, self.kernel = model.activation, kernel(model, parameters.layout.platform)

    @jax.named_scope("experts")
    def _weights(self, dtype) -> tuple[tuple[jax.Array, ...], jax.Array]:
        inputs = (self.w_gate_edf, self.w_in_edf) if self.activation == "swiglu" else (self.w_in_edf,)
        return tuple(use(w, dtype) for w in inputs), use(self.w_out_efd, dtype)

    @jax.named_scope("experts")
    def padded(self, x_ecd: jax.Array, share_ec: jax.Array) -> jax.Array:
        """[E, C, D] -> [E, C, D], times `share_ec`: as many rows for each of this device's experts."""
        inputs, w_out = self._weights(x_ecd.dtype)
        h = activate(self.activation, *(jnp.einsum("ecd,edf->ecf", x_ecd, w) for w in inputs))
        return jnp.einsum("ecf,efd->ecd", _weighted(h, share_ec[..., None]), w_out)

    def grouped(self, dtype) -> tuple[Callable, Weights]:
        """What takes rows to this device's experts, and their weights: ([R, D], [R], [E], weights) -> [R, D].

        It takes rows sorted by expert, the share that each row's result is multiplied by, and how many rows (int32)
        each expert has. Rows after the last expert's are padding and come back as anything finite.
        """
        return functools.partial(_grouped, self.kernel, self.activation), self._weights(dtype)

    @jax.named_scope("experts")
    def used(self, x_rd: jax.Array, rows_e: jax.Array, layer: int) -> jax.Array:
        """Rows as for `grouped`, for inference: the weights are those of all layers of the segment, [l, E, ...].

        Of `layer`, counted in the segment, those are read that are used.
        """
        inputs, w_out = self._weights(x_rd.dtype)
        chosen = form(self.kernel, x_rd.shape[0], rows_e.size)
        return product(chosen, self.activation, x_rd, rows_e, inputs, w_out, layer)


def kernel(model: ModelConfig, platform: str) -> str:
    """What computes the products of dropless experts on `platform`: one of `KERNELS`."""
    if platform == "cpu":
        return BLOCKS
    return RAGGED if _obstacle(model, platform) else GROUPED


def described(model: ModelConfig, platform: str) -> str:
    """The same for people, with the reason where it is not the best."""
    chosen = kernel(model, platform)
    return KERNELS[chosen] + (f" ({_obstacle(model, platform)})" if chosen == RAGGED else "")


def _obstacle(model: ModelConfig, platform: str) -> str | None:
    """Why `grouped_dot` cannot run."""
    if model.dtype not in DTYPES:
        return f"model.dtype is {model.dtype}"
    return nvidia.obstacle(platform)


@jax.named_scope("experts")
def _grouped(
    kernel: str, activation: str, x_rd: jax.Array, share_r: jax.Array, rows_e: jax.Array, weights: Weights
) -> jax.Array:
    """`Experts.grouped`, a function of the weights: its gradient is taken by itself where rows come in rounds."""
    inputs, w_out = weights
    if kernel == BLOCKS:
        return _blocked(activation, x_rd, share_r, rows_e, inputs, w_out)
    of_rows = lax.ragged_dot
    if kernel == GROUPED:
        from maxsep.kernels.grouped import grouped_dot as of_rows  # here, as Pallas is slow to import

    def dot(x_rk, w_ekn):
        return checkpoint_name(of_rows(x_rk, w_ekn, rows_e), PRODUCT)

    h = activate(activation, *(dot(x_rd, w) for w in inputs))
    return dot(_weighted(h, share_r[:, None]), w_out)


def form(kernel: str, rows: int, experts: int) -> int | str:
    """How `rows` rows are taken to `experts` experts in inference: `kernel`, on CPUs in blocks of so many rows.

    Blocks have the power of two next to the mean rows of an expert and one: on 2 quiet cores the fastest or nearly so,
    from 2 to 512 rows for 16 experts (docs/benchmarks.md, "Decoding").
    """
    return min(BLOCK, 2 ** round(math.log2(1 + rows / experts))) if kernel == BLOCKS else kernel


def forms(kernel: str) -> tuple[int | str, ...]:
    """What `form` chooses from, and what else could be: on GPUs XLA's own product."""
    if kernel == BLOCKS:
        return tuple(2**power for power in range(BLOCK.bit_length()))
    return (GROUPED, RAGGED) if kernel == GROUPED else (RAGGED,)


def product(form: int | str, activation: str, x_rd, rows_e, inputs, w_out, layer: int) -> jax.Array:
    """`Experts.used` in one of `forms`."""
    if form not in KERNELS:
        return _by_block(form, activation, x_rd, rows_e, inputs, w_out, layer)

    def dot(x, w):
        if form == RAGGED:
            return lax.ragged_dot(x, w[layer], rows_e)
        from maxsep.kernels.grouped import grouped_rows

        # Of all layers' experts, so that the layer's are not copied; those without rows are not read.
        return grouped_rows(x, w.reshape(-1, *w.shape[2:]), rows_e, first=layer * rows_e.size)

    return dot(activate(activation, *(dot(x_rd, w) for w in inputs)), w_out)


def _by_block(size: int, activation, x_rd, rows_e, inputs, w_out, layer):
    """One block of rows after the other, as many as there are, each with its expert's weights."""
    starts, blocks_e = jnp.cumsum(rows_e) - rows_e, (rows_e + size - 1) // size
    last_e = jnp.cumsum(blocks_e)
    x = jnp.pad(x_rd, ((0, size), (0, 0)))  # the last expert's last block may reach past the end

    def block(number, y):
        expert = jnp.searchsorted(last_e, number, side="right")
        at = starts[expert] + (number - (last_e - blocks_e)[expert]) * size

        def of_expert(w):
            # One slice: of two, XLA would copy all experts of the layer for the first.
            start = (jnp.asarray(i, expert.dtype) for i in (layer, expert, 0, 0))
            return lax.dynamic_slice(w, tuple(start), (1, 1, *w.shape[2:]))[0, 0]

        row = lax.dynamic_slice_in_dim(x, at, size)
        h = activate(activation, *(row @ of_expert(w) for w in inputs))
        # It may run into the next expert's rows, which that overwrites in turn.
        return lax.dynamic_update_slice_in_dim(y, h @ of_expert(w_out), at, axis=0)

    return lax.fori_loop(0, last_e[-1], block, jnp.zeros_like(x))[: x_rd.shape[0]]


def _weighted(h: jax.Array, share: jax.Array) -> jax.Array:
    """Hidden rows times their shares, which are float32 or wider, as is the sum that is their gradient."""
    return (h.astype(share.dtype) * share).astype(h.dtype)


def _plan(rows_e: jax.Array):
    """First row of each expert, and its number of blocks."""
    return jnp.cumsum(rows_e) - rows_e, (rows_e + BLOCK - 1) // BLOCK


def _pad(x_rd: jax.Array) -> jax.Array:
    return jnp.pad(x_rd, ((0, BLOCK), (0, 0)))  # the last expert's last block may reach past the end


def _rows(x_rd: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_rd, start, BLOCK)


def _put(x_rd: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x_rd, rows, start, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(activation, x_rd, share_r, rows_e, inputs, w_out):
    return _blocked_fwd(activation, x_rd, share_r, rows_e, inputs, w_out)[0]


def _blocked_fwd(activation, x_rd, share_r, rows_e, inputs, w_out):
    """One expert after the other, each in blocks of rows.

    A last block runs into the next expert's rows; that expert overwrites them in turn.
    """
    x, share = _pad(x_rd), _pad(share_r[:, None])
    starts, blocks = _plan(rows_e)
    hidden = tuple(collectives.vary(jnp.zeros((x.shape[0], w.shape[-1]), x.dtype)) for w in inputs)

    def expert(carry, per_expert):
        start, n, w_in, w_o = per_expert

        def block(i, carry):
            y, hidden = carry
            at = start + i * BLOCK
            row = _rows(x, at)
            h = tuple(row @ w for w in w_in)
            out = _weighted(activate(activation, *h), _rows(share, at)) @ w_o
            return _put(y, out, at), tuple(map(lambda b, v: _put(b, v, at), hidden, h))

        return lax.fori_loop(0, n, block, carry), None

    (y, hidden), _ = lax.scan(expert, (jnp.zeros_like(x), hidden), (starts, blocks, inputs, w_out))
    return y[: x_rd.shape[0]], (x_rd, share_r, rows_e, inputs, w_out, hidden)


def _blocked_bwd(activation, residuals, g_rd):
    x_rd, share_r, rows_e, inputs, w_out, hidden = residuals
    x, g, share = _pad(x_rd), _pad(g_rd), _pad(share_r[:, None])
    starts, blocks = _plan(rows_e)

    def expert(carry, per_expert):
        start, rows, n, w_in, w_o = per_expert

        def block(i, carry):
            dx, dshare, dw_in, dw_o = carry
            at = start + i * BLOCK
            own = (i * BLOCK + jnp.arange(BLOCK) < rows)[:, None]  # the next expert's rows are not this one's gradient
            row, g_row = _rows(x, at), jnp.where(own, _rows(g, at), 0)
            weighted, pull = jax.vjp(
                lambda share, *h: _weighted(activate(activation, *h), share),
                _rows(share, at),
                *(_rows(h, at) for h in hidden),
            )
            ds, *dh = pull(g_row @ w_o.T)
            dw_in = tuple(dw + row.T @ d for dw, d in zip(dw_in, dh, strict=True))
            dx = _put(dx, sum(d @ w.T for d, w in zip(dh, w_in, strict=True)), at)
            return dx, _put(dshare, ds, at), dw_in, dw_o + weighted.T @ g_row

        zeros = jax.tree.map(jnp.zeros_like, (w_in, w_o))
        *carry, dw_in, dw_o = lax.fori_loop(0, n, block, (*carry, *zeros))
        return tuple(carry), (dw_in, dw_o)

    nothing = jnp.zeros_like(x), jnp.zeros_like(share)
    (dx, dshare), (dw_in, dw_out) = lax.scan(expert, nothing, (starts, rows_e, blocks, inputs, w_out))
    # Rows after the last expert's are padding, whose gradient is nothing.
    used = jnp.arange(x_rd.shape[0])[:, None] < jnp.sum(rows_e)
    dx, dshare = (jnp.where(used, d[: x_rd.shape[0]], 0) for d in (dx, dshare))
    return dx, dshare[:, 0], None, dw_in, dw_out


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
