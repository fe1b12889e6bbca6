import importlib.metadata
import textwrap

import pytest

from maxsep.config import ConfigError
from maxsep.data import docstrings

EXAMPLE = """
    Return the sum of
    the numbers given here.

    Parameters
    ----------
    x : array_like
        The numbers that are to be
        summed, in any order.
    axis : {None, 0}
        The {braces} keep this sentence away from you.

    Args:
      y: Another number, which hangs
        over into a second line.
      z (int): Too short.

    - A bullet that is a whole sentence.
    - A bullet that never comes to an end

    >>> f(1)  # An example is not a sentence.
    Neither is what it prints to you here.

    The end of it is near...
"""


def test_paragraphs_that_pass_the_rules_of_c4():
    assert list(docstrings.clean(textwrap.dedent(EXAMPLE))) == [
        "Return the sum of the numbers given here.",
        "The numbers that are to be summed, in any order.",
        "y: Another number, which hangs over into a second line.",
        "A bullet that is a whole sentence.",
    ]


def test_a_module_is_read_in_its_order_without_importing_it(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""One."""\nimport no_such_module\nclass A:\n  """Two."""\n  async def f(self):\n    """Three."""\n'
        'def g():\n  """Four."""\nadd_newdoc("numpy", "h", """Five.""")\nx = """None of these."""\n'
    )
    assert list(docstrings._docstrings(path)) == ["One.", "Two.", "Three.", "Four.", "Five."]
    path.write_text("{{ a template }} (")
    assert list(docstrings._docstrings(path)) == []


def test_documents_are_in_a_fixed_order_and_no_line_comes_twice(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", {"absl-py": "absl", "optax": "optax"})
    log = []
    documents = list(docstrings.documents(log.append))
    assert documents == list(docstrings.documents(log.append))
    lines = [line for _, text in documents for line in text.split("\n")]
    assert len(set(lines)) == len(lines) > 500
    urls = [url for url, _ in documents]
    assert len(set(urls)) == len(urls)
    assert urls[0].startswith("absl/") and urls[-1].startswith("optax/")
    assert not [url for url in urls if "test" in url.rsplit("/", 1)[-1].removesuffix(".py").split("_")]
    assert len(log) == 4 and "absl-py" in log[0]


def test_another_version_is_another_corpus(monkeypatch):
    before = docstrings.fingerprint()
    assert before == docstrings.fingerprint()
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda p: "0.0" if p == "scipy" else real(p))
    assert before != docstrings.fingerprint()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", {"no-such-package": "no_such_package"})
    with pytest.raises(ConfigError, match=r"^data\.source: docstrings needs the package no-such-package"):
        docstrings.fingerprint()
