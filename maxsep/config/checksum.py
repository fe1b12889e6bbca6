"""Checksums of JSON values, to be kept beside them, and of files."""

import hashlib
import json
from pathlib import Path


def checksum(content: dict) -> str:
    """SHA-256, whatever the order of the names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
