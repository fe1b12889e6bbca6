"""Text to prepare."""

import json

import pytest
from corpora import TEXTS

from maxsep.data import packing, token_parts


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def small_units(monkeypatch):
    """So many parts and shards that a preparation can be cut off between them."""
    monkeypatch.setattr("maxsep.data.files.BLOCK", 64)
    monkeypatch.setattr("maxsep.data.files.PIECE", 256)
    monkeypatch.setattr(packing, "SHARD_TOKENS", 1024)
    monkeypatch.setattr(token_parts, "PIECE", 50)
