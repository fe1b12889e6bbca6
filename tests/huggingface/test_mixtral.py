"""`configs/mixtral_8x7b.py` is the shape that the model's own config.json has, and its step fits 16 x 80 GB."""

from dataclasses import replace

import jax
from abstract import abstract

from maxsep.config.files import load_config
from maxsep.config.matrices import parameters
from maxsep.config.paths import REPOSITORY
from maxsep.config.validate import validate
from maxsep.huggingface import model_config
from maxsep.measure.memory import of_state

CONFIG = load_config(str(REPOSITORY / "configs/mixtral_8x7b.py"))
FIELDS = {  # Mixtral-8x7B's
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def test_it_is_the_models_shape():
    validate(CONFIG)
    _, model, context = model_config.read(FIELDS)
    own = replace(CONFIG.model, dtype=model.dtype, remat=model.remat, mask_unused_ids=False)
    assert own == model
    assert context == 32768
    assert parameters(model) == 46_702_792_704


def test_its_step_type_checks_and_its_state_fits():
    devices, program, state, batch = abstract(CONFIG)
    with jax.sharding.use_abstract_mesh(devices):
        after, _ = jax.eval_shape(program.train_step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    memory = {kind: round(count / 1e9, 1) for kind, count in of_state(state).items()}
    assert memory == {"weights": 11.7, "gradients": 11.7, "optimizer": 23.4}  # as the file says
