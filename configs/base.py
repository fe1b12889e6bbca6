"""The schema with its defaults: every field, unit and comment is in maxsep/config.py. Other configs override this."""

from maxsep.config import Config, to_config_dict


def get_config():
    return to_config_dict(Config())
