"""The schema: the configs in configs/ keep it, and each broken rule is named."""

import ast
import dataclasses
import json

import pytest

from maxsep.config import Config, ConfigError, ModelConfig, fields, files, from_config_dict, to_config_dict
from maxsep.config.matrices import parameters
from maxsep.config.paths import REPOSITORY
from maxsep.config.validate import tokenizer_ids, validate

CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))


def changed(values: dict, base: Config | None = None) -> Config:
    """A config with the fields at these paths replaced."""
    config_dict = to_config_dict(base or tiny())
    config_dict.update_from_flattened_dict(values)
    return from_config_dict(config_dict)


def tiny() -> Config:
    return files.load_config(str(CONFIGS[0].parent / "tiny.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid_and_survive_the_trip_through_their_views(path):
    config = files.load_config(str(path))
    validate(config)
    assert config.name == path.stem
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_every_field_is_explained():
    assert [field.path for field in fields() if not field.comment] == []


def test_fields_are_found_without_parsing(monkeypatch):
    """In Python 3.11 a parse may fail while the garbage collector prints a traceback."""
    expected = fields()
    monkeypatch.setattr(ast, "parse", None)
    fields.cache_clear()
    assert fields() == expected


def test_what_is_left_out_is_the_default():
    assert from_config_dict({"model": {"layers": 6}}) == Config(model=ModelConfig(layers=6))


def test_parameters():
    seed = files.load_config(str(CONFIGS[0].parent / "seed.py")).model
    assert parameters(seed) == 13_565_407_232
    attention, experts = 2 * 8 * 4 * (6 + 2), 3 * 2 * 8 * 5
    small = ModelConfig(layers=2, d_model=8, heads=6, kv_heads=2, head_dim=4, experts=3, d_ff=5, vocab_size=11)
    gelu = dataclasses.replace(small, activation="gelu", tied_embedding=True)
    assert parameters(gelu) == 2 * (attention + experts + 8 * 3 + 2 * 8) + 8 + 11 * 8
    assert parameters(small) == parameters(gelu) + 2 * 3 * 8 * 5 + 11 * 8
    mixed = dataclasses.replace(small, layers=3, dense_layers=1, dense_d_ff=7)
    assert parameters(mixed) == parameters(small) + attention + 3 * 8 * 7 + 2 * 8
    shared = dataclasses.replace(mixed, shared_experts=2, shared_gate=True)
    assert parameters(shared) == parameters(mixed) + 2 * (3 * 8 * 2 * 5 + 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bogus": 1}, "bogus: no such field; --help lists them"),
        ({"model": {"layer": 1}}, "model.layer: no such field; did you mean model.layers?"),
        ({"train": {"learning_rate": 1}}, "train.learning_rate: no such field; did you mean optimizer.learning_rate?"),
        ({"model": 3}, "model: got 3; takes the fields of ModelConfig"),
        ({"model": {"layers": 2.0}}, "model.layers: got 2.0; takes an integer"),
        ({"model": {"layers": True}}, "model.layers: got True; takes an integer"),
        ({"model": {"layers": None}}, "model.layers: got None; takes an integer"),
        ({"model": {"capacity_group": "4"}}, "model.capacity_group: got '4'; takes an integer or None"),
        ({"model": {"capacity_factor": True}}, "model.capacity_factor: got True; takes a finite number or None"),
        ({"optimizer": {"b1": float("nan")}}, "optimizer.b1: got nan; takes a finite number"),
        ({"optimizer": {"zero1": 1}}, "optimizer.zero1: got 1; takes True or False"),
        ({"data": {"path": 12}}, "data.path: got 12; takes a string or None"),
    ],
)
def test_fields_and_types(values, message):
    with pytest.raises(ConfigError) as error:
        from_config_dict(values)
    assert str(error.value) == message


def test_an_integer_is_a_float():
    config = from_config_dict({"model": {"capacity_factor": 1}, "optimizer": {"clip_norm": 2}})
    assert type(config.model.capacity_factor) is type(config.optimizer.clip_norm) is float


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": ".."}, "name"),
        ({"layout": "mb"}, "layout"),
        ({"mesh.stage": 2}, "mesh.stage"),
        ({"mesh.attention": 0}, "mesh.attention"),
        ({"mesh.attention": 3}, "mesh"),
        ({"mesh.attention": 16, "data.sequence_length": 120}, "mesh"),
        ({"mesh.expert": 32, "train.batch_size": 32}, "mesh"),
        ({"mesh.expert": 16, "train.batch_size": 24}, "mesh"),
        ({"mesh.expert": 16, "train.accumulation": 2}, "mesh"),
        ({"mesh.attention": 8, "model.kv_heads": 16, "model.heads": 48, "model.d_model": 96}, None),
        ({"mesh.attention": 8, "model.kv_heads": 4}, None),
        ({"mesh.attention": 4, "model.kv_heads": 6, "model.heads": 24, "model.d_model": 96}, "model.kv_heads"),
        ({"mesh.attention": 256, "model.heads": 256, "model.d_model": 512, "data.sequence_length": 256}, None),
        (
            {
                "mesh.attention": 256,
                "model.heads": 256,
                "model.d_model": 512,
                "data.sequence_length": 256,
                "model.vocab_size": 8193,
            },
            "mesh",
        ),
        ({"train.steps": 0}, "train.steps"),
        ({"train.accumulation": 3}, "train.batch_size"),
        ({"train.seed": -1}, "train.seed"),
        ({"train.log_every": -1}, "train.log_every"),
        ({"train.nonfinite_limit": 0}, "train.nonfinite_limit"),
        ({"train.profile": "3"}, "train.profile"),
        ({"train.profile": "4:3"}, "train.profile"),
        ({"train.profile": "3:4"}, None),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"optimizer.b2": 1.0}, "optimizer.b2"),
        ({"optimizer.warmup_steps": 50, "optimizer.decay_steps": 49}, "optimizer.decay_steps"),
        ({"optimizer.final_fraction": 1.5}, "optimizer.final_fraction"),
        ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay"),
        ({"model.router_score": "sigmoid", "model.router_groups": 8, "model.router_top_groups": 2}, None),
        ({"model.router_score": "tanh"}, "model.router_score"),
        ({"model.balance_over": "step"}, "model.balance_over"),
        ({"model.router_bias_rate": -0.1}, "model.router_bias_rate"),
        ({"model.router_bias_rate": 0.1, "model.top_k": 16}, "model.router_bias_rate"),
        ({"model.router_groups": 0}, "model.router_groups"),
        ({"model.router_groups": 3}, "model.router_groups"),
        ({"model.router_groups": 16, "model.router_top_groups": 8}, "model.router_groups"),
        ({"model.router_groups": 4, "model.router_top_groups": 5}, "model.router_top_groups"),
        ({"model.router_top_groups": 2}, "model.router_top_groups"),
        ({"model.router_groups": 8, "model.top_k": 3}, "model.router_top_groups"),
        ({"model.router_top_groups": 0}, "model.router_top_groups"),
        ({"model.router_scale": 0.0}, "model.router_scale"),
        ({"model.shared_experts": -1}, "model.shared_experts"),
        ({"model.shared_gate": True}, "model.shared_gate"),
        ({"model.shared_experts": 1, "model.d_ff": 30, "mesh.attention": 4}, "mesh"),
        ({"model.dense_layers": 1, "model.dense_d_ff": 32}, None),
        ({"model.dense_layers": -1}, "model.dense_layers"),
        ({"model.dense_layers": 2, "model.dense_d_ff": 32}, "model.dense_layers"),
        ({"model.dense_layers": 1}, "model.dense_d_ff"),
        ({"model.dense_d_ff": 32}, "model.dense_d_ff"),
        ({"model.dense_layers": 1, "model.dense_d_ff": 30, "mesh.attention": 4}, "mesh"),
        ({"data.source": "hub"}, "data.source"),
        ({"data.source": "tfds"}, "data.path"),
        ({"data.path": "x"}, "data.path"),
        ({"data.max_tokens": 0}, "data.max_tokens"),
        ({"data.tokenizer": "gpt3"}, "data.tokenizer"),
        ({"data.tokenizer": "gpt2:100"}, "data.tokenizer"),
        ({"data.tokenizer": "gpt2:x"}, "data.tokenizer"),
        ({"data.tokenizer": "gpt2"}, "model.vocab_size"),
        ({"model.heads": 12, "mesh.attention": 1}, "model.d_model"),
        ({"model.heads": 128}, "model.d_model / model.heads"),
        ({"model.head_dim": 5}, "model.head_dim"),
        ({"model.kv_heads": 3}, "model.kv_heads"),
        ({"model.top_k": 17}, "model.top_k"),
        ({"model.top_k": 0}, "model.top_k"),
        ({"model.activation": "relu"}, "model.activation"),
        ({"model.remat": "some"}, "model.remat"),
        ({"model.dtype": "float16"}, "model.dtype"),
        ({"model.attention_kernel": "flash"}, "model.attention_kernel"),
        ({"model.attention_kernel": "cudnn"}, "model.dtype"),
        ({"model.capacity_factor": 0.0}, "model.capacity_factor"),
        ({"model.exchange_factor": 0.0}, "model.exchange_factor"),
        ({"model.exchange_factor": -1.5}, "model.exchange_factor"),
        ({"model.float32_precision": "tf16"}, "model.float32_precision"),
        ({"model.capacity_factor": None, "model.capacity_group": 32}, "model.capacity_group"),
        ({"model.capacity_factor": 1.0, "model.capacity_group": 64}, "model.capacity_group"),
        ({"model.capacity_factor": 1.0, "model.capacity_group": 32}, None),
        ({"model.expert_dropout": 1.0}, "model.expert_dropout"),
        ({"model.router_z_coefficient": -1.0}, "model.router_z_coefficient"),
    ],
    ids=str,
)
def test_rules(values, field):
    config = changed(values)
    if field is None:
        validate(config)
        return
    with pytest.raises(ConfigError) as error:
        validate(config)
    named, _, rest = str(error.value).partition(": got ")
    assert named == field
    assert "; takes " in rest
    assert "\n" not in rest


def test_tokenizers_whose_size_needs_no_file():
    assert [tokenizer_ids(name) for name in ("gpt2", "gpt2:8192", "bytes", "my.json")] == [50_257, 8192, 257, None]
