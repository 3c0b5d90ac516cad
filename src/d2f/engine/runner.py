"""Steps: their sizes, and how they run: at once on a CPU, as captured graphs on a GPU.

On a GPU the results of a step are read later.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2f.decoding.alternatives import MOST_ALTERNATIVES
from d2f.decoding.paged import PagedDecoder
from d2f.decoding.rows import RowStorage, power_of_two
from d2f.decoding.step import RowRecord, StepShape, read_record
from d2f.engine.clock import StepClock, StepTime
from d2f.engine.request import Task

PROMPT_ROWS, PROMPT_TOKENS = 4, 512
"""Steps with prompts are captured up to so many rows and tokens, whatever the model's size."""
CHEAP_FLOPS, CHEAP_TOKENS = 1e12, 4096
"""Most operations and tokens of steps with prompts that are captured with more rows than that."""
MOST_GRAPHS = 256
"""Beyond so many the graph unused for longest is given up."""

LEAST_COUNT = 64
"""Rows of up to so many tokens share captured steps."""
_STEPS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
FREE_TOKENS = 192
"""Up to about so many query tokens a step is bound by reading the weights; further ones cost
little: on an H100 a step of 64 takes 1.13 times that of one token, of 128 1.28 times."""


def round_up(count: int, steps: Sequence[int] = _STEPS) -> int:
    """The smallest captured size that holds `count`: fine at first, then by quarters of a power.

    Example:
        >>> [round_up(n) for n in (1, 33, 200, 1100)]
        [1, 64, 256, 1280]
    """
    for step in steps:
        if count <= step:
            return step
    quarter = 1 << ((count - 1).bit_length() - 3)
    return -(-count // quarter) * quarter


def captured_shape(
    num_rows: int,
    num_tokens: int,
    longest: int,
    *,
    one_token: bool,
    max_rows: int,
    max_end: int,
    least_count: int = LEAST_COUNT,
    **kinds: Any,
) -> StepShape:
    """The smallest captured shape that holds a step without prompts.

    Args:
        num_rows: Rows that run.
        num_tokens: Their tokens, rounded up.
        longest: Most tokens of a row.
        one_token: As `PagedDecoder.one_token`.
        max_rows: Rows of the storage.
        max_end: A bound for the end of every row.
        least_count: The shape lets a row have so many tokens, whatever the longest has.
        kinds: The other fields of the shape.
    """
    num_rows = min(power_of_two(num_rows), max_rows)
    return StepShape(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_candidates=num_rows if one_token else num_tokens,
        max_count=1 if one_token else min(max(power_of_two(longest), least_count), num_tokens),
        max_end=max_end,
        **kinds,
    )


@dataclass(frozen=True, eq=False)
class Pending:
    """A step that was started."""

    shape: StepShape
    record: Tensor
    """Record on the host; on a GPU it is there once `ready` has happened."""
    ready: torch.cuda.Event | None
    clock: StepClock | None = None
    time: StepTime | None = None
    """The clock's note of the step, if there is a clock."""

    def read(self) -> list[RowRecord]:
        """Wait for the step and return its report of each row."""
        if self.ready is not None:
            with self.clock.waiting() if self.clock else nullcontext():
                self.ready.synchronize()
        return read_record(self.record, self.shape.num_rows, self.shape.num_alternatives)


class Runner:
    """Runs a decoder on the rows of a storage.

    Args:
        decoder: The strategy.
        storage: The rows.
        use_graphs: Capture shapes of steps as CUDA graphs when they first occur, and replay them
            from then on; of steps with prompts only small ones, and when they occur again.
    """

    def __init__(self, decoder: PagedDecoder, storage: RowStorage, *, use_graphs: bool) -> None:
        self.decoder, self._storage, self._use_graphs = decoder, storage, use_graphs
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """The one used last comes last."""
        self._seen_prompts: set[StepShape] = set()
        self._pool = torch.cuda.graph_pool_handle() if use_graphs else None
        self.clock: StepClock | None = None
        """Notes when steps run, while somebody wants to know."""

    @property
    def storage(self) -> RowStorage:
        """The rows."""
        return self._storage

    @storage.setter
    def storage(self, storage: RowStorage) -> None:
        self._storage = storage
        # They hold the addresses of the former rows. A pool that no graph uses any more cannot be
        # captured into again.
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None

    @property
    def num_graphs(self) -> int:
        """Shapes captured so far."""
        return len(self._graphs)

    def captures_prompts(self, num_rows: int, num_tokens: int) -> bool:
        """Whether a step with a prompt is captured: where launching would take longer than running.

        Of larger ones there are too many shapes.
        """
        few = num_rows <= PROMPT_ROWS and num_tokens <= PROMPT_TOKENS
        flops = 2 * self.decoder.model.spec.num_parameters * num_tokens
        return self._use_graphs and (few or (flops <= CHEAP_FLOPS and num_tokens <= CHEAP_TOKENS))

    def _is_captured(self, shape: StepShape) -> bool:
        """Whether there is a graph of this shape, once it was captured if it should be."""
        if shape in self._graphs:
            return True
        if shape.prefill:
            if not self.captures_prompts(shape.num_rows, shape.num_tokens):
                return False
            # Prompts come in many lengths; a graph pays off when a length comes back.
            if shape not in self._seen_prompts:
                self._seen_prompts.add(shape)
                return False
        self.capture(shape)
        return True

    @torch.inference_mode()
    def start(self, shape: StepShape) -> Pending:
        """Start a step; on a GPU this does not wait for it."""
        replayed = self._use_graphs and self._is_captured(shape)
        with self.clock.step(shape) if self.clock else nullcontext() as time:
            if replayed:
                graph, record = self._graphs[shape] = self._graphs.pop(shape)
                graph.replay()
            else:
                record = self.decoder.step(self._storage.rows(shape.num_rows), shape)
        if not record.is_cuda:
            return Pending(shape, record, None, self.clock, time)
        host = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
        host.copy_(record, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Pending(shape, host, ready, self.clock, time)

    @torch.inference_mode()
    def capture(self, shape: StepShape) -> None:
        """Capture the graph of a shape."""
        rows = self._storage.rows(shape.num_rows)
        # Compiles kernels and makes library handles, which capturing must not. Rows that are done
        # are left as they are.
        done_B = rows.state.done.clone()
        rows.state.done.fill_(1)
        self.decoder.step(rows, shape)
        rows.state.done.copy_(done_B)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            record = self.decoder.step(rows, shape)
        self._graphs[shape] = graph, record
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]


@dataclass(frozen=True)
class StepSizer:
    """Chooses the shapes of a runner's steps: exact ones, or the smallest captured that fit.

    Args:
        runner: It runs the steps.
        max_end: A bound for the end of every row.
        exact: The host knows where every row stands, so no step need be larger than its rows.
    """

    runner: Runner
    max_end: int
    exact: bool

    def shape(self, running: Sequence[Task]) -> StepShape:
        """The shape of the next step of some requests, by their rows."""
        decoder = self.runner.decoder
        spans = [decoder.span(task, task.num_in_flight) for task in running]
        prompts = [len(task.asked.prompt) for task in running]
        prefill = any(start < prompt for (start, _), prompt in zip(spans, prompts, strict=True))
        if prefill or any(task.stalled for task in running):
            # Nothing may sit out: a step that reads prompts must not be mistaken for another.
            spans = [(min(t.state.start, s), e) for t, (s, e) in zip(running, spans, strict=True)]
        counts, kinds = [end - start for start, end in spans], self._kinds(running)
        num_rows, tokens, longest = len(running), sum(counts), max(counts)
        if self.exact:
            return StepShape(
                num_rows=num_rows,
                num_tokens=tokens,
                num_candidates=max(sum(map(decoder.num_candidates, running)), 1),
                max_count=longest,
                max_end=max(end for _, end in spans),
                prefill=prefill,
                **kinds,
            )
        if not prefill:
            return captured_shape(
                num_rows,
                self._bucket(running, counts),
                longest,
                one_token=decoder.one_token,
                max_rows=self.runner.storage.max_rows,
                max_end=self.max_end,
                **kinds,
            )
        num_rows = min(power_of_two(num_rows), self.runner.storage.max_rows)
        candidates = sum(
            end - max(start, prompt) for (start, end), prompt in zip(spans, prompts, strict=True)
        )
        if self.runner.captures_prompts(num_rows, tokens):
            # Few shapes: what may be larger than it need be is.
            tokens, candidates = round_up(tokens), max(power_of_two(candidates), 32)
            longest = tokens
        return StepShape(
            num_rows=num_rows,
            num_tokens=tokens,
            num_candidates=num_rows if decoder.one_token else candidates,
            max_count=longest,
            max_end=self.max_end,
            prefill=True,
            **kinds,
        )

    def _kinds(self, running: Sequence[Task]) -> dict[str, Any]:
        """The work that some row asks for; part of the step's shape."""
        asked = [task.asked for task in running]
        sampled = [one for one in asked if one.temperature > 0]
        return {
            "sampled": bool(sampled),
            "truncated": any(one.top_k > 0 or one.top_p < 1 or one.min_p > 0 for one in sampled),
            "ranked": any(one.policy.confidence != "probability" for one in asked),
            # All that may be asked for, so that there are few shapes.
            "num_alternatives": min(MOST_ALTERNATIVES, self.runner.decoder.model.spec.vocab_size)
            if any(one.num_alternatives for one in asked)
            else 0,
        }

    def _bucket(self, running: Sequence[Task], counts: Sequence[int]) -> int:
        """Query tokens of a step without a prompt.

        A bound for all rows would compute up to a block more for each of them. Where tokens cost,
        what the rows had last and an eighth more must do; rows that do not fit sit one step out,
        and the next step then has room for all.
        """
        bound = sum(counts)
        if bound > FREE_TOKENS and not any(task.stalled for task in running):
            known = sum(task.state.end - task.state.start for task in running)
            bound = min(bound, max(known + known // 8, FREE_TOKENS, max(counts)))
        return round_up(bound)
