"""The same as test_golden.py on other shapes, against torch and transformers where they are installed.

pip install torch==2.13.0 transformers==5.23.0        (Python 3.11)
"""

import json

import numpy as np
import pytest
from conversion import exported, imported, logits, on

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]

COMMON = {"num_hidden_layers": 2, "initializer_range": 0.2, "max_position_embeddings": 96}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MODELS = {
    "Mixtral, heads 5, experts 7, 101 ids": transformers.MixtralConfig(
        **COMMON, **NO_IDS, vocab_size=101, hidden_size=30, num_attention_heads=5, num_key_value_heads=5,
        num_local_experts=7, num_experts_per_tok=3, intermediate_size=13, sliding_window=None,
    ),
    "Mixtral, heads 8 on 4, head size 6": transformers.MixtralConfig(
        **COMMON, **NO_IDS, vocab_size=256, hidden_size=24, num_attention_heads=8, num_key_value_heads=4, head_dim=6,
        num_local_experts=4, num_experts_per_tok=1, intermediate_size=8, sliding_window=None, tie_word_embeddings=True,
    ),
    "Qwen3, heads 7 on 1, experts 3": transformers.Qwen3MoeConfig(
        **COMMON, **NO_IDS, vocab_size=131, hidden_size=20, num_attention_heads=7, num_key_value_heads=1, head_dim=6,
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=11, norm_topk_prob=False,
    ),
    "Qwen3, heads 4 on 2, all experts": transformers.Qwen3MoeConfig(
        **COMMON, **NO_IDS, vocab_size=140, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=4, moe_intermediate_size=8, norm_topk_prob=True, rope_theta=1e6,
    ),
    "OLMoE, heads 3, experts 11": transformers.OlmoeConfig(
        **COMMON, **NO_IDS, vocab_size=89, hidden_size=30, num_attention_heads=3, num_key_value_heads=3,
        num_experts=11, num_experts_per_tok=2, intermediate_size=7, clip_qkv=0.9,
    ),
    "OLMoE, heads 4 on 1": transformers.OlmoeConfig(
        **COMMON, **NO_IDS, vocab_size=64, hidden_size=16, num_attention_heads=4, num_key_value_heads=1,
        num_experts=4, num_experts_per_tok=2, intermediate_size=8, norm_topk_prob=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_weights_are_those_of_transformers(name, tmp_path):
    """In float64, so that no rounding chooses; to 1e-4, as float32 has to be (test_golden.py)."""
    torch.manual_seed(0)
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name], **how)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    text = torch.randint(model.config.vocab_size, (1, 24))
    with torch.no_grad():
        expected = model.double().eval()(text).logits[0].numpy()
    run = imported(tmp_path / "model", tmp_path / "run")
    for layout, mesh in (("ma", (1, 1)), ("ma", (4, 4)), ("tp", (4, 2))):
        divides = model.config.num_attention_heads % mesh[0] == 0 and model.config.num_local_experts % mesh[1] == 0
        if divides:
            found = logits(on(run, layout, mesh, "float64"), run, text[0].tolist())
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

    out = exported(run, tmp_path / "out")
    again, problems = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    original, found = model.float().state_dict(), again.state_dict()
    assert found.keys() == original.keys()
    assert all(torch.equal(found[key], original[key]) for key in original)
    fields = json.loads((out / "config.json").read_text())
    assert all(getattr(again.config, key) == value for key, value in fields.items() if hasattr(MODELS[name], key)
               and key not in ("architectures", "torch_dtype", "head_dim", "rope_theta"))  # fmt: skip


def test_a_run_trained_here_loads_with_its_tokenizer(tmp_path, call):
    """As Mixtral: its scores are ours, and its tokenizer has our ids."""
    workdir = tmp_path / "run"
    small = {"data__tokenizer": "gpt2:300", "model__vocab_size": 310, "model__dtype": "float32", "train__steps": 2}
    assert call(workdir, **small)[0] == 0
    out = exported(workdir, tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(out)
    text = "Return the number of <|elements|>, isn't it?\n\n    x = 1"
    ids = words(text)["input_ids"]
    assert words.decode(ids) == text and words.eos_token_id == 299
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 300, "what never had a probability is left out"
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = logits(on(workdir, "ma", (1, 1), "float32"), workdir, ids)
    np.testing.assert_allclose(found[:, :300], expected, rtol=0, atol=1e-4)
