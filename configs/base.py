"""The schema with its defaults: maxsep/config/schema.py has each field, its unit, a comment.

Other configs override this.
"""

from maxsep.config import Config, to_config_dict


def get_config():
    return to_config_dict(Config())
