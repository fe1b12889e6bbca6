"""The dense feed-forward part of a layer: a gated (SwiGLU) or plain (GELU) two-layer network for every token."""

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.config import ModelConfig
from maxsep.model.activation import activate
from maxsep.model.parameters import Parameters, use


class MLP(nnx.Module):
    """Its hidden size is split by the layout's `m`: those devices take the tokens of all of them."""

    def __init__(self, parameters: Parameters, model: ModelConfig):
        self.w_in_dm = parameters.normal("dm", model.d_model**-0.5)
        if model.activation == "swiglu":
            self.w_gate_dm = parameters.normal("dm", model.d_model**-0.5)
        self.w_out_md = parameters.normal("md", (model.dense_d_ff * 2 * model.layers) ** -0.5)
        self.layout, self.activation = parameters.layout, model.activation

    def train(self, x_bsd: jax.Array, token_bs: jax.Array, dropout_key: jax.Array | None) -> tuple[jax.Array, None]:
        """[b, s, D] -> [b, s, D]; it has no statistics, and no dropout."""
        return self._apply(x_bsd), None

    def infer(self, x_bsd: jax.Array, real_bs: jax.Array, layer: int) -> jax.Array:
        """[b, s, D] -> [b, s, D]."""
        return self._apply(x_bsd)

    def _apply(self, x_bsd: jax.Array) -> jax.Array:
        dtype, axes = x_bsd.dtype, self.layout.axes("m")
        x_bsd = self.layout.join(x_bsd, axes)
        inputs = (self.w_gate_dm, self.w_in_dm) if self.activation == "swiglu" else (self.w_in_dm,)
        h_bsm = activate(self.activation, *(jnp.einsum("bsd,dm->bsm", x_bsd, use(w, dtype)) for w in inputs))
        return self.layout.part(jnp.einsum("bsm,md->bsd", h_bsm, use(self.w_out_md, dtype)), axes)
