"""The shape of Mixtral-8x7B (Jiang et al. 2024), 46.7 B parameters of which 12.9 B work on a token, on 16 x 80 GB.

    python train.py --config=configs/mixtral_8x7b.py --config.data.source=files --config.data.path='text/*.jsonl'

trains it from new weights, with GPT-2's first 32,000 ids. From the model itself, imported into runs/mixtral: add
--config.train.init_from=runs/mixtral --config.data.tokenizer=runs/mixtral/tokenizer.json. infer.py needs no config.

Per device: weights and gradients 11.7 GB each, moments 23.4 GB; with the rest of the step 59.7 GB on 16 x H100, and
115.6 GB if remat is dots (`maxsep.plan`).
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "mixtral_8x7b"
    config.layout = "zero"
    config.mesh.attention = 2
    config.mesh.expert = 8
    config.train.batch_size = 128
    config.train.accumulation = 4
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 100
    config.optimizer.zero1 = True
    config.data.sequence_length = 4096
    config.data.tokenizer = "gpt2:32000"
    config.model.layers = 32
    config.model.d_model = 4096
    config.model.heads = 32
    config.model.kv_heads = 8
    config.model.experts = 8
    config.model.top_k = 2
    config.model.d_ff = 14_336
    config.model.vocab_size = 32_000
    config.model.rope_theta = 1_000_000.0
    config.model.norm_eps = 1e-5
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    return config
