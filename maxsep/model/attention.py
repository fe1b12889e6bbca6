"""Causal grouped-query attention, heads split by the layout's `h`.

What the rest of the program asks of an attention: `train`, `prefill` and `decode`, an empty cache, and how it is split.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from maxsep.config import ConfigError, ModelConfig
from maxsep.kernels import nvidia
from maxsep.model.blocked_attention import blocked_attention
from maxsep.model.kv_cache import KeysValues, Prompts, Window
from maxsep.model.layers import rotate
from maxsep.model.parameters import Parameters, use
from maxsep.model.qk_norm import QKNorm
from maxsep.parallel import collectives


class Attention(nnx.Module):
    """Projections and attention of one layer."""

    split = KeysValues("bh", "bh")  # the letters of a cache's first dimensions

    def __init__(self, parameters: Parameters, model: ModelConfig, kernel: str):
        D, width = model.d_model, model.heads * model.head_size
        self.wq_dhq = parameters.normal("dhq", D**-0.5)
        self.wk_dkq = parameters.normal("dkq", D**-0.5)
        self.wv_dkq = parameters.normal("dkq", D**-0.5)
        # Residual branches start small enough that 2 L of them add up to the scale of one (Radford et al. 2019).
        self.wo_hqd = parameters.normal("hqd", (width * 2 * model.layers) ** -0.5)
        if model.qk_norm != "none":
            self.q_norm, self.k_norm = (QKNorm(parameters, model, letter) for letter in "hk")
        self.layout, self.kernel, self.theta = parameters.layout, kernel, model.rope_theta
        self.normed, self.limit = model.qk_norm != "none", model.clip_qkv
        self.group = model.heads // model.n_kv_heads  # query heads that share a key/value head
        # Key/value heads that a device keeps: those that its query heads need, some of which others may keep too.
        heads = max(1, model.heads // self.layout.ways("h") // self.group)
        self.kept = heads, model.head_size, model.dtype

    def train(self, x_bsd: jax.Array, segments_bs: jax.Array | None) -> jax.Array:
        """[b, s, D] -> [b, s, D]. `segments_bs` [b, S] numbers documents; None: attend across them."""
        return self._whole(x_bsd, segments_bs)[0]

    def prefill(self, x_bsd: jax.Array, prompts: Prompts) -> tuple[jax.Array, KeysValues]:
        """As `train`, of prompts; also a cache with the keys and values of the heads that this device has."""
        y_bsd, k_bskq, v_bskq = self._whole(x_bsd, prompts.segments_bs)
        return y_bsd, KeysValues.of_prompts(prompts, k_bskq, v_bskq)

    def empty(self, rows: int, slots: int) -> KeysValues:
        """A cache of this device's heads, of so many sequences."""
        heads, size, dtype = self.kept
        zeros = jnp.zeros((rows, heads, slots, size), dtype)
        return KeysValues(zeros, zeros)

    def _whole(self, x_bsd: jax.Array, segments_bs: jax.Array | None):
        """What attention makes of whole sequences, and their keys and values [b, S, k, q]."""
        q_bshq, k_bskq, v_bskq = self._heads(x_bsd)
        if self.kernel == "cudnn":
            y_bshq = fused_attention(q_bshq, k_bskq, v_bskq, segments_bs)
        else:
            y_bshq = blocked_attention(q_bshq, k_bskq, v_bskq, segments_bs, in_turns=self.layout.platform == "cpu")
        return self._out(y_bshq), k_bskq, v_bskq

    def decode(self, x_b1d: jax.Array, cache: KeysValues, slot: jax.Array, window: Window):
        """One token of each sequence, [b, 1, D] -> [b, 1, D], and the cache with its keys and values in `slot`."""
        position_b1 = (slot - window.pad_b)[:, None]
        q_b1hq, k_b1kq, v_b1kq = self._heads(x_b1d, position_b1)
        y_b1hq = cached_attention(q_b1hq, k_b1kq, v_b1kq, cache, slot, window.first_b)
        # Written after it was read, in place; in no order XLA would copy the whole cache.
        y_b1hq, k_b1kq, v_b1kq = lax.optimization_barrier((y_b1hq, k_b1kq, v_b1kq))
        return self._out(y_b1hq), cache.put(slot, k_b1kq, v_b1kq)

    def _heads(self, x_bsd: jax.Array, position_bs: jax.Array | None = None):
        """Queries, keys and values of this device's heads, of whole sequences."""
        dtype = x_bsd.dtype
        x_bsd = self.layout.join(x_bsd, self.layout.axes("h"))
        wq = use(self.wq_dhq, dtype)
        wk, wv = (self._own_heads(use(w, dtype), wq.shape[1], 1) for w in (self.wk_dkq, self.wv_dkq))
        q_bshq = jnp.einsum("bsd,dhq->bshq", x_bsd, wq)
        k_bskq, v_bskq = (jnp.einsum("bsd,dkq->bskq", x_bsd, w) for w in (wk, wv))
        if self.normed:
            q_bshq = self.q_norm(q_bshq)
            k_bskq = self.k_norm(k_bskq, lambda scale: self._own_heads(scale, wq.shape[1], 0))
        if self.limit is not None:
            q_bshq, k_bskq, v_bskq = (jnp.clip(x, -self.limit, self.limit) for x in (q_bshq, k_bskq, v_bskq))
        return rotate(q_bshq, self.theta, position_bs), rotate(k_bskq, self.theta, position_bs), v_bskq

    def _out(self, y_bshq: jax.Array) -> jax.Array:
        wo = use(self.wo_hqd, y_bshq.dtype)
        return self.layout.part(jnp.einsum("bshq,hqd->bsd", y_bshq, wo), self.layout.axes("h"))

    def _own_heads(self, w: jax.Array, queries: int, dim: int) -> jax.Array:
        """Of weights of key/value heads, in dimension `dim`, those that this device's `queries` query heads need."""
        if self.layout.ways("k") == self.layout.ways("h"):
            return w
        # Fewer queries than a group share one head.
        first = collectives.index(self.layout.axes("h")) * queries // self.group
        return lax.dynamic_slice_in_dim(w, first, max(1, queries // self.group), axis=dim)


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


def fused_attention(q_bshq, k_bskq, v_bskq, segments_bs):
    """cuDNN's flash attention (bfloat16 on an NVIDIA GPU)."""
    mask = None
    if segments_bs is not None:
        mask = (segments_bs[:, :, None] == segments_bs[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_bshq, k_bskq, v_bskq, mask=mask, is_causal=True, implementation="cudnn")


def cached_attention(q_b1hq, k_b1kq, v_b1kq, cache: KeysValues, slot: jax.Array, first_b: jax.Array) -> jax.Array:
    """One token of each sequence attends to itself and to the slots from its sequence's first to that before `slot`.

    Its own key and value come beside the cache: were it read after they are put there, XLA would write all of it anew.
    """
    b, _, h, q = q_b1hq.shape
    kv, slots = cache.k_bktq.shape[1:3]
    wide = jnp.promote_types(q_b1hq.dtype, jnp.float32)
    q_bkgq = (q_b1hq * q**-0.5).reshape(b, kv, h // kv, q)
    scores = jnp.einsum("bkgq,bktq->bkgt", q_bkgq, cache.k_bktq, preferred_element_type=wide)
    slot_t = jnp.arange(slots)
    visible = (slot_t >= first_b[:, None]) & (slot_t < slot)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)
    own = jnp.einsum("bkgq,bkq->bkg", q_bkgq, k_b1kq[:, 0], preferred_element_type=wide)[..., None]
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own)
    p, p_own = jnp.exp(scores - top), jnp.exp(own - top)
    y = jnp.einsum("bkgt,bktq->bkgq", p.astype(q_b1hq.dtype), cache.v_bktq, preferred_element_type=wide)
    y = (y + p_own * v_b1kq.swapaxes(1, 2)) / (jnp.sum(p, axis=-1, keepdims=True) + p_own)
    return y.reshape(b, 1, h, q).astype(q_b1hq.dtype)
