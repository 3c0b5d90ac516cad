"""Samples of a run's own data that are kept for evaluation and never trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from d2f.errors import TrainingError, counted
from d2f.training.data import TokenDataset
from d2f.training.seeds import generator


class HeldOut(NamedTuple):
    """A sample that is not trained on."""

    prompt_ids: list[int]
    response_ids: list[int]


def hold_out(dataset: TokenDataset, count: int, seed: int) -> list[HeldOut]:
    """Take samples out of a data set, and with them all others that have the same prompts.

    A sample whose response was cut has no answer to be scored by, so it is not chosen.

    Args:
        dataset: Loses the samples; its `num_held_out` says how many, repeated prompts included.
        count: Samples to give back, each of a prompt of its own.
        seed: Chooses them.

    Raises:
        TrainingError: There are not so many, or nothing would be left to train on.
    """
    chosen: dict[tuple[int, ...], HeldOut] = {}
    order = torch.randperm(len(dataset), generator=generator(seed, "held out")).tolist()
    most = dataset.sequence_length
    for row in order:
        if len(chosen) == count:
            break
        prompt_ids, response_ids = dataset.sample(row)
        if response_ids and len(prompt_ids) + len(response_ids) < most:
            chosen.setdefault(tuple(prompt_ids), HeldOut(prompt_ids, response_ids))
    kept_E = torch.tensor(
        [tuple(dataset.sample(row)[0]) not in chosen for row in range(len(dataset))],
        dtype=torch.bool,
    )
    if len(chosen) < count or not kept_E.any():
        raise TrainingError(
            f"evaluate.held_out is {count}, but the data have "
            f"{counted(len(dataset), 'sample', ',')} with "
            f"{len(chosen):,} different prompts among those looked at; lower it"
        )
    before = len(dataset)
    dataset.keep(kept_E)
    dataset.num_held_out = before - len(dataset)
    return list(chosen.values())
