"""Files that a reader finds whole, the old one or the new, whenever the writer is killed."""

import json
import math
import os
import uuid
from pathlib import Path


def write_json(path: Path, values, indent: int | None = 2) -> None:
    """Replaces the file by `values` as strict JSON: what is not finite becomes null."""
    write_text(path, json.dumps(finite(values), indent=indent, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once; it is on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # several may write the same file
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def finite(value):
    """`value` with None for every float that JSON cannot write."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
