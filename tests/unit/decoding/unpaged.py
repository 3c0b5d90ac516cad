"""Batches without the engine, for tests that look inside."""

import torch

from d2f import DecodingPolicy
from d2f.decoding.batch import RowRequest
from d2f.decoding.strategies import STRATEGIES
from d2f.decoding.workspace import Workspace


def sequences(prompts, limits, eos=(), *, seed=7, **settings):
    return [
        RowRequest(
            prompt=prompt,
            max_new_tokens=limit,
            seed=seed,
            policy=DecodingPolicy(),
            eos_token_ids=eos,
            **settings,
        )
        for prompt, limit in zip(prompts, limits, strict=True)
    ]


def start(model, strategy, batch, workspace=None, **options):
    model.prepare_steps()
    workspace = workspace or Workspace(torch.device("cpu"))
    record = STRATEGIES[strategy]
    read = record.read_options(options).for_model(model.spec.architecture)
    return record.decoder_class(model, batch, workspace, read)


def run(model, strategy, batch, workspace=None, **options):
    """The results of a whole run."""
    running = start(model, strategy, batch, workspace, **options)
    while not all(running.finished()):
        running.step()
    return running.results(list(range(len(batch))))


def summary(result):
    return result.token_ids, result.num_forwards, result.num_query_tokens, result.finish_reason
