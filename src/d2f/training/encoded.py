"""Token ids of all samples, in flat arrays: in memory, or mapped from a file of the cache."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from d2f.training.bad_rows import BadRows


@dataclass(kw_only=True)
class Encoded:
    """Token ids of samples, one after the other, and the lengths to cut them up again."""

    tokens: array[int] | memoryview = field(default_factory=lambda: array("i"))
    prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    response_lengths: array[int] = field(default_factory=lambda: array("i"))
    bad_rows: BadRows = field(default_factory=BadRows)
    """Rows that gave no sample."""
    cache_file: str | None = field(default=None, compare=False)
    """Where `tokens` are mapped from."""

    def add(self, prompt_ids: list[int], response_ids: list[int]) -> None:
        """Append a sample."""
        assert isinstance(self.tokens, array)
        self.tokens.extend(prompt_ids)
        self.tokens.extend(response_ids)
        self.prompt_lengths.append(len(prompt_ids))
        self.response_lengths.append(len(response_ids))

    def extend(self, other: Encoded) -> None:
        """Append another batch of samples."""
        assert isinstance(self.tokens, array)
        self.tokens.extend(other.tokens)
        self.prompt_lengths.extend(other.prompt_lengths)
        self.response_lengths.extend(other.response_lengths)
