"""A layer: attention and a feed-forward part, each after a norm and added to what came in."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import lax

from maxsep.config import ModelConfig
from maxsep.model.attention import Attention
from maxsep.model.experts import PRODUCT
from maxsep.model.layers import RMSNorm
from maxsep.model.mlp import MLP
from maxsep.model.moe import MoE
from maxsep.model.parameters import Parameters
from maxsep.model.tokens import Tokens
from maxsep.parallel.layout import Layout

# By `Segment.feed_forward`. Each has `train` and `infer`, and the first returns its statistics too, or None.
FEED_FORWARD = {"dense": MLP, "moe": MoE}


class Block(nnx.Module):
    """One layer; of a segment's `Parameters`, all its layers, stacked, to be scanned over or unstacked."""

    def __init__(self, parameters: Parameters, model: ModelConfig, feed_forward: str, kernel: str):
        self.attention_norm = RMSNorm(parameters, model.norm_eps)
        self.attention = Attention(parameters, model, kernel)
        self.feed_forward_norm = RMSNorm(parameters, model.norm_eps)
        self.feed_forward = FEED_FORWARD[feed_forward](parameters, model)
        self.kind = feed_forward

    def train(self, x_bsd: jax.Array, tokens: Tokens, dropout_key: jax.Array | None, scored_e: jax.Array | None):
        """[b, s, D] -> [b, s, D] and statistics; the other arguments are those of its parts."""
        with jax.named_scope("attention"):
            x_bsd += self.attention.train(self.attention_norm(x_bsd), tokens.segments_bs)
        with jax.named_scope(self.kind):
            y_bsd, statistics = self.feed_forward.train(self.feed_forward_norm(x_bsd), tokens, dropout_key, scored_e)
        return x_bsd + y_bsd, statistics

    def infer(self, x_bsd: jax.Array, real_bs: jax.Array, layer: int, attend: Callable, kept):
        """[b, s, D] -> [b, s, D], and what attention keeps.

        Args:
            x_bsd: tokens.
            real_bs: which of them are none of our padding.
            layer: its number in its segment, of which the experts' weights are those of all layers.
            attend: an attention, its input and what it kept -> its output and what it keeps.
            kept: of its attention.
        """
        with jax.named_scope("attention"):
            y_bsd, kept = attend(self.attention, self.attention_norm(x_bsd), kept)
            x_bsd += y_bsd
        with jax.named_scope(self.kind):
            x_bsd += self.feed_forward.infer(self.feed_forward_norm(x_bsd), real_bs, layer)
        return x_bsd, kept


def rematerialised(block: Callable, model: ModelConfig, layout: Layout) -> Callable:
    """`block`, which keeps for its backward pass what `model.remat` says."""
    policy = None
    if model.remat == "dots":
        # Products, and what was received: else it is sent again. But no weights gathered from their parts.
        received = ("all_to_all", "reduce_scatter") + ("all_gather",) * (layout.ways("w") == 1)

        def policy(primitive, *args, **params):
            if primitive.name == "name":
                return params["name"] == PRODUCT
            return primitive.name in received or jax.checkpoint_policies.dots_saveable(primitive, *args, **params)

    if model.remat == "none":
        # All but what is made of weights: a layer's from their parts, and casts, which a pipeline would keep each tick.
        again = ("all_gather",) * (layout.ways("w") > 1) + ("convert_element_type",) * (layout.ways("l") > 1)
        if not again:
            return block

        def policy(primitive, *_, **__):
            return not primitive.name.startswith(again)

    in_loop = model.scan_layers or layout.ways("l") > 1
    return jax.checkpoint(block, policy=policy, prevent_cse=not in_loop)


def unstack(tree) -> list:
    """Each layer's slice of stacked parameters; the gradient is one concatenation, not a sum of padded slices."""
    leaves, treedef = jax.tree.flatten(tree)
    layers = leaves[0].shape[0]
    parts = [lax.split(leaf, [1] * layers, axis=0) for leaf in leaves]
    return [treedef.unflatten(part[layer].squeeze(0) for part in parts) for layer in range(layers)]
