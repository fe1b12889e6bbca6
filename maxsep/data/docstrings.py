"""The default corpus: the documentation that this project's installed dependencies carry in their docstrings.

Real English about numbers, arrays and machine learning that is on every machine that can run the project. Modules are
read with `ast`, never imported, and their text is cleaned as C4 was (Raffel et al. 2020, section 2.2), a wrapped
paragraph counting as one line: a line is kept that ends a sentence, has five words or more and no brace, the first time
it occurs. A document is a module.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from maxsep.config import ConfigError

# Distributions and their import folders: what a plain installation of the project brings, the largest texts first.
PACKAGES = {
    "scipy": "scipy",
    "numpy": "numpy",
    "jax": "jax",
    "tensorflow-datasets": "tensorflow_datasets",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax/checkpoint",
    "grain": "grain",
    "absl-py": "absl",
    "rich": "rich",
    "fsspec": "fsspec",
    "protobuf": "google/protobuf",
    "treescope": "treescope",
    "huggingface-hub": "huggingface_hub",
}
RULES = "1"  # of harvesting and cleaning: another number is another corpus

_UNDERLINE = re.compile(r"([-=~^#*+\"'`])\1{2,}")
_BULLET = re.compile(r"(?:[-*+•]|\d{1,2}[.)]|\.\. \[\w+\])\s+")
_ITEM = re.compile(r"[*`\w.\[\]]+(?: \([^)]*\))?: \S")  # `name (type): text`, whose later lines are indented
_END_OF_SENTENCE = (".", "!", "?", '."', '!"', '?"', ".)", "!)", "?)")


def versions() -> dict[str, str]:
    """The installed version of each package harvested.

    Raises:
        ConfigError: a package is not installed.
    """
    try:
        return {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"data.source: docstrings needs the package {error.name}; pip install {error.name}") from None


def fingerprint() -> str:
    """Hash of what decides the corpus: the packages' versions and the rules."""
    return hashlib.sha256(repr((RULES, versions())).encode()).hexdigest()


def documents(log: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Module path and text of every module that has any, in a fixed order. Logs a line a package."""
    seen = set()
    for package, version in versions().items():
        count = size = 0
        for url, path in _modules(PACKAGES[package]):
            lines = [line for text in _docstrings(path) for line in clean(text) if not (line in seen or seen.add(line))]
            if lines:
                count, size = count + 1, size + sum(map(len, lines))
                yield url, "\n".join(lines)
        log(f"  {package} {version}: {count} modules, {size / 1e6:.2f} MB of text")


def _modules(folder: str) -> Iterator[tuple[str, Path]]:
    top, _, below = folder.partition("/")
    spec = importlib.util.find_spec(top)  # of a top-level name, it imports nothing
    root = next(path for place in spec.submodule_search_locations if (path := Path(place, below)).is_dir())
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not (_is_test(inside) or "_vendor" in inside.parts):
            yield f"{folder}/{inside.as_posix()}", path


def _is_test(path: Path) -> bool:
    in_folder = not {"tests", "test", "testing", "testdata"}.isdisjoint(path.parts)
    return in_folder or path.stem.startswith("test_") or path.stem.endswith("_test")


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, in the order of the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # others' invalid escapes are not our user's business
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a template, or syntax of a newer Python
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "add_newdoc":
            # How NumPy and SciPy document what is written in C: the last argument is a docstring.
            text = node.args[-1] if node.args else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield text.value
        if not isinstance(node, ast.expr) or isinstance(node, ast.Call):
            nodes.extend(reversed(list(ast.iter_child_nodes(node))))


def clean(docstring: str) -> Iterator[str]:
    """The docstring's paragraphs that pass C4's rules, each as one line."""
    for line in _unwrap(docstring):
        sentence = line.endswith(_END_OF_SENTENCE) and not line.endswith("...")
        if sentence and len(line.split()) >= 5 and "{" not in line and "}" not in line:
            yield line


def _unwrap(docstring: str) -> Iterator[str]:
    """Paragraphs, items of lists and descriptions of parameters, each as one line; headings and examples left out."""
    words, indent, hanging, example = [], 0, False, False
    for line in [*docstring.expandtabs().splitlines(), ""]:
        text = line.strip()
        here = len(line) - len(line.lstrip())
        starts_item = bool(_BULLET.match(text) or _ITEM.match(text))
        if _UNDERLINE.fullmatch(text):
            words = []  # what stands above is a heading
            continue
        continues = text and (here == indent or (hanging and here > indent)) and not starts_item
        if words and not continues:
            yield " ".join(words)
            words = []
        if not text:
            example = False
        elif text.startswith((">>>", "..", "$ ", "In [", "@")):
            example = True  # and what it prints, up to the next empty line
        if text and not example:
            if not words:
                indent, hanging = here, starts_item
            elif hanging and here > indent:
                indent, hanging = here, False
            words += _BULLET.sub("", text, count=1).split() if starts_item else text.split()
