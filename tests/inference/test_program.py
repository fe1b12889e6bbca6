"""Prefill and decoding give what the dense model gives, token by token, under every layout.

The log-probability of a token holds the scores of all. In float64 they agree to 1e-9 and so the same tokens are drawn;
float32 is compared along one path, on numbers that leave a gap at every choice of experts.
"""

import functools
from dataclasses import replace

import jax
import numpy as np
import oracle
import pytest
from completions import GREEDY, SAMPLED, buffers, completed, generator, parameters, prompts, scored
from programs import END_OF_TEXT
from small import MA_IN_STAGES, config, named

from maxsep.inference.generate import Batch
from maxsep.measure.communication import sent
from maxsep.parallel.mesh import make_mesh

GAP = 1e-5
LIMITS = [12, 1, 9, 12, 5]  # new tokens of each prompt
LONGEST = 24  # prompt and new tokens
ONE_DOCUMENT = {"cross_document_attention": False}
CAPACITY = {"capacity_factor": 1.0, "capacity_group": 4}

MODELS = {
    "plain": ({}, {}),
    "shared heads, documents": ({"kv_heads": 2, "qk_norm": "all", "clip_qkv": 1.0}, ONE_DOCUMENT),
    "capacity, tied, gelu, k 3": (
        {
            "tied_embedding": True,
            "activation": "gelu",
            "top_k": 3,
            "qk_norm": "head",
            "normalize_top_k": False,
            **CAPACITY,
        },
        {},
    ),
    "shared heads, documents, capacity, tied, gelu, k 3, a dense layer, all of a router": (
        {
            "router_score": "sigmoid",
            "router_bias_rate": 0.01,
            "router_groups": 4,
            "router_top_groups": 2,
            "router_scale": 1.5,
            "shared_experts": 2,
            "shared_gate": True,
            "dense_layers": 1,
            "dense_d_ff": 48,
            "kv_heads": 2,
            "qk_norm": "all",
            "clip_qkv": 1.0,
            "tied_embedding": True,
            "activation": "gelu",
            "top_k": 3,
            "normalize_top_k": False,
            **CAPACITY,
        },
        ONE_DOCUMENT,
    ),
    "two dense layers": ({"layers": 3, "dense_layers": 2, "dense_d_ff": 64}, {}),
    "a bias, shared experts": ({"router_bias_rate": 0.01, "shared_experts": 1}, {}),
    "four layers, own heads": ({"layers": 4, "kv_heads": 4, "vocab_size": 256}, ONE_DOCUMENT),
}
COMBINED = "shared heads, documents, capacity, tied, gelu, k 3, a dense layer, all of a router"
FAST = [("ma", (1, 1), COMBINED), ("ma", (4, 4), COMBINED)]
SLOW = [
    ("tp_pp", (2, 8, 1), "shared heads, documents"),
    ("tp", (8, 2), "two dense layers"),
    ("ma_folded", (4, 4), COMBINED),
    ("pp", (4, 1, 4), "four layers, own heads"),
    ("zero", (2, 2, 4), "two dense layers"),
    ("pp", (2, 1, 8), "a bias, shared experts"),
    ("l=stage b=expert h=attention", (2, 2, 4), "shared heads, documents"),
]
EXHAUSTIVE = [
    ("ma", (1, 1), "shared heads, documents"),
    ("ma", (4, 4), "capacity, tied, gelu, k 3"),
    ("ma", (2, 8), "shared heads, documents"),
    ("ma", (1, 16), "plain"),
    ("tp", (8, 2), "capacity, tied, gelu, k 3"),
    ("ma", (16, 1), "four layers, own heads"),
    (MA_IN_STAGES, (2, 4, 2), "four layers, own heads"),
]


def of(layout, mesh, model, **changed):
    stages = mesh[0] if len(mesh) == 3 and layout != "zero" else 1
    fields, data = MODELS[model]
    train = {"batch_size": 16 * stages, "accumulation": stages}
    return config(mesh, layout, model={"dtype": "float64", **fields, **changed}, data=data, train=train)


@functools.cache
def alone(model, sampling):
    c = of("ma", (1, 1), model)
    return completed(c, parameters(c), prompts(c), LIMITS, sampling)


def dense(c, params, texts):
    """Scores [b, s, V] of the token after each of `texts`, log-probabilities, the least gap between experts' scores."""
    ids = np.zeros((len(texts), LONGEST), int)  # nothing that comes after a token changes what it gets
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    end = None if c.data.cross_document_attention else END_OF_TEXT
    model = replace(c.model, capacity_factor=None, capacity_group=None)
    (bias_le,) = jax.tree.leaves(buffers(c)) or [None]
    with jax.enable_x64(True):
        of_ids = functools.partial(oracle.model_scores, tokens=ids, model=model, end_of_text=end, bias_le=bias_le)
        scores, _, _, gap = jax.jit(of_ids)(params)
        return np.asarray(scores), np.asarray(jax.nn.log_softmax(scores)), float(gap)


def ids_of(completion):
    return completion.tokens + [END_OF_TEXT] * completion.ended


def cases():
    def case(layout, mesh, model, sampling, *marks):
        name = f"{layout} {named(mesh)}, {model}, {'greedy' if sampling is GREEDY else 'sampled'}"
        return pytest.param(layout, mesh, model, sampling, marks=marks, id=name)

    for one in FAST:
        yield case(*one, SAMPLED)
    for one in SLOW:
        yield case(*one, SAMPLED, pytest.mark.slow)
    for one in EXHAUSTIVE:
        yield case(*one, SAMPLED, pytest.mark.exhaustive)
    for one in FAST + SLOW + EXHAUSTIVE:
        yield case(*one, GREEDY, pytest.mark.slow if one == SLOW[1] else pytest.mark.exhaustive)


@pytest.mark.parametrize(("layout", "mesh", "model", "sampling"), list(cases()))
def test_the_dense_model_has_these_probabilities_and_one_device_these_tokens(layout, mesh, model, sampling):
    c = of(layout, mesh, model)
    params, given = parameters(c), prompts(c)
    found = completed(c, params, given, LIMITS, sampling)
    _, log_p, _ = dense(c, params, [prompt + of.tokens for prompt, of in zip(given, found, strict=True)])
    for row, (completion, expected) in enumerate(zip(found, alone(model, sampling), strict=True)):
        prompt, limit = given[row], LIMITS[row]
        assert ids_of(completion) == ids_of(expected)
        assert completion.count == len(ids_of(completion)) <= limit
        assert completion.ended or completion.count == limit
        for at, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
            of_next = log_p[row, len(prompt) - 1 + at]
            assert logprob == pytest.approx(of_next[token], rel=1e-9, abs=1e-9)
            if sampling is GREEDY:
                assert token == of_next.argmax()


# In the fast suite huggingface/test_golden.py compares a batch of prompts with transformers.
@pytest.mark.parametrize(
    "mesh",
    [pytest.param((1, 1), marks=pytest.mark.slow), pytest.param((4, 4), marks=pytest.mark.exhaustive)],
    ids=named,
)
def test_a_prompt_alone_has_the_tokens_that_it_has_in_a_batch(mesh):
    c, number = of("ma", mesh, COMBINED), 3
    together, given = alone(COMBINED, SAMPLED)[number], prompts(c)[number]
    (found,) = completed(c, parameters(c), [given], [LIMITS[number]], SAMPLED, first_number=number)
    assert ids_of(found) == ids_of(together)
    assert found.logprobs == pytest.approx(together.logprobs, rel=1e-12)


@pytest.mark.slow  # the fast suite compares float32 with transformers, in huggingface/test_golden.py
@pytest.mark.parametrize("mesh", [(1, 1), (4, 4)], ids=named)
def test_float32_differs_by_rounding(mesh):
    c = of("ma", mesh, "plain", dtype="float32")
    params, given = parameters(c), prompts(c)
    params = jax.tree.map(lambda x: x.astype(np.float32).astype(np.float64), params)
    found = completed(c, params, given, LIMITS, GREEDY)
    scores, log_p, gap = dense(c, params, [prompt + of.tokens for prompt, of in zip(given, found, strict=True)])
    assert gap > GAP, "other weights are needed: here rounding may choose another expert"
    largest = np.abs(scores).max()
    for row, (prompt, completion) in enumerate(zip(given, found, strict=True)):
        for at, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
            place = row, len(prompt) - 1 + at
            assert abs(logprob - log_p[place][token]) < 1e-5 * largest
            assert scores[place].max() - scores[place][token] < 1e-5 * largest, "a token that was not among the best"


@pytest.mark.parametrize(
    ("layout", "mesh", "model"),
    [
        ("ma", (4, 4), "capacity, tied, gelu, k 3"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (SLOW[0], SLOW[-1])),
    ],
)
def test_scores_are_those_of_the_dense_model(layout, mesh, model):
    c = of(layout, mesh, model)
    params, given = parameters(c), prompts(c)
    _, log_p, _ = dense(c, params, given)
    for row, (ids, found) in enumerate(zip(given, scored(c, params, given, 3), strict=True)):
        expected = [log_p[row, at, token] for at, token in enumerate(ids[1:])]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_batch_of_one_reads_the_chosen_experts_alone():
    """The weights of all experts that no token chose are NaN."""
    c = of("ma", (1, 1), "plain", layers=1)
    params, prompt = parameters(c), [5]
    whole = completed(c, params, [prompt], [2], GREEDY)[0]
    segment = params["segments"]["moe"]
    experts = segment["feed_forward"]["experts"]

    def with_nan(chosen):
        def spoilt(w):
            w = np.array(w)
            w[:, [e for e in range(c.model.experts) if e not in chosen]] = np.nan
            return w

        moe = segment["feed_forward"] | {"experts": jax.tree.map(spoilt, experts)}
        spoilt_params = params | {"segments": {"moe": segment | {"feed_forward": moe}}}
        return completed(c, spoilt_params, [prompt], [2], GREEDY)[0]

    chosen = chosen_experts(c, params, prompt + whole.tokens[:1])
    assert len(chosen) < c.model.experts / 2
    assert with_nan(chosen).logprobs == pytest.approx(whole.logprobs, rel=1e-12)
    assert not np.isfinite(with_nan(chosen - {min(chosen)}).logprobs).all(), "what is read must matter"


def test_a_step_sends_tokens_and_no_weights():
    """On attention 4 x expert 4, of 16 rows, a row a device: all that a layer sends, in bytes a device."""
    c = of("ma", (4, 4), "plain")
    with jax.enable_x64(True), jax.set_mesh(make_mesh(c)):
        program = generator(c).program
        batch = Batch(program, prompts(c), LIMITS)
        weights = jax.eval_shape(program.weights, program.abstract)
        prefill = functools.partial(program.prefill, slots=batch.shape.slots, most=batch.shape.most)
        state = jax.eval_shape(prefill, weights, *batch.arrays, GREEDY)
        mesh = jax.sharding.get_mesh().abstract_mesh
        found = sent(program.decode, weights, state, GREEDY, np.int32(2), mesh=mesh)
    model, size = c.model, 8
    token = model.d_model * size
    assert batch.shape[0] == 16
    assert found["attention"] == model.layers * (token + 4 * token)  # to those that share the sequence, and their sums
    choices = model.top_k * (size + 4)
    assert found["dispatch"] == model.layers * (token + choices + 4 * token)  # to those that share the experts
    assert found.keys() == {"attention", "dispatch", "embedding, head", "statistics"}


def chosen_experts(c, params, ids) -> set[int]:
    """Of a model of one layer, by the dense model's own functions."""
    block, model = params["segments"]["moe"], c.model
    with jax.enable_x64(True):
        x = params["embedding"]["table_vd"][np.asarray(ids)]
        y = oracle.rms_norm(x, block["attention_norm"]["scale"][0], model.norm_eps)
        x = x + oracle.attention(y, np.zeros(len(ids), int), block["attention"], 0, model)
        y = oracle.rms_norm(x, block["feed_forward_norm"]["scale"][0], model.norm_eps)
        scores = np.asarray(y @ block["feed_forward"]["router"]["w_de"][0])
    return set(np.argsort(-scores, axis=1)[:, : model.top_k].ravel().tolist())
