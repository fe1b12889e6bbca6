"""The transformer: embedding, segments of layers, output head.

The modules hold the parameters, as plain Flax NNX pytrees: those of a segment's layers stacked on the first dimension,
or each layer's own. Calls happen inside the train step's `jax.shard_map`: arrays are one device's part, and what is
sent is sent by `collectives`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maxsep.config import ModelConfig
from maxsep.config.matrices import sizes
from maxsep.config.segments import Segment, segments
from maxsep.model import head
from maxsep.model.attention import attention_kernel
from maxsep.model.block import Block, rematerialised, unstack
from maxsep.model.layers import Embedding, RMSNorm
from maxsep.model.moe import MoEStats
from maxsep.model.parameters import Parameters, use
from maxsep.model.tokens import Tokens, documents
from maxsep.parallel import collectives
from maxsep.parallel.layout import Layout
from maxsep.parallel.pipeline import in_turn, pipelined


class Losses(NamedTuple):
    """Sums over micro-batches, of figures over all devices."""

    cross_entropy: jax.Array  # sum over targets, nats
    stats: MoEStats  # with a leading dimension, of this stage's layers that have experts


class Whole(NamedTuple):
    """The whole batch of an optimizer step, of which auxiliary losses are; both are means over its micro-batches."""

    scored_le: jax.Array  # `MoEStats.scored_e` of this stage's layers
    count: jax.Array  # tokens without padding on all devices


class Transformer(nnx.Module):
    """Parameters in float32 (float64 for a float64 run), computation in `model.dtype`.

    New, it is declared alone: its parameters are shapes with shardings on the mesh that is set.

    Args:
        model: its config.
        layout: where its parameters and tokens lie.
        ids: those of the tokenizer, from 0; with `model.mask_unused_ids` only they have a probability.
        dtype: of the matrices; norms and routers stay float32 or wider.
        apart: not stacked, but a list of each segment's layers in a stage, as `infer` takes them.
    """

    def __init__(self, model: ModelConfig, layout: Layout, ids: int, dtype=None, apart: bool = False):
        dtype = jnp.promote_types(model.dtype, jnp.float32) if dtype is None else dtype
        parameters = Parameters(layout, sizes(model) | {"m": model.dense_d_ff, "v": model.padded_vocab_size}, dtype)
        kernel = attention_kernel(model, layout.platform)

        def layers(segment: Segment) -> Block | nnx.List:
            if not apart:
                return Block(parameters.stacked(segment.layers), model, segment.feed_forward, kernel)
            own = range(segment.layers // layout.ways("l"))
            return nnx.List([Block(parameters, model, segment.feed_forward, kernel) for _ in own])

        self.embedding = Embedding(parameters)
        self.segments = nnx.Dict({segment.feed_forward: layers(segment) for segment in segments(model)})
        self.final_norm = RMSNorm(parameters, model.norm_eps)
        if not model.tied_embedding:
            self.head_vd = parameters.normal("vd", model.d_model**-0.5)
        self.layout, self.model, self.ids = layout, model, ids if model.mask_unused_ids else model.vocab_size

    def losses(
        self,
        batch_abt: jax.Array,
        first_row: jax.Array,
        dropout_key,
        end_of_text: int | None,
        whole: Whole | None = None,
    ) -> Losses:
        """Records [a, b, S + 1] of micro-batches, ids and -1 for padding -> their `Losses`, added up.

        `first_row` is the first one's first sequence's place in the global batch. With `end_of_text` (an id) tokens
        attend within their document only. `whole`: for auxiliary losses over the whole batch.
        """
        layout, axes = self.layout, self.layout.axes("v")
        x_absd, stats = self._states(batch_abt, first_row, dropout_key, end_of_text, whole)
        with jax.named_scope("head"):
            nll = head.summed(self._nll, (self.final_norm, self.head_table), x_absd, batch_abt[..., 1:])
            return Losses(layout.total(nll, layout.token_axes + axes), stats)

    def scored(self, batch_abt: jax.Array, first_row: jax.Array, dropout_key, end_of_text: int | None) -> jax.Array:
        """`MoEStats.scored_e` of each of this stage's layers, summed over micro-batches; the arguments of `losses`."""
        _, stats = self._states(batch_abt, first_row, dropout_key, end_of_text, None)
        return stats.load_e if stats.scored_e is None else stats.scored_e

    def _states(self, batch_abt, first_row, dropout_key, end_of_text, whole) -> tuple[jax.Array, MoEStats]:
        """What leaves the last layer [a, b, s, D], and the sums of `Losses.stats`."""
        layout, (count, b) = self.layout, batch_abt.shape[:2]
        tokens_abs, real_abs = jnp.maximum(batch_abt[..., :-1], 0), batch_abt[..., :-1] >= 0
        length_ab = jnp.sum(real_abs, axis=-1, dtype=jnp.int32)
        # Means are over what is no padding, on all devices.
        wide = jnp.promote_types(self.model.dtype, jnp.float32)
        counts_2a = jnp.stack([jnp.sum(of, axis=1, dtype=jnp.int32) for of in (length_ab, length_ab > 0)])
        counts_2a = jnp.maximum(collectives.total(counts_2a, layout.axes("b")), 1).astype(wide)

        def embedded(number):
            with jax.named_scope("embedding"):
                return self.embedding(tokens_abs[number], self.model.dtype)

        # Taken apart here, once: a pipeline would keep what it makes of the weights for each micro-batch.
        taken = (lambda block: block) if self.model.scan_layers else unstack
        blocks = {name: taken(block) for name, block in self.segments.items()}

        def layers(x_bsd, number):
            tokens = Tokens(
                documents(tokens_abs[number], end_of_text),
                self._numbers(first_row + number * (b * layout.ways("b")), b, tokens_abs.shape[-1]),
                layout.own(real_abs[number], layout.axes("s")),
                length_ab[number],
                counts_2a[0, number] if whole is None else whole.count,
                counts_2a[1, number],
            )
            return self._layers(blocks, x_bsd, tokens, dropout_key, whole and whole.scored_le)

        return pipelined(embedded, layers, count, layout.axes("l"))

    def _numbers(self, first_row: jax.Array, rows: int, length: int) -> jax.Array:
        """The number of each of this device's tokens in the global batch."""
        layout = self.layout
        own = length // layout.ways("s")
        row_b = first_row + collectives.index(layout.axes("b")) * rows + jnp.arange(rows)
        column_s = collectives.index(layout.axes("s")) * own + jnp.arange(own)
        return collectives.vary(row_b[:, None] * length + column_s)

    def _layers(self, blocks: dict, x_bsd: jax.Array, tokens: Tokens, dropout_key, scored_le: jax.Array | None):
        """This device's layers: [b, s, D] -> [b, s, D] and the `MoEStats` of those that have experts.

        `blocks` of each segment are stacked, or a list.
        """
        layout = self.layout

        def block(x_bsd, layer):
            block, number, scored_e = layer
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
            return block.train(x_bsd, tokens, key, scored_e)

        block, statistics = rematerialised(block, self.model, layout), []
        for segment in segments(self.model):
            own = segment.layers // layout.ways("l")
            numbers = segment.first + collectives.index(layout.axes("l")) * own + jnp.arange(own)
            of_batch = scored_le if segment.feed_forward == "moe" else None
            x_bsd, found = self._segment(block, x_bsd, blocks[segment.feed_forward], numbers, of_batch)
            statistics += [] if found is None else [found]
        return x_bsd, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *statistics)

    def _segment(self, block: Callable, x_bsd: jax.Array, blocks, numbers: jax.Array, scored_le: jax.Array | None):
        """One segment's layers, the first dimension of their statistics."""
        if self.model.scan_layers:
            return lax.scan(block, x_bsd, (blocks, numbers, scored_le))
        layers = []
        for at, one in enumerate(blocks):
            if self.layout.ways("w") > 1:
                # Else XLA gathers all layers' weights before the loop over micro-batches, and keeps them.
                x_bsd, one = lax.optimization_barrier((x_bsd, one))
            x_bsd, found = block(x_bsd, (one, numbers[at], None if scored_le is None else scored_le[at]))
            layers.append(found)
        return x_bsd, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    @property
    def blocks(self) -> list[tuple[int, Block]]:
        """This stage's layers in order, each with its number in its segment; of a model whose layers are apart."""
        return [at for segment in segments(self.model) for at in enumerate(self.segments[segment.feed_forward])]

    def infer(self, x_bsd: jax.Array, real_bs: jax.Array, attend: Callable, kept: list):
        """All layers for inference: [b, s, D] -> [b, s, D], and what the attention of each of this stage's keeps.

        Of a model whose layers are apart, with the experts' weights of all of a segment's in each; the arguments are
        those of `Block.infer`, `kept` for each layer.
        """

        def layers(x_bsd, kept):
            new = []
            for (number, block), before in zip(self.blocks, kept, strict=True):
                x_bsd, after = block.infer(x_bsd, real_bs, number, attend, before)
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
            table_vd = self.head_table
            block = head.block_of(table_vd.shape[0], layout.platform)
            found_t = head.log_probabilities(x_td, table_vd, targets_t, self.ids, axes, block)
            return layout.own(found_t.reshape(x_bsd.shape[:2]), axes)

    def _nll(self, weights, x_bsd: jax.Array, targets_bs: jax.Array) -> jax.Array:
        """This device's share of a micro-batch's cross-entropy, with the final norm and the head's table as given."""
        final_norm, table_vd = weights
        layout, axes = self.layout, self.layout.axes("v")
        x_bsd = layout.join(final_norm(x_bsd), axes)
        targets_t = layout.join_ids(targets_bs, axes).ravel()
        x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
        block = head.block_of(table_vd.shape[0], layout.platform)
        return head.cross_entropy(x_td, table_vd, targets_t, self.ids, axes, block)
