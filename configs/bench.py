"""The shape on which training steps are compared, with other systems too: docs/benchmarks.md.

    python -m maxsep.bench train

Compiling takes some 20 s; the step takes about a second on 2 cores.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.name = "bench"
    config.train.batch_size = 16
    config.optimizer.learning_rate = 1e-4
    config.data.sequence_length = 256
    config.data.tokenizer = "gpt2:8192"
    config.model.layers = 4
    config.model.d_model = 256
    config.model.heads = 8
    config.model.experts = 16
    config.model.top_k = 2
    config.model.d_ff = 512
    config.model.vocab_size = 8192
    config.model.capacity_factor = 1.0
    config.model.scan_layers = False  # compiles for longer and steps faster: the bench compiles once
    return config
