"""The MoE layer and the whole model as their definitions read: dense, in float64, sharing no code with the package.

`moe` loops over tokens and experts in NumPy, its gradient written by hand and checked by differences in test_oracle.py.
`model_loss` is the transformer on one device, every expert on every token, differentiated by JAX.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

erf = np.vectorize(math.erf)


def capacity(tokens: int, model) -> int:
    """ceil(tokens × top_k / experts × capacity_factor), in exact arithmetic."""
    return math.ceil(Fraction(tokens * model.top_k, model.experts) * Fraction(str(model.capacity_factor)))


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def expert_forward(x, w, e, activation):
    """One token [D] through expert e; returns the output [D] and what the gradient needs."""
    up = x @ w["in"][e]
    if activation == "swiglu":
        gate = x @ w["gate"][e]
        h = gate / (1 + np.exp(-gate)) * up
        return h @ w["out"][e], (gate, up, h)
    h = up * (1 + erf(up / math.sqrt(2))) / 2
    return h @ w["out"][e], (None, up, h)


def expert_backward(dy, x, w, dw, e, activation, saved):
    """Adds the weights' gradients to `dw`; returns the input's."""
    gate, up, h = saved
    dw["out"][e] += np.outer(h, dy)
    dh = w["out"][e] @ dy
    if activation == "swiglu":
        sigmoid = 1 / (1 + np.exp(-gate))
        dgate = dh * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        dup = dh * gate * sigmoid
        dw["gate"][e] += np.outer(x, dgate)
        dw["in"][e] += np.outer(x, dup)
        return w["gate"][e] @ dgate + w["in"][e] @ dup
    density = np.exp(-(up**2) / 2) / math.sqrt(2 * math.pi)
    dup = dh * ((1 + erf(up / math.sqrt(2))) / 2 + up * density)
    dw["in"][e] += np.outer(x, dup)
    return w["in"][e] @ dup


def moe(x_td, w, model, groups=(), mask_tnd=None, direction_td=None):
    """The MoE layer of all tokens, and the gradient of <output, direction> plus the two auxiliary losses.

    Args:
        x_td: tokens.
        w: weights `router` [D, E], `in`, `gate` (swiglu), `out` [E, ...].
        model: the `ModelConfig`.
        groups: token numbers of each group in which capacity counts; unused without a capacity factor.
        mask_tnd: what each chosen expert's output is multiplied by, before the weighted sum.
        direction_td: a linear functional of the output; None: no gradient.

    Returns: output [T, D]; dict of load_balancing, router_z, load_e, dropped; gradients of `x` and the weights by name.
    """
    tokens, _ = x_td.shape
    top_k, experts = model.top_k, model.experts
    scores = x_td @ w["router"]
    ids = np.array([sorted(range(experts), key=lambda e: (-scores[t, e], e))[:top_k] for t in range(tokens)])
    kept = np.ones((tokens, top_k), bool)
    if model.capacity_factor is not None:
        for group in groups:
            served = [0] * experts
            for t in group:
                for n in range(top_k):
                    kept[t, n] = served[ids[t, n]] < capacity(len(group), model)
                    served[ids[t, n]] += 1
    mask = np.ones((tokens, top_k, x_td.shape[1])) if mask_tnd is None else mask_tnd

    y = np.zeros_like(x_td)
    saved = {}
    weights = np.array([softmax(scores[t, ids[t]]) for t in range(tokens)])
    for t in range(tokens):
        for n in range(top_k):
            if kept[t, n]:
                out, hidden = expert_forward(x_td[t], w, ids[t, n], model.activation)
                saved[t, n] = out, hidden
                y[t] += weights[t, n] * mask[t, n] * out

    load = np.array([(ids == e).sum() for e in range(experts)])
    p = np.array([softmax(scores[t]) for t in range(tokens)])
    lse = np.array([scores[t].max() + np.log(np.exp(scores[t] - scores[t].max()).sum()) for t in range(tokens)])
    share = load / (tokens * top_k)
    stats = {
        "load_balancing": experts * (share * p.mean(axis=0)).sum(),
        "router_z": (lse**2).mean(),
        "load_e": load,
        "dropped": (~kept).sum(),
    }
    if direction_td is None:
        return y, stats, None

    dw = {name: np.zeros_like(value) for name, value in w.items()}
    dx = np.zeros_like(x_td)
    for t in range(tokens):
        # The auxiliary losses, at their coefficients.
        dp = model.load_balancing_coefficient * experts * share / tokens
        dscores = p[t] * (dp - p[t] @ dp) + model.router_z_coefficient * 2 * lse[t] * p[t] / tokens
        dweight = np.zeros(top_k)
        for n in range(top_k):
            if kept[t, n]:
                out, hidden = saved[t, n]
                dweight[n] = direction_td[t] @ (mask[t, n] * out)
                dout = weights[t, n] * mask[t, n] * direction_td[t]
                dx[t] += expert_backward(dout, x_td[t], w, dw, ids[t, n], model.activation, hidden)
        dscores[ids[t]] += weights[t] * (dweight - weights[t] @ dweight)
        dw["router"] += np.outer(x_td[t], dscores)
        dx[t] += w["router"] @ dscores
    return y, stats, {"x": dx, **dw}


def device_groups(rows: int, length: int, s_parts: int, b_parts: int, size: int | None) -> list[np.ndarray]:
    """Token numbers of each group: of each device's tokens, or of `size` consecutive ones of those.

    Devices have one of `s_parts` parts of each sequence, of one of `b_parts` parts of the batch.
    """
    numbers = np.arange(rows * length).reshape(b_parts, rows // b_parts, s_parts, length // s_parts)
    devices = [numbers[b, :, s].ravel() for b in range(b_parts) for s in range(s_parts)]
    return [group for device in devices for group in np.split(device, len(device) // (size or len(device)))]


# The whole model. `params` has the names and shapes of the package's parameters, which its checkpoints store.


def rms_norm(x, scale, eps):
    return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def rotary(x_shq, theta):
    """Rotation of the pair (i, i + Q/2) at position m by the angle m × theta^(-2i/Q), as complex numbers."""
    s, _, q = x_shq.shape
    angle = jnp.arange(s)[:, None] * theta ** (-2.0 * jnp.arange(q // 2) / q)
    pair = (x_shq[..., : q // 2] + 1j * x_shq[..., q // 2 :]) * jnp.exp(1j * angle)[:, None, :]
    return jnp.concatenate([pair.real, pair.imag], axis=-1)


def attention(x_sd, segment_s, w, layer, model):
    q, k, v = (jnp.einsum("sd,dhq->shq", x_sd, w[name][layer]) for name in ("wq_dhq", "wk_dkq", "wv_dkq"))
    if model.qk_norm != "none":
        q, k = (qk_norm(x, w[name]["scale"][layer], model.norm_eps) for x, name in ((q, "q_norm"), (k, "k_norm")))
    if model.clip_qkv is not None:
        q, k, v = (jnp.minimum(jnp.maximum(x, -model.clip_qkv), model.clip_qkv) for x in (q, k, v))
    q, k = rotary(q, model.rope_theta), rotary(k, model.rope_theta)
    return jnp.einsum("shq,hqd->sd", attend(q, k, v, segment_s), w["wo_hqd"][layer])


def qk_norm(x_shq, scale, eps):
    """Over as many numbers as there are scales: those of a head [Q], or of all heads [h, Q]."""
    s = x_shq.shape[0]
    return rms_norm(x_shq.reshape(s, -1, scale.size), scale.ravel(), eps).reshape(x_shq.shape)


def attend(q_shq, k_skq, v_skq, segment_s):
    """Causal attention of one sequence, head by head; query head h uses key/value head h // (H / K)."""
    s, heads, q = q_shq.shape
    visible = jnp.tril(jnp.ones((s, s), bool)) & (segment_s[:, None] == segment_s[None, :])
    kv_head = jnp.arange(heads) // (heads // k_skq.shape[1])

    def head(q_sq, k_sq, v_sq):
        scores = q_sq @ k_sq.T / math.sqrt(q)
        return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ v_sq

    return jax.vmap(head, in_axes=1, out_axes=1)(q_shq, k_skq[:, kv_head], v_skq[:, kv_head])


class Layer(NamedTuple):
    """What losses are made of, of one micro-batch; per sequence, without padding."""

    scored_be: jax.Array  # choices that the scores alone make
    probability_be: jax.Array  # sums of scores that sum to 1
    z_b: jax.Array  # sums of squared log-sum-exps
    tokens_b: jax.Array


def choices(score_e, model):
    """The experts of one token, of numbers that rank them: of the groups with the largest sums of their two best."""
    size = model.experts // model.router_groups
    best = [score_e[g * size : (g + 1) * size] for g in range(model.router_groups)]
    if model.router_groups > 1:
        sums = jnp.array([jnp.sort(group)[-2:].sum() for group in best])
        allowed = jnp.argsort(-sums, stable=True)[: model.router_top_groups]
        score_e = jnp.where(jnp.isin(jnp.arange(model.experts) // size, allowed), score_e, -jnp.inf)
    return jnp.argsort(-score_e, stable=True)[: model.top_k]


def gap_of(score_te, ids_tn, model):
    """The smallest difference between a token's last chosen expert and the best that it did not choose."""
    if model.top_k == model.experts or model.router_groups > 1:
        return jnp.inf
    ranked = jax.lax.stop_gradient(jnp.sort(score_te, axis=-1)[:, ::-1])
    return (ranked[:, model.top_k - 1] - ranked[:, model.top_k]).min()


def dense_moe(x_td, w, layer, model, groups, real_bs, bias_e):
    """Every expert on every token, weighted, and the shared ones; `Layer`; dropped choices; the smallest gap."""
    tokens = x_td.shape[0]
    real_t = real_bs.ravel()
    logits = x_td @ w["router"]["w_de"][layer]
    sigmoid = model.router_score == "sigmoid"
    scores = 1 / (1 + jnp.exp(-logits)) if sigmoid else jax.nn.softmax(logits, axis=-1)
    ranks = logits if not sigmoid and model.router_groups == 1 and not model.router_bias_rate else scores
    scored = jax.vmap(functools.partial(choices, model=model))(ranks)
    ids = jax.vmap(functools.partial(choices, model=model))(ranks + bias_e) if model.router_bias_rate else scored
    gap = gap_of(ranks + bias_e, ids, model)
    chosen_tne = (ids[..., None] == jnp.arange(model.experts)) & real_t[:, None, None]
    kept = jnp.broadcast_to(real_t[:, None], (tokens, model.top_k))
    if model.capacity_factor is not None:
        for group in groups:
            of_group = chosen_tne[np.asarray(group)].reshape(-1, model.experts)
            place = ((jnp.cumsum(of_group, axis=0) - of_group) * of_group).sum(axis=1)
            fits = (place < capacity(len(group), model)).reshape(-1, model.top_k)
            kept = kept.at[np.asarray(group)].set(fits & real_t[np.asarray(group), None])
    weight_tn = (scores[:, None] * (ids[..., None] == jnp.arange(model.experts))).sum(axis=-1)
    if model.normalize_top_k:
        weight_tn = weight_tn / weight_tn.sum(axis=-1, keepdims=True)
    weight_tn = weight_tn * model.router_scale
    weight_te = ((weight_tn * kept)[..., None] * chosen_tne).sum(axis=1)

    def expert(w_of):
        return feed_forward(x_td, w_of["w_in_edf"], w_of.get("w_gate_edf"), w_of["w_out_efd"])

    y_etd = jax.vmap(expert)({name: stacked[layer] for name, stacked in w["experts"].items()})
    y = (weight_te.T[..., None] * y_etd).sum(axis=0)
    if model.shared_experts:
        shared = mlp(x_td, w["shared"], layer, model)
        if model.shared_gate:
            shared = shared / (1 + jnp.exp(-(x_td @ w["shared_gate_d"][layer])))[:, None]
        y = y + shared

    def by_sequence(of_t):
        return (of_t * real_t.reshape(-1, *[1] * (of_t.ndim - 1))).reshape(*real_bs.shape, *of_t.shape[1:]).sum(axis=1)

    scored_te = (scored[..., None] == jnp.arange(model.experts)).sum(axis=1)
    probability = scores / scores.sum(axis=-1, keepdims=True)
    z_t = jax.nn.logsumexp(logits, axis=-1) ** 2
    sums = Layer(by_sequence(scored_te), by_sequence(probability), by_sequence(z_t), real_bs.sum(axis=1))
    return y, sums, real_t.sum() * model.top_k - kept.sum(), gap


def auxiliary(micro_batches: list[list[Layer]], model):
    """Both auxiliary losses of a step at their coefficients, of each micro-batch's layers."""
    total = 0.0
    for of_layer in zip(*micro_batches, strict=True):
        balancing, z = [], []
        if model.balance_over == "batch":
            of_layer = [Layer(*map(jnp.concatenate, zip(*of_layer, strict=True)))]
        for one in of_layer:
            count = one.tokens_b.sum()
            z.append(one.z_b.sum() / count)
            if model.balance_over == "sequence":
                length = jnp.maximum(one.tokens_b, 1)[:, None]
                each = (one.scored_be / (length * model.top_k) * one.probability_be / length).sum(axis=1)
                balancing.append(model.experts * each.sum() / (one.tokens_b > 0).sum())
            else:
                share = one.scored_be.sum(axis=0) / (count * model.top_k)
                balancing.append(model.experts * (share * one.probability_be.sum(axis=0) / count).sum())
        total += model.load_balancing_coefficient * sum(balancing) / len(balancing)
        total += model.router_z_coefficient * sum(z) / len(z)
    return total


def feed_forward(x_td, w_in, w_gate, w_out):
    """SwiGLU, or without `w_gate` GELU."""
    up = x_td @ w_in
    h = up * (1 + jax.scipy.special.erf(up / math.sqrt(2))) / 2 if w_gate is None else jax.nn.silu(x_td @ w_gate) * up
    return h @ w_out


def mlp(x_td, w, layer, model):
    w_gate = w["w_gate_dm"][layer] if model.activation == "swiglu" else None
    return feed_forward(x_td, w["w_in_dm"][layer], w_gate, w["w_out_md"][layer])


def model_scores(params, tokens, model, groups=(), end_of_text=None, real=None, bias_le=None):
    """Scores [b, s, V] of the next token after each of `tokens` [b, s], of the ids alone.

    Also a `Layer` for each that has experts, the dropped choices, and the smallest gap, as `model_loss`. `real` says
    which tokens are no padding; None: all.
    """
    layers, dropped, gap = [], 0, jnp.inf
    b, s = tokens.shape
    real = np.ones((b, s), bool) if real is None else real
    bias_le = np.zeros((model.layers, model.experts)) if bias_le is None else bias_le
    segments = np.zeros((b, s), int)
    if end_of_text is not None:
        for row in range(b):
            for i in range(1, s):
                segments[row, i] = segments[row, i - 1] + (tokens[row, i - 1] == end_of_text)
    x = params["embedding"]["table_vd"][tokens]
    for number in range(model.layers):
        kind, layer = ("dense", number) if number < model.dense_layers else ("moe", number - model.dense_layers)
        block = params["segments"][kind]
        w = block["attention"]
        y = rms_norm(x, block["attention_norm"]["scale"][layer], model.norm_eps)
        x = x + jax.vmap(functools.partial(attention, w=w, layer=layer, model=model))(y, segments)
        y = rms_norm(x, block["feed_forward_norm"]["scale"][layer], model.norm_eps).reshape(b * s, -1)
        if kind == "dense":
            x = x + mlp(y, block["feed_forward"], layer, model).reshape(b, s, -1)
            continue
        y, sums, lost, least = dense_moe(y, block["feed_forward"], layer, model, groups, real, bias_le[layer])
        layers.append(sums)
        dropped += lost
        gap = jnp.minimum(gap, least)
        x = x + y.reshape(b, s, -1)
    x = rms_norm(x, params["final_norm"]["scale"], model.norm_eps)
    table = params["embedding"]["table_vd"] if model.tied_embedding else params["head_vd"]
    return x @ table[: model.vocab_size].T, layers, dropped, gap


def model_loss(params, batch_abt, config, groups=(), end_of_text=None, bias_le=None):
    """Total loss of a step on records [accumulation, micro-batch, S + 1].

    Also the cross-entropy a token, the dropped choices, and the smallest gap between a token's k-th and next router
    score: where it is larger than rounding, another order of sums chooses the same experts.
    """
    total_nll, layers, dropped, gap = 0.0, [], 0, jnp.inf
    for batch_bt in np.asarray(batch_abt):
        tokens, targets = np.maximum(batch_bt[:, :-1], 0), batch_bt[:, 1:]
        real = batch_bt[:, :-1] >= 0
        scores, more, lost, least = model_scores(params, tokens, config.model, groups, end_of_text, real, bias_le)
        layers, dropped, gap = [*layers, more], dropped + lost, jnp.minimum(gap, least)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), np.maximum(targets, 0)[..., None], axis=-1)
        total_nll += jnp.where(targets >= 0, nll[..., 0], 0).sum()
    count = (np.asarray(batch_abt)[..., 1:] >= 0).sum()
    return total_nll / count + auxiliary(layers, config.model), (total_nll / count, dropped, gap)
