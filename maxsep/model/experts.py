"""The experts: a gated (SwiGLU) or plain (GELU) two-layer network each, and their products over grouped tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from maxsep.config import ModelConfig
from maxsep.kernels import DTYPES, nvidia
from maxsep.model.activation import activate, weighted
from maxsep.model.blocked_experts import MOST_ROWS, block_rows, blocked_experts, used_experts
from maxsep.model.parameters import Parameters, use

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
        return jnp.einsum("ecf,efd->ecd", weighted(h, share_ec[..., None]), w_out)

    def grouped(self, dtype) -> tuple[Callable, Weights]:
        """What takes rows to this device's experts, and their weights: ([R, D], [R], [E], weights) -> [R, D].

        It takes rows sorted by expert, the share that each row's result is multiplied by, and how many rows (int32)
        each expert has. Rows after the last expert's are padding and come back as anything finite.
        """
        return functools.partial(grouped_mlp, self.kernel, self.activation), self._weights(dtype)

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
def grouped_mlp(
    kernel: str, activation: str, x_rd: jax.Array, share_r: jax.Array, rows_e: jax.Array, weights: Weights
) -> jax.Array:
    """`Experts.grouped`, a function of the weights: its gradient is taken by itself where rows come in rounds."""
    inputs, w_out = weights
    if kernel == BLOCKS:
        return blocked_experts(activation, x_rd, share_r, rows_e, inputs, w_out)
    of_rows = lax.ragged_dot
    if kernel == GROUPED:
        from maxsep.kernels.grouped import grouped_dot as of_rows  # here, as Pallas is slow to import

    def dot(x_rk, w_ekn):
        return checkpoint_name(of_rows(x_rk, w_ekn, rows_e), PRODUCT)

    h = activate(activation, *(dot(x_rd, w) for w in inputs))
    return dot(weighted(h, share_r[:, None]), w_out)


def form(kernel: str, rows: int, experts: int) -> int | str:
    """How `rows` rows are taken to `experts` experts in inference: `kernel`, on CPUs in blocks of so many rows."""
    return block_rows(rows, experts) if kernel == BLOCKS else kernel


def forms(kernel: str) -> tuple[int | str, ...]:
    """What `form` chooses from, and what else could be: on GPUs XLA's own product."""
    if kernel == BLOCKS:
        return tuple(2**power for power in range(MOST_ROWS.bit_length()))
    return (GROUPED, RAGGED) if kernel == GROUPED else (RAGGED,)


def product(form: int | str, activation: str, x_rd, rows_e, inputs, w_out, layer: int) -> jax.Array:
    """`Experts.used` in one of `forms`."""
    if form not in KERNELS:
        return used_experts(form, activation, x_rd, rows_e, inputs, w_out, layer)

    def dot(x, w):
        if form == RAGGED:
            return lax.ragged_dot(x, w[layer], rows_e)
        from maxsep.kernels.grouped import grouped_rows

        # Of all layers' experts, so that the layer's are not copied; those without rows are not read.
        return grouped_rows(x, w.reshape(-1, *w.shape[2:]), rows_e, first=layer * rows_e.size)

    return dot(activate(activation, *(dot(x_rd, w) for w in inputs)), w_out)
