"""The transformer: embedding, blocks of attention and MoE, output head.

The modules hold the parameters, as plain Flax NNX pytrees, layers stacked on the first dimension. Calls happen inside
the train step's `jax.shard_map`: arrays are one device's part, and what is sent is sent by `collectives`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maxsep.config import ConfigError, ModelConfig
from maxsep.kernels import nvidia
from maxsep.model import head
from maxsep.model.attention import Attention
from maxsep.model.experts import PRODUCT
from maxsep.model.layers import Cast, Embedding, RMSNorm, normal, use
from maxsep.model.moe import MoE, MoEStats
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout
from maxsep.parallel.pipeline import in_turn, pipelined


class Block(nnx.Module):
    """Attention and MoE, each after a norm and added to what came in."""

    def __init__(self, rngs: nnx.Rngs, layout: Layout, model: ModelConfig, kernel: str, dtype):
        self.attention_norm = RMSNorm(layout, (model.layers,), model.d_model, model.norm_eps, dtype)
        self.attention = Attention(rngs, layout, model, kernel, dtype)
        self.moe_norm = RMSNorm(layout, (model.layers,), model.d_model, model.norm_eps, dtype)
        self.moe = MoE(rngs, layout, model, dtype)

    def __call__(self, x_bsd, segments_bs, token_bs, dropout_key):
        with jax.named_scope("attention"):
            x_bsd += self.attention(self.attention_norm(x_bsd), segments_bs)
        with jax.named_scope("moe"):
            y_bsd, stats = self.moe(self.moe_norm(x_bsd), token_bs, dropout_key)
        return x_bsd + y_bsd, stats


class Losses(NamedTuple):
    """Sums over micro-batches, of figures over all devices."""

    cross_entropy: jax.Array  # sum over targets, nats
    stats: MoEStats  # with a leading dimension, of this stage's layers


class Transformer(nnx.Module):
    """Parameters in float32 (float64 for a float64 run), computation in `model.dtype`.

    `ids`: those of the tokenizer, from 0; with `model.mask_unused_ids` only they have a probability. `dtype`: of the
    matrices; norms and routers stay float32 or wider.
    """

    def __init__(self, rngs: nnx.Rngs, model: ModelConfig, layout: Layout, ids: int, dtype=None):
        dtype = jnp.promote_types(model.dtype, jnp.float32) if dtype is None else dtype
        kernel = attention_kernel(model, layout.platform)
        self.embedding = Embedding(rngs, layout, model.padded_vocab_size, model.d_model, dtype)
        self.blocks = Block(rngs, layout, model, kernel, dtype)
        self.final_norm = RMSNorm(layout, (), model.d_model, model.norm_eps, dtype)
        if not model.tied_embedding:
            rows = (model.padded_vocab_size, model.d_model)
            self.head_vd = normal(rngs, layout, "vd", rows, model.d_model**-0.5, dtype)
        self.layout, self.model, self.ids = layout, model, ids if model.mask_unused_ids else model.vocab_size

    def losses(self, batch_abt: jax.Array, first_row: jax.Array, dropout_key, end_of_text: int | None) -> Losses:
        """Records [a, b, S + 1] of micro-batches, ids and -1 for padding -> their `Losses`, added up.

        `first_row` is the first one's first sequence's place in the global batch. With `end_of_text` (an id) tokens
        attend within their document only.
        """
        layout, axes = self.layout, self.layout.axes("v")
        count, b = batch_abt.shape[:2]
        tokens_abs, targets_abs = jnp.maximum(batch_abt[..., :-1], 0), batch_abt[..., 1:]

        def embedded(number):
            with jax.named_scope("embedding"):
                return self.embedding(tokens_abs[number], self.model.dtype)

        # Taken apart here, once: a pipeline would keep what it makes of the weights for each micro-batch.
        blocks = self.blocks if self.model.scan_layers else unstack(self.blocks)

        def layers(x_bsd, number):
            row = first_row + number * (b * layout.ways("b"))
            return self.layers(blocks, x_bsd, tokens_abs[number], row, dropout_key, end_of_text)

        x_absd, stats = pipelined(embedded, layers, count, layout.axes("l"))
        with jax.named_scope("head"):
            nll = head.summed(self._nll, (self.final_norm, self.head_table), x_absd, targets_abs)
            return Losses(layout.total(nll, layout.token_axes + axes), stats)

    def layers(self, blocks, x_bsd: jax.Array, tokens_bs: jax.Array, first_row: jax.Array, dropout_key, end_of_text):
        """This device's layers: [b, s, D] -> [b, s, D] and their `MoEStats`.

        `blocks` are stacked, or a list of each; `tokens_bs` [b, S] are whole sequences.
        """
        model, layout = self.model, self.layout
        b, s = tokens_bs.shape
        segments_bs = documents(tokens_bs, end_of_text)
        local_s = s // layout.ways("s")
        row_b = first_row + collectives.index(layout.axes("b")) * b + jnp.arange(b)
        column_s = collectives.index(layout.axes("s")) * local_s + jnp.arange(local_s)
        token_bs = collectives.vary(row_b[:, None] * s + column_s)

        def block(x_bsd, layer):
            block, number = layer
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
            return block(x_bsd, segments_bs, token_bs, key)

        block = rematerialised(block, model, layout)
        count = model.layers // layout.ways("l")
        numbers = collectives.index(layout.axes("l")) * count + jnp.arange(count)
        if model.scan_layers:
            return lax.scan(block, x_bsd, (blocks, numbers))
        layers = []
        for at, one in enumerate(blocks):
            if layout.ways("w") > 1:
                # Else XLA gathers all layers' weights before the loop over micro-batches, and keeps them.
                x_bsd, one = lax.optimization_barrier((x_bsd, one))
            x_bsd, layer_stats = block(x_bsd, (one, numbers[at]))
            layers.append(layer_stats)
        return x_bsd, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def infer(self, blocks: list[Block], x_bsd: jax.Array, real_bs: jax.Array, attend: Callable, kept: list):
        """All layers for inference: [b, s, D] -> [b, s, D], and what each of this stage's layers keeps.

        Args:
            blocks: this stage's layers, each with the experts' weights of all of them.
            x_bsd: embedded tokens.
            real_bs: which of them are none of our padding.
            attend: an `Attention`, its input and what was kept -> its output and what is to be kept.
            kept: of each layer.
        """

        def layers(x_bsd, kept):
            new = []
            for number, (block, before) in enumerate(zip(blocks, kept, strict=True)):
                with jax.named_scope("attention"):
                    y_bsd, after = attend(block.attention, block.attention_norm(x_bsd), before)
                    x_bsd += y_bsd
                with jax.named_scope("moe"):
                    x_bsd += block.moe.chosen(block.moe_norm(x_bsd), real_bs, number)
                new.append(after)
            return x_bsd, new

        return in_turn(layers, x_bsd, kept, self.layout.axes("l"))

    @property
    def head_table(self) -> jax.Array:
        return use(self.embedding.table_vd if self.model.tied_embedding else self.head_vd)

    def logits(self, x_bsd: jax.Array) -> jax.Array:
        """[b, s, D] -> scores [b, s, V] of the next token, float32 or wider; minus infinity from `ids` on."""
        layout, axes = self.layout, self.layout.axes("v")
        with jax.named_scope("head"):
            x_bsd = layout.join(self.final_norm(x_bsd), axes)
            table_vd = self.head_table.astype(x_bsd.dtype)
            scores_tv = head.logits(x_bsd.reshape(-1, x_bsd.shape[-1]), table_vd, self.ids, axes)
            scores_tv = collectives.gather(scores_tv, axes, 1)
            return layout.own(scores_tv.reshape(*x_bsd.shape[:2], -1), axes)

    def log_probabilities(self, x_bsd: jax.Array, targets_bs: jax.Array) -> jax.Array:
        """[b, s, D] and the targets [b, S] of whole sequences -> log-probabilities [b, s]; 0 for targets of -1."""
        layout, axes = self.layout, self.layout.axes("v")
        with jax.named_scope("head"):
            x_bsd = layout.join(self.final_norm(x_bsd), axes)
            targets_t = layout.join_ids(targets_bs, axes).ravel()
            x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
            found_t = head.log_probabilities(x_td, self.head_table, targets_t, self.ids, axes)
            return layout.own(found_t.reshape(x_bsd.shape[:2]), axes)

    def _nll(self, weights, x_bsd: jax.Array, targets_bs: jax.Array) -> jax.Array:
        """This device's share of a micro-batch's cross-entropy, with the final norm and the head's table as given."""
        final_norm, table_vd = weights
        layout, axes = self.layout, self.layout.axes("v")
        x_bsd = layout.join(final_norm(x_bsd), axes)
        targets_t = layout.join_ids(targets_bs, axes).ravel()
        return head.cross_entropy(x_bsd.reshape(-1, x_bsd.shape[-1]), table_vd, targets_t, self.ids, axes)


def documents(tokens_bs: jax.Array, end_of_text: int | None) -> jax.Array | None:
    """The number of each token's document in its sequence; None where tokens attend across them (no `end_of_text`)."""
    if end_of_text is None:
        return None
    ends = (tokens_bs == end_of_text).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends  # an end of text belongs to the document it ends


def casts(params: dict, dtype) -> dict:
    """The matrices of attention and experts in `dtype`, for `with_casts`; None for all else."""

    def cast(path, w):
        return w.astype(dtype) if path[0].key == "blocks" and w.ndim == 4 else None

    return jax.tree_util.tree_map_with_path(cast, params)


def with_casts(params: dict, casts: dict) -> dict:
    """Parameters that `use` takes in their `casts`; their gradients are those of the parameters."""
    return jax.tree.map(lambda w, cast: w if cast is None else Cast(w, cast), params, casts)


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


def attention_kernel(model: ModelConfig, platform: str) -> str:
    """What `model.attention_kernel` means on `platform`: with `auto`, cuDNN's kernel where it can run, else XLA.

    Raises:
        ConfigError: cudnn is asked for where it cannot run.
    """
    if model.attention_kernel == "xla":
        return "xla"
    # cuDNN's flash attention takes 16-bit numbers, and heads of multiples of 8 up to 128 on every GPU since Ampere.
    obstacle = nvidia.obstacle(platform)
    if model.dtype != "bfloat16":
        obstacle = obstacle or f"model.dtype is {model.dtype}"
    if model.head_size % 8 or model.head_size > 128:
        obstacle = obstacle or f"heads have size {model.head_size}, no multiple of 8 up to 128"
    if obstacle is None:
        return "cudnn"
    if model.attention_kernel == "cudnn":
        raise ConfigError(f"model.attention_kernel: got cudnn, but {obstacle}; takes xla or auto")
    return "xla"
