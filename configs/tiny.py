"""A model small enough for two CPU cores, on a simulated 4 x 4 mesh, trained on the docstrings of what is installed.

    python train.py

Expected: some four minutes on 2 busy cores; held-out loss about 4.5 nats per token, where the unigram cross-entropy is
6.5.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "tiny"
    config.mesh.attention = 4
    config.mesh.expert = 4
    config.train.steps = 300
    config.train.batch_size = 16
    config.train.checkpoint_every = 100
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.data.sequence_length = 128
    config.data.tokenizer = "gpt2:8192"
    config.model.layers = 2
    config.model.d_model = 128
    config.model.heads = 16
    config.model.experts = 16
    config.model.top_k = 2
    config.model.d_ff = 256
    config.model.vocab_size = 8192
    return config
