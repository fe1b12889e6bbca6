"""The files of a folder that holds a dataset, by split, as Hugging Face's hub lays them out."""

import os
import re
from pathlib import Path

import yaml

from maxsep.config import ConfigError
from maxsep.data.matching import matching

_SPLITS = {  # what names of files and folders call them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
Endings = tuple[str, ...]  # of names of files, as regular expressions; of those in a folder, the first that is there
Splits = dict[str, list[str]]  # files of each split, or globs of them; "" for those whose names say the split


def splits(folder: str, name: str | None, endings: Endings) -> Splits:
    """The files of each split: what the folder's README.md says, else by their names.

    Args:
        name: `data.name`, a `config_name` of the README.md; None: its default.

    Raises:
        ConfigError: no text there, no such name, or a README.md whose head is none of a dataset.
    """
    configs, default = _configs(Path(folder))
    if configs:
        return _named(folder, name, default, configs, endings)
    if name is not None:
        takes = f"None, as {folder!r} has no README.md that names parts of it"
        raise ConfigError(f"data.name: got {name!r}; takes {takes}")
    paths = _of_one_kind(matching(os.path.join(folder, "**")), endings)
    if not paths:
        takes = "one with .parquet, .jsonl or .txt files, or for data.source=tokens .bin or .npy"
        raise ConfigError(f"data.path: got {folder!r}, a folder without any; takes {takes}")
    return _by_name(folder, paths)


def _named(folder: str, name: str | None, default: str, configs: dict[str, Splits], endings: Endings) -> Splits:
    found = {}
    for config, globs in configs.items():
        its = {split: _matching(folder, some, endings) for split, some in globs.items()}
        its = _by_name(folder, its.pop("", [])) | its
        if its := {split: paths for split, paths in its.items() if paths}:
            found[config] = its
    if (chosen := name or default) not in found:
        globs = ", ".join(glob for some in configs.get(chosen, {}).values() for glob in some)
        why = f", whose files {globs} are not there" if globs else ""
        takes = f"one that {folder!r} has files of: {', '.join(found) or 'there is none'}"
        raise ConfigError(f"data.name: got {name!r}{why}; takes {takes}")
    return found[chosen]


def _configs(folder: Path) -> tuple[dict[str, Splits], str]:
    """The globs of each part that the head of README.md names, and the name of the default one, or "".

    Its form: https://huggingface.co/docs/hub/datasets-manual-configuration.
    """
    path = folder / "README.md"
    try:
        head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", path.read_text(encoding="utf-8"), re.DOTALL)
    except FileNotFoundError:
        return {}, ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.path: {str(path)!r} cannot be read ({error})") from None
    try:
        fields = yaml.safe_load(head[1]) if head else {}
        listed = (fields or {}).get("configs") or []
        found = {config["config_name"]: _splits_of(config) for config in listed}
        chosen = [config["config_name"] for config in listed if config.get("default") or len(listed) == 1]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"data.path: the head of {str(path)!r} is not a dataset's: {reason}") from None
    return found, chosen[0] if chosen else "default"


def _splits_of(config: dict) -> Splits:
    """The globs of a part: without any, all below its folder, by names."""
    entries = config.get("data_files", [{"split": "", "path": "**"}])
    found: Splits = {}
    for entry in [entries] if isinstance(entries, str | dict) else entries:
        entry = {"split": "train", "path": entry} if isinstance(entry, str) else entry
        globs = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
        found.setdefault(entry["split"], []).extend(os.path.join(config.get("data_dir", ""), glob) for glob in globs)
    return found


def _matching(folder: str, globs: list[str], endings: Endings) -> list[str]:
    return sorted({path for glob in globs for path in _of_one_kind(matching(os.path.join(folder, glob)), endings)})


def _of_one_kind(paths: list[str], endings: Endings) -> list[str]:
    """Those of the first kind that is there."""
    found = ([path for path in paths if re.search(f"{ending}$", path)] for ending in endings)
    return next(filter(None, found), [])


def _by_name(folder: str, paths: list[str]) -> Splits:
    found: Splits = {}
    for path in paths:
        *folders, name = Path(os.path.relpath(path, folder)).parts
        split = next((split for part in (name, *reversed(folders)) if (split := _split_of(part))), "train")
        found.setdefault(split, []).append(path)
    return found


def _split_of(name: str) -> str | None:
    words = re.split(r"[-._ \d]+", name.lower())
    return next((split for split, names in _SPLITS.items() if not set(names).isdisjoint(words)), None)
