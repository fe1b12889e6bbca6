"""Dispatch: bring each token to its experts' devices and the results back.

Two forms, one signature: `with_capacity` gives every expert a fixed number of places and drops what does not fit;
`dropless` drops nothing. Both move rows by gathers in both directions (the gradient of a gather whose inverse is known
is a gather), never through tensors of tokens × experts × capacity. The router's weights go with the rows: they are
multiplied before an expert's last product, so their gradient needs nothing that comes back, and rematerialisation
neither computes nor sends that again.

A *choice* is one of the T × N (token, expert) pairs, numbered token by token, a token's best expert first. One whose
expert is the number of experts is of padding: it goes nowhere, and its result is zero.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from maxsep.model.experts import Experts
from maxsep.parallel import collectives
from maxsep.parallel.collectives import Axes
from maxsep.parallel.rounds import in_rounds


def capacity_of(tokens: int, top_k: int, experts: int, capacity_factor: float) -> int:
    """Places an expert has for a group of `tokens` tokens: ceil(tokens × top_k / experts × capacity_factor).

    At least one, and at most `tokens`: a token chooses an expert once.
    """
    # Rounded, as in floats 1.1 × 10 is a little over 11 and would make 12 places.
    return min(tokens, max(1, math.ceil(round(tokens * top_k * capacity_factor / experts, 9))))


def with_capacity(
    x_td: jax.Array,
    ids_tn: jax.Array,
    weights_tn: jax.Array,
    experts: Experts,
    n_experts: int,
    axes: Axes,
    factor: float,
    group: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Results [T, N, D] of each choice, times its weight, and the number of dropped choices (int32) on this device.

    Within a group of `group` consecutive tokens (None: all of this device's) an expert has `capacity_of` places, given
    in the order of choices. A dropped choice's result is zero.
    """
    tokens, top_n = ids_tn.shape
    groups = tokens // (group or tokens)
    choices = tokens // groups * top_n  # in a group
    capacity = capacity_of(tokens // groups, top_n, n_experts, factor)

    ids_gn = ids_tn.reshape(groups, choices)
    order_gn, rank_gn, count_ge = _sort(ids_gn, n_experts)
    until_ge = jnp.cumsum(count_ge, axis=1)
    start_ge = until_ge - count_ge

    # Place c of expert e in group g holds the c-th of the group's choices of e.
    place_c = jnp.arange(capacity)
    at_gec = jnp.minimum(start_ge[:, :, None] + place_c, choices - 1).reshape(groups, -1)
    choice_gec = jnp.take_along_axis(order_gn, at_gec, axis=1).reshape(groups, n_experts, capacity)
    choice_gec += jnp.arange(groups)[:, None, None] * choices
    empty = tokens * top_n
    choice_egc = jnp.where(place_c < count_ge[:, :, None], choice_gec, empty).swapaxes(0, 1)

    place_gn = rank_gn - jnp.take_along_axis(start_ge, ids_gn, axis=1, mode="clip")
    real_gn = rank_gn < until_ge[:, -1:]  # padding is sorted to the end
    kept_gn = real_gn & (place_gn < capacity)
    slot_gn = (ids_gn * groups + jnp.arange(groups)[:, None]) * capacity + place_gn
    slot_tn = jnp.where(kept_gn, slot_gn, choice_egc.size).reshape(tokens, top_n)

    rows = _spread(x_td, choice_egc.ravel(), slot_tn).reshape(n_experts, groups * capacity, -1)
    rows = collectives.exchange(rows, axes, split=0, concat=1)
    shares = _permute(weights_tn.ravel(), choice_egc.ravel(), slot_tn.ravel()).reshape(n_experts, -1)
    shares = collectives.exchange(shares, axes, split=0, concat=1)
    rows = experts.padded(rows, shares)
    rows = collectives.exchange(rows, axes, split=1, concat=0)
    y_tnd = _permute(rows.reshape(choice_egc.size, -1), slot_tn.ravel(), choice_egc.ravel())
    return y_tnd.reshape(tokens, top_n, -1), jnp.sum(real_gn & ~kept_gn, dtype=jnp.int32)


def dropless(
    x_td: jax.Array,
    ids_tn: jax.Array,
    weights_tn: jax.Array,
    experts: Experts,
    n_experts: int,
    axes: Axes,
    factor: float,
) -> tuple[jax.Array, jax.Array]:
    """Results [T, N, D] of each choice, times its weight, and the number of rounds (int32); none is dropped.

    In a round a device sends each other one at most `room_of` rows; what does not fit goes in further rounds. The
    experts compute only what came.
    """
    tokens, top_n = ids_tn.shape
    peers = collectives.size(axes)
    local = n_experts // peers  # experts on a device
    order, rank, count_e = (a[0] for a in _sort(ids_tn.reshape(1, -1), n_experts))
    one = jnp.ones((), jnp.int32)
    product, matrices = experts.grouped(x_td.dtype)
    if peers == 1:
        rank = jnp.where(rank < jnp.sum(count_e), rank, rank.size)  # padding is sorted to the end
        shares = _permute(weights_tn.ravel(), order, rank)
        rows = product(_spread(x_td, order, rank.reshape(tokens, top_n)), shares, count_e, matrices)
        return _permute(rows, rank, order).reshape(tokens, top_n, -1), one

    room = room_of(tokens, top_n, local, peers, factor)
    # To peer p go the choices of its experts, which the sort has made neighbours.
    sent_p = count_e.reshape(peers, local).sum(axis=1)
    came_pe = collectives.exchange(count_e, axes, split=0, concat=0).reshape(peers, local)
    plan = ids_tn, order, rank, sent_p, came_pe

    def round(number, operands, plan):
        """What comes of the choices that go in this round; zeros for the others."""
        x_td, weights_tn, matrices = operands
        ids_tn, order, rank, sent_p, came_pe = plan
        start_p = jnp.cumsum(sent_p) - sent_p
        place_r = number * room + jnp.arange(room)
        at_pr = jnp.minimum(start_p[:, None] + place_r, order.size - 1)
        choice_pr = jnp.where(place_r < sent_p[:, None], order[at_pr], order.size)
        peer_n = ids_tn.ravel() // local  # of padding one that there is not, whose slots are past the end
        place_n = rank - start_p[peer_n] - number * room
        slot_n = jnp.where((place_n >= 0) & (place_n < room), peer_n * room + place_n, choice_pr.size)

        rows = _spread(x_td, choice_pr.ravel(), slot_n.reshape(ids_tn.shape))
        rows = collectives.exchange(rows, axes, split=0, concat=0)
        shares = _permute(weights_tn.ravel(), choice_pr.ravel(), slot_n)
        shares = collectives.exchange(shares, axes, split=0, concat=0)

        # Rows came as [peer, expert]; the experts want them as [expert, peer].
        until_pe = jnp.clip(jnp.cumsum(came_pe, axis=1) - number * room, 0, room)
        now_pe = jnp.diff(until_pe, axis=1, prepend=0)
        from_pe = until_pe - now_pe + jnp.arange(peers)[:, None] * room
        to_ep = (jnp.cumsum(now_pe.T.ravel()) - now_pe.T.ravel()).reshape(local, peers)
        came_at, sorted_at = _regroup(from_pe, to_ep.T, now_pe, peers * room)
        rows, shares = (_permute(of, came_at, sorted_at) for of in (rows, shares))
        rows = product(rows, shares, now_pe.sum(axis=0), matrices)
        rows = _permute(rows, sorted_at, came_at)

        rows = collectives.exchange(rows, axes, split=0, concat=0)
        return _permute(rows, slot_n, choice_pr.ravel()).reshape(tokens, top_n, -1)

    operands = x_td, weights_tn, matrices
    if room == tokens * min(top_n, local):  # the most that there can be
        return round(0, operands, plan), one
    rounds = jnp.maximum(1, collectives.largest(jnp.max((sent_p + room - 1) // room), axes))
    return in_rounds(round, rounds, operands, plan), rounds


def room_of(tokens: int, top_n: int, local: int, peers: int, factor: float) -> int:
    """Rows that a device may send another in a round: ceil(tokens × top_n / peers × factor).

    At most what it can ever want to send one that has `local` experts.
    """
    return min(tokens * min(top_n, local), math.ceil(round(tokens * top_n * factor / peers, 9)))


def at_home(x_td: jax.Array, ids_tn: jax.Array, experts: Experts, axes: Axes, layer: int) -> jax.Array:
    """Results [T, N, D] of the choices of this device's experts, zeros for the others: nothing is sent.

    For inference; `experts` has the weights of all layers of the segment, [l, E, ...].
    """
    local = experts.w_in_edf.shape[1]
    ids_tn = ids_tn - collectives.index(axes) * local
    mine_tn = (ids_tn >= 0) & (ids_tn < local)
    order, rank, count_e = (a[0] for a in _sort(jnp.where(mine_tn, ids_tn, local).reshape(1, -1), local + 1))
    rows = experts.used(_take(x_td, order // ids_tn.shape[1]), count_e[:local], layer)
    return _take(rows, jnp.where(mine_tn, rank.reshape(ids_tn.shape), order.size))


def _sort(ids_gn: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sort each group's choices by expert, keeping their order within one.

    Those of padding come last. Returns order_gn (which choice is at a rank), rank_gn (its inverse) and count_ge.
    """
    groups, n = ids_gn.shape
    assert n * (n_experts + 1) < 2**31, "the config's checks bound the sort's keys"
    choice_n = jnp.arange(n, dtype=jnp.int32)
    # One key holds both expert and place: a single-operand sort is the fastest there is, and needs no stability.
    order_gn = lax.sort(ids_gn * n + choice_n, dimension=1) % n
    group_g1 = jnp.arange(groups)[:, None]
    rank_gn = (
        jnp.zeros_like(order_gn)
        .at[group_g1, order_gn]
        .set(jnp.broadcast_to(choice_n, order_gn.shape), unique_indices=True)
    )
    count_ge = jnp.sum(ids_gn[:, :, None] == jnp.arange(n_experts), axis=1, dtype=jnp.int32)
    return order_gn, rank_gn, count_ge


def _regroup(from_pe: jax.Array, to_pe: jax.Array, count_pe: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Move runs of rows: run (p, e) of `count_pe` rows starts at `from_pe` before and at `to_pe` after.

    Returns for each of `rows` rows after where it was before, and for each before where it is after; `rows` where there
    is none.
    """

    def sources(dst, src, count):
        by_start = jnp.argsort(dst * 2 + (count > 0))  # of runs that start together only the last is not empty
        dst, src, count = dst[by_start], src[by_start], count[by_start]
        at = jnp.arange(rows)
        # Of few runs all are compared at once, without a loop.
        run = jnp.searchsorted(dst, at, side="right", method="compare_all" if dst.size <= 64 else "scan") - 1
        inside = at - dst[run]
        return jnp.where(inside < count[run], src[run] + inside, rows)

    runs = from_pe.ravel(), to_pe.ravel(), count_pe.ravel()
    return sources(runs[1], runs[0], runs[2]), sources(*runs)


def _take(x_rd: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of `x_rd`; zeros where the index is past its end."""
    return jnp.take(x_rd, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _permute(x_rd: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Row i of the result is row source[i]; row j of `x_rd` goes to target[j]. Past the end means zeros, nowhere."""
    return _take(x_rd, source)


_permute.defvjp(
    lambda x_rd, source, target: (_take(x_rd, source), target),
    lambda target, g: (_take(g, target), None, None),
)


@jax.custom_vjp
def _spread(x_td: jax.Array, choice_r: jax.Array, slot_tn: jax.Array) -> jax.Array:
    """Row r of the result is the token of choice choice_r[r]; choice n of token t goes to row slot_tn[t, n]."""
    return _take(x_td, choice_r // slot_tn.shape[1])


def _spread_bwd(slot_tn, g_rd):
    return sum(_take(g_rd, slot_tn[:, n]) for n in range(slot_tn.shape[1])), None, None


_spread.defvjp(lambda x_td, choice_r, slot_tn: (_take(x_td, choice_r // slot_tn.shape[1]), slot_tn), _spread_bwd)
