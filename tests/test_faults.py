"""Faults planted in what devices add up and send: each is seen in the gradient or the figure that names it."""

import functools

import numpy as np
import pytest
from programs import first_step, leaves_differ, parameters
from small import config, text

from maxsep.certification.plants import (
    attention_gradients_summed_over_heads_too,
    embedding_gradients_summed_over_stages_twice,
    expert_gradients_not_summed,
    idle_ticks_counted,
    layers_of_a_stage_reversed,
    micro_batch_sent_twice,
    norm_counts_copies,
    stage_forgotten_in_the_order,
    statistic_counted_on_every_device,
)

EXACT = 1e-9
DROPS = {"capacity_factor": 1.0, "capacity_group": 4}


SEGMENT, TABLE = "['segments']['moe']", "['embedding']['table_vd']"
MOE, ATTENTION = f"{SEGMENT}['feed_forward']['experts']", f"{SEGMENT}['attention']"
FAULTS = {
    expert_gradients_not_summed: ("ma", {f"{MOE}['{w}_edf']" for w in ("w_in", "w_gate")} | {f"{MOE}['w_out_efd']"}),
    attention_gradients_summed_over_heads_too: ("ma", {f"{ATTENTION}['{w}_dkq']" for w in ("wk", "wv")}),
    norm_counts_copies: ("ma", {"grad_norm"}),
    statistic_counted_on_every_device: ("tp", {"dropped_l"}),
    idle_ticks_counted: ("pp", {"load_le", "dropped_l", "load_balancing_loss"}),
    stage_forgotten_in_the_order: ("pp", {"loss", "['head_vd']"}),
    layers_of_a_stage_reversed: ("pp", {"loss", f"{ATTENTION}['wq_dhq']"}),
    micro_batch_sent_twice: ("pp", {"loss", TABLE}),
    embedding_gradients_summed_over_stages_twice: ("pp", {"grad_norm", TABLE}),
}


def differing(c, expected) -> set[str]:
    """Gradients and figures of a first step that are not those of one device."""
    gradients, figures = first_step(c, *step_inputs(c))
    wrong = {name for name, share in leaves_differ(gradients, expected[0]).items() if share > EXACT}
    for name, value in expected[1].items():
        if name != "exchange_rounds" and not np.allclose(figures[name], value, rtol=EXACT, atol=0):
            wrong.add(name)
    return wrong


def fault_config(layout, alone=False):
    if layout == "pp":  # dropout shows which micro-batch a stage takes its own to be
        more = {"layers": 4, "expert_dropout": 0.1}, {"batch_size": 12, "accumulation": 3}, (2, 1, 2)
    else:
        more = {"layers": 1}, {}, (2, 2)
    model, train, mesh = more
    return config(
        (1, 1) if alone else mesh, "ma" if alone else layout, model={"dtype": "float64", **DROPS, **model}, train=train
    )


def step_inputs(c):
    return parameters(c), text(c, 1)[0]


@functools.cache
def one_device(c):
    return first_step(c, *step_inputs(c))


@pytest.mark.parametrize("layout", ["ma", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tp", "pp"))])
def test_without_a_fault_nothing_differs(layout):
    assert differing(fault_config(layout), one_device(fault_config(layout, alone=True))) == set()


SLOW = (norm_counts_copies, statistic_counted_on_every_device, idle_ticks_counted, micro_batch_sent_twice)


def faults():
    for fault in FAULTS:
        mark = pytest.mark.slow if fault in SLOW else pytest.mark.exhaustive
        yield pytest.param(fault, id=fault.__name__, marks=[] if fault is expert_gradients_not_summed else mark)


@pytest.mark.parametrize("fault", list(faults()))
def test_a_fault_is_seen(fault, monkeypatch):
    layout, shows = FAULTS[fault]
    expected = one_device(fault_config(layout, alone=True))
    fault(monkeypatch.setattr)
    assert shows <= differing(fault_config(layout), expected)
