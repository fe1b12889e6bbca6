"""What a run is told to do: the schema of its settings, their rules, the table of layouts, and the command line.

The schema's names are imported from here, as config files do; everything else from its file.
"""

from maxsep.config.schema import (
    CHOICES,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    fields,
    from_config_dict,
    to_config_dict,
)

__all__ = [
    "CHOICES",
    "Config",
    "ConfigError",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "fields",
    "from_config_dict",
    "to_config_dict",
]
