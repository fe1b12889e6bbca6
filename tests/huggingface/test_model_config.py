"""A config.json is one of our models, or is refused by the field that makes it another; ours becomes one again."""

import json
import math
import re
from dataclasses import replace

import pytest
from conversion import GOLDEN, imported

from maxsep.config import ConfigError
from maxsep.config.files import load_config
from maxsep.config.paths import REPOSITORY
from maxsep.huggingface import model_config

MIXTRAL = load_config(str(REPOSITORY / "configs/mixtral_8x7b.py")).model


def edited(folder, file="config.json", **fields):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | fields))


CONFIGS = {
    "another architecture": (
        "mixtral",
        {"model_type": "llama"},
        r"model_type: got 'llama'; takes mixtral, qwen3_moe, o",
    ),
    "no architecture": ("mixtral", {"model_type": None}, r"model_type: got None"),
    "of a list": ("mixtral", {"model_type": []}, r"model_type: got \[\]"),
    "another head": (
        "mixtral",
        {"architectures": ["MixtralForSequenceClassification"]},
        r"architectures: got .*; takes M",
    ),
    "a sliding window": ("mixtral", {"sliding_window": 32}, r"sliding_window: got 32; takes null"),
    "a sliding window in Qwen3": (
        "qwen3_moe",
        {"use_sliding_window": True},
        r"use_sliding_window: got True; takes False",
    ),
    "long contexts": (
        "mixtral",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        r"rope_parameters\.rope_type: got 'yarn'; takes",
    ),
    "long contexts, as before": (
        "olmoe",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        r"rope_scaling\.type: got 'l",
    ),
    "part of a head turned": (
        "mixtral",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        r"rope_parameters\.partial_rotary_factor: got 0\.5",
    ),
    "two bases": ("olmoe", {"rope_theta": 5.0}, r"rope_parameters\.rope_theta and rope_theta: got \[10000\.0, 5\.0\]"),
    "shared experts": ("qwen3_moe", {"n_shared_experts": 1}, r"n_shared_experts: got 1; takes fields"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: got \[0\]; takes \[\]"),
    "every other layer dense": ("qwen3_moe", {"decoder_sparse_step": 2}, r"decoder_sparse_step: got 2; takes 1"),
    "biases": ("olmoe", {"attention_bias": True}, r"attention_bias: got True; takes False"),
    "another activation": ("mixtral", {"hidden_act": "gelu"}, r"hidden_act: got 'gelu'; takes 'silu'"),
    "dropout": ("mixtral", {"attention_dropout": 0.1}, r"attention_dropout: got 0\.1"),
    "noise": ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise: got 0\.1"),
    "quantised": ("mixtral", {"quantization_config": {"bits": 4}}, r"quantization_config: got \{'bits': 4\}"),
    "code of its own": ("mixtral", {"auto_map": {"AutoModelForCausalLM": "m.py"}}, r"auto_map: got"),
    "two numbers of experts": ("olmoe", {"num_local_experts": 3}, r"num_local_experts or num_experts: got"),
    "a size in words": ("mixtral", {"hidden_size": "16"}, r"hidden_size: got '16'; takes an integer from 1 to"),
    "any number of layers": (
        "mixtral",
        {"num_hidden_layers": 2**31 - 1},
        r"layers\.2\.input_layernorm\.weight is missing",
    ),
    "a size left out": ("mixtral", {"num_hidden_layers": None}, r"num_hidden_layers: got nothing; takes an integer"),
    "no number": ("mixtral", {"rms_norm_eps": float("nan")}, r"rms_norm_eps: got nan; takes a finite number"),
    "yes and no": ("mixtral", {"tie_word_embeddings": 1}, r"tie_word_embeddings: got 1; takes true or false"),
    "other shapes": ("mixtral", {"num_key_value_heads": 4}, r"k_proj\.weight is \[8, 16\]; takes \[16, 16\]"),
    "more layers": (
        "mixtral",
        {"num_hidden_layers": 3},
        r"safetensors to model-00004-.* is missing",
    ),
    "heads of odd size": ("mixtral", {"num_attention_heads": 16, "num_key_value_heads": 16}, r"k_proj|even number"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_not_ours(model, refused, what):
    family, fields, says = CONFIGS[what]
    folder = model(f"{family}_{'even' if family == 'mixtral' else 'odd'}")
    edited(folder, **fields)
    assert re.search(says, refused(folder))


ANYTHING = [None, True, 0, -1, 2, 1.5, "x", "", [], [1], ["a"], {}, {"a": 1}, 1e308, 2**70, 10**400, math.nan, math.inf]


@pytest.mark.parametrize("name", ["mixtral_even", "qwen3_moe_odd", "olmoe_odd"])
def test_whatever_a_field_holds_is_read_or_refused(name):
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    others = ("rope_scaling", "rope_theta", "num_experts", "num_local_experts", "head_dim", "sliding_window", "new")
    read = 0
    for changed in [{name: value} for name in (*fields, *others) for value in ANYTHING] + [
        {"rope_parameters": fields["rope_parameters"] | {name: value}}
        for name in ("rope_theta", "rope_type", "factor")
        for value in ANYTHING
    ]:
        try:
            model_config.read(fields | changed)
            read += 1
        except ConfigError as error:
            assert re.match(rf"\w*({next(iter(changed))}|experts|rope)\w*.*: got .*; takes ", str(error))
    assert read > 100


def test_harmless_fields_and_old_spellings(model, tmp_path):
    """As transformers 4 wrote them; a window that no text is longer than."""
    folder = model("mixtral_even")
    content = json.loads((folder / "config.json").read_text())
    del content["dtype"], content["rope_parameters"]
    content |= {"torch_dtype": "bfloat16", "rope_theta": 10_000.0, "rope_scaling": None, "sliding_window": 4096}
    content |= {"_name_or_path": "somewhere", "max_window_layers": 3, "a_field_of_tomorrow": None}
    (folder / "config.json").write_text(json.dumps(content))
    first, second = (imported(x, tmp_path / f"run{i}") for i, x in enumerate((GOLDEN / "mixtral_even", folder)))
    (a, b) = (json.loads((run / "config.json").read_text())["config"]["model"] for run in (first, second))
    assert a == b


def test_a_model_trained_here_has_the_family_that_it_is():
    for model, name in (
        (MIXTRAL, "mixtral"),
        (replace(MIXTRAL, qk_norm="head", normalize_top_k=False), "qwen3_moe"),
        (replace(MIXTRAL, qk_norm="all", clip_qkv=8.0), "olmoe"),
    ):
        family = model_config.family_of(model)
        assert family.name == name
        fields = model_config.write(family, model, 4096, 1, [2])
        again_family, again, context = model_config.read(fields)
        assert (again_family, context) == (family, 4096)
        same = {"dtype": model.dtype, "remat": model.remat, "mask_unused_ids": model.mask_unused_ids}
        assert replace(again, head_dim=None, **same) == model


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("activation", "gelu", {}),
        ("normalize_top_k", False, {}),
        ("clip_qkv", 8.0, {"qk_norm": "head"}),
        ("router_score", "sigmoid", {}),
        ("shared_experts", 1, {}),
        ("dense_layers", 1, {"dense_d_ff": 32}),
        ("head_dim", 64, {"qk_norm": "all"}),
    ],
)
def test_a_model_that_no_family_has_is_refused_by_its_field(field, value, others):
    with pytest.raises(ConfigError, match=rf"^model\.{field}: got {value!r}; takes "):
        model_config.family_of(replace(MIXTRAL, **others, **{field: value}))
