"""One decode-only step in a steady state, to be run again and again by those who measure.

Shapes: B rows of the same length, each with a window of W live tokens.
"""

from __future__ import annotations

import time

import torch

from d2f.decoding.paged import PagedDecoder
from d2f.decoding.rows import (
    NEW_ROW,
    HostRow,
    RowRequest,
    RowSizes,
    RowStorage,
    power_of_two,
)
from d2f.decoding.step import StepShape
from d2f.decoding.strategies import STRATEGIES, default_strategy
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.clock import StepClock
from d2f.engine.runner import Pending, Runner, captured_shape, round_up
from d2f.errors import ConfigError, D2FError
from d2f.models.cache import PagedCache
from d2f.models.transformer import Transformer
from d2f.ops.backend import select_backend

BLOCK_SIZE = 32
_HEAD_START = 50_000_000
"""Clock cycles that a GPU is kept from its work, so that the host's start of a step never shows."""


class SteadyStep:
    """The step of `batch_size` rows that have `kv_length` positions cached and `window` masked.

    Keys and values are random. No token is accepted but the one that the rules force; between two
    runs the rows are put back, so each run does the same. On a GPU the step is a captured graph.
    An autoregressive model computes one token per row.

    Args:
        model: The model.
        batch_size: Rows.
        window: Live tokens of a row, in blocks of 32 or one smaller block.
        kv_length: Cached positions of a row.
        page_size: Positions of a page.
        backend: As in `EngineConfig`.
        max_positions: Longest sequence that the engine would serve; None: the model's own.

    Raises:
        ConfigError: A number is below 1, or an autoregressive model has a window.
        D2FError: The step did not run as planned.

    Example:
        >>> from d2f.testing import tiny_model
        >>> step = SteadyStep(tiny_model("llada"), batch_size=2, window=8, kv_length=20)
        >>> len(step.run(3)), step.num_tokens
        (3, 16)
    """

    def __init__(
        self,
        model: Transformer,
        *,
        batch_size: int,
        window: int,
        kv_length: int,
        page_size: int = 16,
        backend: str = "auto",
        max_positions: int | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "window": window, "kv_length": kv_length}
        for name, value in (sizes | {"page_size": page_size}).items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if model.spec.architecture.causal and window != 1:
            raise ConfigError(
                f"window is {window}; an autoregressive model computes 1 token of a row at a time"
            )
        self.model, self.batch_size, self.window, self.kv_length = (
            model, batch_size, window, kv_length,
        )  # fmt: skip
        self.max_positions = max(max_positions or model.spec.max_positions, kv_length + window)
        operations = select_backend(backend, model.device)
        self.backend = operations.name
        model.prepare_steps()
        pages = -(-(kv_length + window) // page_size)
        cache = PagedCache(
            model.spec,
            num_pages=batch_size * pages + 1,
            page_size=page_size,
            device=model.device,
            dtype=model.dtype,
        )
        cache.kv_N2SKH.normal_()
        imposed = None if model.spec.architecture.causal else (0,)
        decode = STRATEGIES[default_strategy(model.spec, policy=True)].decoder_class
        decoder: PagedDecoder = decode(model, cache, operations, imposed)
        self._shape = self._step_shape(decoder)
        storage = self._filled_rows(decoder, pages)
        self._runner = Runner(decoder, storage, use_graphs=self.on_gpu)
        self._rows = storage.tensors()
        self._saved = [value.clone() for value in self._rows]
        start = time.perf_counter()
        self._check(self._start())
        self.seconds_to_capture = time.perf_counter() - start
        """Compiling kernels included, where no step did so before."""

    @property
    def on_gpu(self) -> bool:
        """Whether the step is a captured graph."""
        return self.model.device.type == "cuda"

    @property
    def num_tokens(self) -> int:
        """Query tokens of all rows."""
        return self.batch_size * self.window

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the step reads: all but the table of embeddings."""
        return self.model.step_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that the step reads once."""
        positions = self.batch_size * (self.kv_length + self.window)
        return PagedCache.page_bytes(self.model.spec, positions, self.model.dtype)

    @property
    def product_flops(self) -> int:
        """Floating-point operations of the products with weights, head included."""
        return 2 * self.num_tokens * self.model.step_products

    @property
    def attention_flops(self) -> int:
        """Floating-point operations of attention: each token with the keys that it sees."""
        spec, window = self.model.spec, self.window
        seen = sum(
            self.kv_length + min((token // BLOCK_SIZE + 1) * BLOCK_SIZE, window)
            for token in range(window)
        )
        return 4 * self.batch_size * seen * spec.num_layers * spec.num_heads * spec.head_dim

    @torch.inference_mode()
    def run(self, count: int) -> list[float]:
        """Run the step `count` times; milliseconds of each."""
        if self.on_gpu:
            torch.cuda._sleep(_HEAD_START)
        clock = self._runner.clock = StepClock(self.model.device)
        try:
            pending = [self._start() for _ in range(count)]
        finally:
            self._runner.clock = None
        milliseconds = [1000 * (step.end - step.begin) for step in clock.times()]
        self._check(pending[-1])
        return milliseconds

    def _step_shape(self, decoder: PagedDecoder) -> StepShape:
        """Size the step as the engine does: exact on a CPU, a captured shape on a GPU."""
        page_size, tokens = decoder.cache.page_size, self.num_tokens
        positions = self.max_positions if self.on_gpu else self.kv_length + self.window
        max_end = -(-positions // page_size) * page_size
        if self.on_gpu:
            return captured_shape(
                self.batch_size,
                round_up(tokens),
                self.window,
                one_token=decoder.one_token,
                max_rows=power_of_two(self.batch_size),
                max_end=max_end,
                least_count=1,
            )
        return StepShape(
            num_rows=self.batch_size,
            num_tokens=tokens,
            num_candidates=self.batch_size if decoder.one_token else tokens,
            max_count=self.window,
            max_end=max_end,
        )

    @torch.inference_mode()
    def _start(self) -> Pending:
        torch._foreach_copy_(self._rows, self._saved)
        return self._runner.start(self._shape)

    def _check(self, pending: Pending) -> None:
        for record in pending.read()[: self.batch_size]:
            if not (record.ran and record.finite):
                raise D2FError("the measured step left a row out, or its logits are not finite")

    def _row(self) -> HostRow:
        """A row whose prompt is cached and whose blocks are all open."""
        causal, size = self.model.spec.architecture.causal, min(BLOCK_SIZE, self.window)
        return HostRow(
            asked=RowRequest(
                prompt=[1] * self.kv_length,
                max_new_tokens=self.window + causal,
                policy=DecodingPolicy(block_size=size),
            ),
            state=NEW_ROW._replace(forwards=1, opened=0 if causal else -(-self.window // size)),
            # Of an autoregressive model the last token is not cached yet.
            tokens=[1, None] if causal else [None] * self.window,
        )

    def _filled_rows(self, decoder: PagedDecoder, num_pages: int) -> RowStorage:
        row, page_size = self._row(), decoder.cache.page_size
        sizes = RowSizes.of(row.asked)
        storage = RowStorage.for_model(
            self.model,
            sizes.rounded() if self.on_gpu else sizes,
            max_rows=self._shape.num_rows,
            num_pages=self._shape.max_end // page_size,
        )
        state, fully = decoder.begin(row, self.kv_length)
        for index in range(self.batch_size):
            storage.write(index, row, state, fully, decoder.threshold(row.asked))
        # Rows that grew together: their pages alternate.
        storage.write_pages(
            [
                (row, index, 1 + index * self.batch_size + row)
                for row in range(self.batch_size)
                for index in range(num_pages)
            ]
        )
        boundary_BD = storage.rows(self.batch_size).boundary_BD
        if boundary_BD is not None:
            boundary_BD.normal_()
        return storage
