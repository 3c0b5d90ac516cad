"""What can be said of a run's data without reading them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from d2f.errors import D2FError, counted
from d2f.models.spec import ModelSpec
from d2f.text import Tokenizer
from d2f.training.assemble import find_tokenizer
from d2f.training.config import TrainConfig
from d2f.training.data import TokenDataset
from d2f.training.packing import pack_samples
from d2f.training.sources import cached_data


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """How many samples a run has."""

    num_samples: int | None
    """None: not known without reading them."""
    num_rows: int | None = None
    """Sequences of an epoch: as many, or with `padding = "packed"` the rows that hold them; None:
    not known without reading them."""
    note: str
    """How that is known, or why it is not."""


def plan_data(config: TrainConfig, spec: ModelSpec) -> DataPlan:
    """Count the samples if that is cheap: problems that are generated, or data in the cache."""
    settings = config.data
    if settings.num_problems is not None:
        note = "generated; those that do not fit are dropped when the run starts"
        share = None if settings.padding == "packed" else 1.0
        return _without_held_out(settings.num_problems, config, note, share)
    try:
        folder = find_tokenizer(config)
        if folder is None:
            return _unknown("the tokenizer is trained when the run starts")
        mask = config.model.mask_token_id
        own = spec if mask is None else replace(spec, mask_token_id=mask)
        encoded = cached_data(settings, Tokenizer.load(folder), own)
        if encoded is None:
            return _unknown("the data have not been read with these settings yet")
        dataset = TokenDataset(encoded, settings, eos_token_id=(*spec.eos_token_ids, 0)[0])
    except D2FError as error:
        return _unknown(str(error).partition(". ")[0])
    share = 1.0
    if settings.padding == "packed":
        share = pack_samples(dataset, config).num_rows / len(dataset)
    return _without_held_out(len(dataset), config, "counted in the cache of token ids", share)


def _without_held_out(count: int, config: TrainConfig, note: str, share: float | None) -> DataPlan:
    """The plan, where `share` says how many rows there are for each sample (None: not known)."""
    held_out = (config.evaluate.held_out or 0) if config.evaluate else 0
    if held_out >= count:
        return _unknown(
            f"evaluate.held_out {held_out} leaves nothing of {counted(count, 'sample')}"
        )
    left = count - held_out
    rows = None if share is None else math.ceil(left * share)
    return DataPlan(num_samples=left, num_rows=rows, note=note)


def _unknown(reason: str) -> DataPlan:
    return DataPlan(num_samples=None, note=reason)
