"""A gated (SwiGLU) or plain (GELU) two-layer network for every token: a dense layer's, or the shared experts.

Of those the hidden numbers lie side by side: several are one that is as wide as all of them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from maxsep.config import ModelConfig
from maxsep.model.activation import activate
from maxsep.model.parameters import Parameters, use


class MLP(nnx.Module):
    """Its hidden size, `m`, is split by the layout: those devices take the tokens of all of them."""

    def __init__(self, parameters: Parameters, model: ModelConfig):
        self.w_in_dm = parameters.normal("dm", model.d_model**-0.5)
        if model.activation == "swiglu":
            self.w_gate_dm = parameters.normal("dm", model.d_model**-0.5)
        self.w_out_md = parameters.normal("md", (parameters.sizes["m"] * 2 * model.layers) ** -0.5)
        self.layout, self.activation = parameters.layout, model.activation

    def train(self, x_bsd: jax.Array, *_) -> tuple[jax.Array, None]:
        """As the call; it has no dropout and no statistics."""
        return self(x_bsd), None

    def infer(self, x_bsd: jax.Array, *_) -> jax.Array:
        """As the call."""
        return self(x_bsd)

    def __call__(self, x_bsd: jax.Array) -> jax.Array:
        """[b, s, D] -> [b, s, D]."""
        dtype, axes = x_bsd.dtype, self.layout.axes("m")
        x_bsd = self.layout.join(x_bsd, axes)
        inputs = (self.w_gate_dm, self.w_in_dm) if self.activation == "swiglu" else (self.w_in_dm,)
        h_bsm = activate(self.activation, *(jnp.einsum("bsd,dm->bsm", x_bsd, use(w, dtype)) for w in inputs))
        return self.layout.part(jnp.einsum("bsm,md->bsd", h_bsm, use(self.w_out_md, dtype)), axes)
