"""Files that are replaced at once."""

import json
import math

import pytest

from maxsep.output import durable


def test_json_is_strict_and_replaced_at_once(tmp_path):
    path = tmp_path / "summary.json"
    durable.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        durable.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    durable.write_json(path, {"loss": math.nan, "mesh": {"attention": 4}, "rows": [1.0, math.inf, (2, "a")]})
    assert json.loads(path.read_text()) == {"loss": None, "mesh": {"attention": 4}, "rows": [1.0, None, [2, "a"]]}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
