"""A checksum of JSON values, to be kept beside them."""

import hashlib
import json


def checksum(content: dict) -> str:
    """SHA-256, whatever the order of the names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
