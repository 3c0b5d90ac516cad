"""Token data of a run, in flat arrays, the batches drawn from them, and the seeds of a run.

Shapes: T tokens of all samples, E samples, B sequences of a batch, L positions.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2f.errors import TrainingError, counted
from d2f.training.sections import DataConfig
from d2f.training.token_cache import Encoded


def derive_seed(seed: int, part: str, number: int = 0) -> int:
    """Give the seed of one part of a run, unrelated to that of any other part."""
    digest = hashlib.blake2b(f"{seed}/{part}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, part: str, number: int = 0) -> torch.Generator:
    """A CPU generator in the state that `derive_seed` names; CPU noise is the same everywhere."""
    return torch.Generator().manual_seed(derive_seed(seed, part, number))


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Clean sequences of equal length, each starting at position 0, filled up with EOS."""

    ids_BL: Tensor
    prompt_length_B: Tensor
    end_B: Tensor
    """End of the answer: one past its first EOS, or the sequence's end if it was cut."""
    length_B: Tensor
    """End of the sequence; what follows is padding, which no other position sees."""

    def part(self, start: int, end: int) -> Batch:
        """Give some of the sequences."""
        return Batch(**{name: value[start:end] for name, value in vars(self).items()})


class TokenDataset:
    """All samples of a run as flat integer arrays on the CPU.

    Over-long samples are dropped or truncated as the config says, and counted (`counts`). Raises
    `TrainingError` if no sample remains.

    Example:
        >>> from array import array
        >>> encoded = Encoded(tokens=array("i", [5, 6, 7]), prompt_lengths=array("i", [1]),
        ...                   response_lengths=array("i", [2]))
        >>> config = DataConfig(kind="problems", num_problems=1, sequence_length=5)
        >>> TokenDataset(encoded, config, eos_token_id=0).batch(torch.tensor([0])).ids_BL
        tensor([[5, 6, 7, 0, 0]])
    """

    def __init__(self, encoded: Encoded, config: DataConfig, *, eos_token_id: int) -> None:
        self.sequence_length = config.sequence_length
        self.eos_token_id = eos_token_id
        if not encoded.tokens:
            raise TrainingError("the data hold no samples; is data.paths right?")
        prompt_E, response_E = _tensor(encoded.prompt_lengths), _tensor(encoded.response_lengths)
        length_E = prompt_E.long() + response_E.long()
        start_E = length_E.cumsum(0) - length_E
        limit = config.sequence_length - 1
        longest = min(config.max_prompt_length or limit, limit)
        keep_E = prompt_E <= longest
        cut_E = torch.zeros_like(prompt_E)
        if config.long_prompt == "truncate":
            cut_E = (prompt_E - longest).clamp_min(0)
            prompt_E, start_E, length_E = prompt_E - cut_E, start_E + cut_E, length_E - cut_E
            keep_E = torch.ones_like(keep_E)
        long_prompts = int((~keep_E).sum())
        # The first EOS belongs to the answer, so a sample fits if there is room for it.
        long_E = length_E > limit
        if config.over_long == "drop":
            keep_E &= ~long_E
        long_E &= keep_E
        length_E = torch.where(long_E, config.sequence_length, length_E)
        self._counts = {
            "rows": len(prompt_E),
            "dropped": int((~keep_E).sum()),
            "long_prompts": long_prompts,
            "truncated": int(long_E.sum()),
            "truncated_prompts": int((cut_E[keep_E] > 0).sum()),
            "held_out": 0,
        }
        self._bad_rows, self._cache_file = encoded.bad_rows, encoded.cache_file
        tokens_T = _tensor(encoded.tokens)
        fits = int(tokens_T.max()) < 2**15
        self._tokens_T = tokens_T.to(torch.int16 if fits else torch.int32)
        self._start_E = start_E[keep_E]
        self._prompt_E = prompt_E[keep_E]
        self._length_E = length_E[keep_E]
        if not len(self):
            raise TrainingError(
                f"none of {counted(len(prompt_E), 'sample')} fits into data.sequence_length "
                f"{config.sequence_length}, and {long_prompts} have a prompt of more than "
                f"{counted(longest, 'token')}; raise data.sequence_length or "
                "data.max_prompt_length, or set over_long or long_prompt to 'truncate'"
            )

    def __len__(self) -> int:
        return len(self._start_E)

    def sample(self, row: int) -> tuple[list[int], list[int]]:
        """Give a sample's token ids: its prompt, and its response without EOS."""
        start, prompt = int(self._start_E[row]), int(self._prompt_E[row])
        ids = self._tokens_T[start : start + int(self._length_E[row])].tolist()
        return ids[:prompt], ids[prompt:]

    def extents(self) -> tuple[Tensor, Tensor]:
        """Give of each sample (E,) the prompt's length, and the answer's end, its EOS included."""
        return self._prompt_E.long(), (self._length_E + 1).clamp_max(self.sequence_length)

    def text(self) -> str:
        """Tell in one line what became of the rows."""
        known = self._counts
        held_out = f"{known['held_out']:,} held out, " if known["held_out"] else ""
        return (
            f"{counted(len(self), 'sample', ',')} of "
            f"{counted(self.mean_length, 'token', '.0f')} on average, {held_out}"
            f"{known['dropped']:,} dropped and {known['truncated']:,} truncated as over-long; "
            f"too long a prompt: {known['long_prompts']:,} of the dropped, "
            f"{known['truncated_prompts']:,} cut"
        )

    def hold_out(self, held_E: Tensor) -> None:
        """Forget the samples that a mask (E,) of bools marks; the others move up."""
        self._counts["held_out"], kept_E = int(held_E.sum()), ~held_E
        self._start_E, self._prompt_E, self._length_E = (
            values_E[kept_E] for values_E in (self._start_E, self._prompt_E, self._length_E)
        )

    @property
    def mean_length(self) -> float:
        """Mean number of tokens of a sample, without EOS."""
        return float(self._length_E.double().mean())

    def counts(self) -> dict[str, Any]:
        """Count what became of the rows, for training_summary.json.

        `rows` are the good ones, of which `dropped` and `truncated` did not fit (`long_prompts` of
        the dropped, and `truncated_prompts`, for their prompts) and `held_out` are kept for
        evaluation; `bad_rows` gave no sample at all.
        """
        return {
            **self._counts,
            "used": len(self),
            "mean_length": round(self.mean_length, 2),
            "bad_rows": self._bad_rows.count,
            "bad_row_counts": self._bad_rows.counts,
            "first_bad_rows": self._bad_rows.first,
            "cache": self._cache_file,
        }

    def batch(self, rows_B: Tensor, length: int | None = None) -> Batch:
        """Gather samples by number, as sequences of a length; None: of `sequence_length`."""
        position_L = torch.arange(length or self.sequence_length)
        length_B = self._length_E[rows_B]
        # Past a sample's end the index runs into its neighbours; those tokens are replaced.
        index_BL = (self._start_E[rows_B][:, None] + position_L).clamp_max(len(self._tokens_T) - 1)
        inside_BL = position_L < length_B[:, None]
        ids_BL = torch.where(inside_BL, self._tokens_T[index_BL].long(), self.eos_token_id)
        return Batch(
            ids_BL=ids_BL,
            prompt_length_B=self._prompt_E[rows_B].long(),
            end_B=(length_B + 1).clamp_max(self.sequence_length),
            length_B=torch.full_like(length_B, self.sequence_length),
        )


class SampleOrder:
    """The samples of each batch: a new permutation in every epoch, a function of the seed.

    Batches follow each other without gaps, across the ends of epochs.

    Example:
        >>> SampleOrder(num_rows=4, batch_size=4, seed=0).rows(0).sort().values
        tensor([0, 1, 2, 3])
    """

    def __init__(self, *, num_rows: int, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation_E = torch.empty(0, dtype=torch.long)

    def rows(self, step: int) -> Tensor:
        """Sample numbers (B,) of the batch of a step, the first being 0."""
        parts, index = [], step * self.batch_size
        end = index + self.batch_size
        while index < end:
            epoch, offset = divmod(index, self.num_rows)
            part_M = self._permutation(epoch)[offset : offset + end - index]
            parts.append(part_M)
            index += len(part_M)
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            source = generator(self.seed, "order", epoch)
            self._permutation_E = torch.randperm(self.num_rows, generator=source)
            self._epoch = epoch
        return self._permutation_E


def _tensor(values: array[int] | memoryview) -> Tensor:
    return torch.frombuffer(values, dtype=torch.int32)
