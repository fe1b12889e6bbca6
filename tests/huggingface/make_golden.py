"""Writes tests/huggingface/golden: small random models as transformers saves them, and what it computes with them.

    python tests/huggingface/make_golden.py        (pip install torch==2.13.0 transformers==5.23.0; Python 3.11)

The tests then need neither. A model is drawn again until no choice is close enough for rounding to tip it: of an
expert, between router scores, or of a token, between the two best scores. Versions and gaps lie beside the numbers.
"""

import itertools
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

GOLDEN = Path(__file__).parent / "golden"
GAP = 1e-4  # float32 moves a router's score by some 1e-6
TOKEN_GAP = 1e-3
NEW = 64  # tokens of a completion
LENGTHS = (5, 1, 11)  # of the prompts

COMMON = {
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ODD = {"vocab_size": 67, "num_attention_heads": 3, "num_key_value_heads": 1}
EVEN = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "mixtral_odd": MixtralConfig(
        **COMMON | ODD, hidden_size=18, head_dim=6, num_local_experts=5, intermediate_size=11, sliding_window=None
    ),
    "mixtral_even": MixtralConfig(**COMMON | EVEN, num_local_experts=8, intermediate_size=12, rope_theta=1e4),
    "qwen3_moe_odd": Qwen3MoeConfig(
        **COMMON | ODD, hidden_size=14, head_dim=10, num_experts=7, moe_intermediate_size=9, norm_topk_prob=True
    ),
    "qwen3_moe_even": Qwen3MoeConfig(
        **COMMON | EVEN, head_dim=8, num_experts=4, moe_intermediate_size=12, tie_word_embeddings=True
    ),
    "olmoe_odd": OlmoeConfig(
        **COMMON | ODD | {"num_key_value_heads": 3}, hidden_size=18, num_experts=5, intermediate_size=11, clip_qkv=0.7
    ),
    "olmoe_even": OlmoeConfig(**COMMON | EVEN, num_experts=4, intermediate_size=12, norm_topk_prob=True),
}


def drawn(config, seed: int):
    """A model in float32 whose numbers bfloat16 holds, its norms' scales not all 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16().float())
    return model


def completed(model, prompts: list[list[int]]) -> torch.Tensor:
    """The new tokens of `generate`, greedy, of all prompts in one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return out[:, longest:]


def gaps(model, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The scores after each of `tokens` [1, s], and the smallest gap between a last chosen and the next expert."""
    with torch.no_grad():
        out = model(tokens, output_router_logits=True)
    top = torch.cat([scores.float() for scores in out.router_logits]).topk(model.config.num_experts_per_tok + 1).values
    return out.logits[0], float((top[:, -2] - top[:, -1]).min())


def tried(config, seed: int):
    """A model, and what is computed with it; None where a choice is close."""
    model = drawn(config, seed)
    dice = torch.Generator().manual_seed(seed)
    text = torch.randint(config.vocab_size, (1, 16), generator=dice)
    prompts = [torch.randint(config.vocab_size, (n,), generator=dice).tolist() for n in LENGTHS]
    logits, least = gaps(model, text)
    new = completed(model, prompts)
    token_gap = float("inf")
    for prompt, more in zip(prompts, new.tolist(), strict=True):
        scores, gap = gaps(model, torch.tensor([prompt + more]))
        best = scores[len(prompt) - 1 : -1].topk(2).values
        assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == more
        least, token_gap = min(least, gap), min(token_gap, float((best[:, 0] - best[:, 1]).min()))
    if least < GAP or token_gap < TOKEN_GAP:
        return None
    facts = {"seed": seed, "router_gap": least, "token_gap": token_gap, "prompts": prompts, "new": new.tolist()}
    return model, {"text": text, "logits": logits.contiguous()}, facts


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, config in MODELS.items():
        model, numbers, facts = next(found for seed in itertools.count() if (found := tried(config, seed)))
        odd = name.endswith("odd")
        folder = GOLDEN / name
        # The even ones in bfloat16 and in several files.
        (model if odd else model.bfloat16()).save_pretrained(folder, max_shard_size="50GB" if odd else "10KB")
        (folder / "generation_config.json").unlink()
        (GOLDEN / f"{name}.json").write_text(
            json.dumps(facts | {"transformers": transformers.__version__, "torch": torch.__version__}) + "\n"
        )
        save_file(numbers, GOLDEN / f"{name}.safetensors")
        print(name, facts["seed"], facts["router_gap"], facts["token_gap"])


if __name__ == "__main__":
    main()
