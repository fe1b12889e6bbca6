"""A model in Hugging Face's form, found to be whole and one of ours before anything is loaded."""

from dataclasses import replace
from functools import cached_property

import numpy as np

from maxsep.config import Config, ConfigError, DataConfig
from maxsep.config.matrices import sizes
from maxsep.config.stored import OWN_TOKENIZER
from maxsep.data.json_tokenizer import end_ids
from maxsep.huggingface import model_config, tokenizer_files
from maxsep.huggingface.families import numbers, tensors
from maxsep.huggingface.folder import DTYPES, Folder

# Tensors that old files hold and that follow from the config.
DERIVED = (".rotary_emb.inv_freq",)


class HuggingFaceModel:
    """The model in the folder that `--checkpoint` names.

    Raises:
        ConfigError: there is none, or one that our transformer cannot be, or it is not whole.
    """

    def __init__(self, path: str):
        self.folder = Folder(path)
        fields = self.folder.json("config.json")
        if fields is None:
            raise ConfigError(f"--checkpoint: {self.folder.path} has no config.json; takes a model's folder")
        try:
            self.family, model, context = model_config.read(fields)
        except ConfigError as e:
            raise self.folder.refuse(f"config.json: {e}") from None
        ends = [*self._ends("config.json"), *self._ends(tokenizer_files.GENERATION)]
        self.ends = [end for end in dict.fromkeys(ends) if end < model.vocab_size]  # of which a text may end with any
        self.tokenizer_files = tokenizer_files.carried(self.folder, self.ends)
        ids = f"ids:{model.vocab_size}" + (f":{','.join(map(str, self.ends))}" if self.ends else "")
        self.stored = self.folder.tensors()
        self.tensors = tensors(self.family, model)
        self.dtype = self._check(model)
        # No file of ours computes in float16, which float32 holds.
        self.config = Config(
            model=replace(model, dtype="float32" if self.dtype == "float16" else self.dtype),
            # Prompts as transformers makes them.
            data=DataConfig(
                sequence_length=context,
                tokenizer=OWN_TOKENIZER if self.tokenizer_files else ids,
                begin_prompts=bool(self.tokenizer_files),
            ),
        )

    def _ends(self, name: str) -> list[int]:
        """The ids that end a text, as a file says."""
        try:
            return end_ids((self.folder.json(name) or {}).get("eos_token_id"))
        except ValueError as e:
            raise self.folder.refuse(f"{name}: {e}") from None

    def _check(self, model) -> str:
        """Compares the tensors with those of the family's model; returns the dtype that they have.

        Raises:
            ConfigError: one is missing, or has another shape, or another dtype than the others, or is not the family's.
        """
        of, wanted = sizes(model), []
        for entry in self.tensors.values():
            shape = entry.shape(of)
            for name in map(entry.named, numbers(entry, of)):  # a config may ask for any number of them
                if name not in self.stored:
                    raise self.folder.refuse(f"{self._files()}: {name} is missing; takes a tensor {list(shape)}")
                found = self.stored[name]
                if found.shape != shape:
                    raise self.folder.refuse(f"{found.file}: {name} is {list(found.shape)}; takes {list(shape)}")
                wanted.append(name)
        first, wanted = wanted[0], set(wanted)
        if model.tied_embedding:
            wanted.add("lm_head.weight")  # a copy of the embedding, where it is there
        dtype = self.stored[first].dtype
        for name, found in self.stored.items():
            if name.endswith(DERIVED):
                continue
            if name not in wanted:
                raise self.folder.refuse(f"{found.file}: {name} is none of the tensors of {self.family.architecture}")
            if found.dtype not in DTYPES:
                raise self.folder.refuse(f"{found.file}: {name} is {found.dtype}; takes {', '.join(DTYPES)}")
            if found.dtype != dtype:
                raise self.folder.refuse(f"{found.file}: {name} is {found.dtype}; takes {dtype}, as {first} is")
        return DTYPES[dtype]

    def _files(self) -> str:
        files = sorted({stored.file for stored in self.stored.values()})
        return files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"

    @cached_property
    def bytes(self) -> int:
        """Of the files that are read."""
        return sum((self.folder.path / file).stat().st_size for file in {at.file for at in self.stored.values()})

    def read(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
        """A part of the tensor of this name.

        Raises:
            ConfigError: it cannot be read.
        """
        return self.folder.read(self.stored[name], name, where)
