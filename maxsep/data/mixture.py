"""What a run learns from: one prepared corpus, or several that are mixed by their weights."""

from dataclasses import dataclass
from functools import cached_property

from maxsep.config.checksum import checksum
from maxsep.data.records import Corpus


@dataclass(frozen=True)
class Mixture:
    """Corpora by name, each with its part of the training records.

    `ratio`: how many of `sum(ratio)` records come from each. `named`: whether it is that of `data.mixture`, for which
    losses are printed per source; if not, it is one corpus.
    """

    corpora: dict[str, Corpus]
    ratio: tuple[int, ...]
    named: bool

    @property
    def tokenizer(self):
        return next(iter(self.corpora.values())).tokenizer

    @property
    def sequence_length(self) -> int:
        return next(iter(self.corpora.values())).train.sequence_length

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens, and of the weights."""
        if not self.named:
            return next(iter(self.corpora.values())).fingerprint
        found = [corpus.fingerprint for corpus in self.corpora.values()]
        return checksum({"mixture": list(zip(self.corpora, self.ratio, found, strict=True))})

    @property
    def held_out(self) -> int:
        """Held-out tokens that are predicted."""
        return sum(corpus.eval.targets for corpus in self.corpora.values())

    @property
    def unigram_entropy(self) -> float:
        """Nats a held-out token, of each source under the frequencies of its own training tokens."""
        return sum(c.unigram_entropy * c.eval.targets for c in self.corpora.values()) / self.held_out

    @property
    def described(self) -> dict[str, str]:
        """For the console."""
        if not self.named:
            return {"corpus": next(iter(self.corpora.values())).description}
        whole = sum(self.ratio)
        return {
            f"corpus {name}": f"{part / whole:.4g} of the tokens, from {corpus.description}"
            for (name, corpus), part in zip(self.corpora.items(), self.ratio, strict=True)
        }

    def counts(self, position: int) -> list[int]:
        """How many of the first `position` records come from each source: its share, to within one record per source.

        Grain's `mix` rounds weights to a hundredth of the smallest; these are exact.
        """
        found, rest, whole = [], position, sum(self.ratio)
        for part in self.ratio:
            # What the sources after this one have of it, rounded down.
            after = rest * (whole - part) // whole
            found.append(rest - after)
            rest, whole = after, whole - part
        return found

    def place(self, position: int) -> tuple[int, int]:
        """The source of the record at `position`, and how many records that source has had before."""
        before, after = self.counts(position), self.counts(position + 1)
        source = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        return source, before[source]

    def epochs(self, position: int) -> dict[str, float]:
        """How many times each source has been read when `position` records have."""
        counts = self.counts(position)
        return {name: n / len(c.train) for (name, c), n in zip(self.corpora.items(), counts, strict=True)}
