"""The engines of an evaluation: one for each model and batch size."""

from __future__ import annotations

from collections.abc import Sequence

from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.sizing import enough_bytes, free_bytes
from d2f.evaluation.eval_row import EvalRow

_MEMORY_SHARE = 0.5
"""Of the free memory, at most; another engine may come."""


class Engines:
    """Makes engines when they are asked for, and keeps them.

    Args:
        rows: Whatever they will be asked to answer.
        backend: As `EngineConfig` takes it.

    Example:
        `Engines(rows).of(rows[0], batch_size=64).generate([rows[0].request(0)])`
    """

    def __init__(self, rows: Sequence[EvalRow], backend: str = "auto") -> None:
        self._backend = backend
        self._engines: dict[tuple[str, int], Engine] = {}
        self._longest: dict[str, int] = {}
        for row in rows:
            known = self._longest.get(row.settings.model, 0)
            self._longest[row.settings.model] = max(known, row.longest)

    def of(self, row: EvalRow, batch_size: int) -> Engine:
        """The engine for a row's model at this batch size."""
        key = (row.settings.model, batch_size)
        if key not in self._engines:
            model, config = row.loaded.model, EngineConfig(max_batch_size=batch_size)
            longest = self._longest[row.settings.model]
            enough = enough_bytes(
                model.spec,
                [longest] * batch_size,
                page_size=config.page_size,
                max_batch_size=batch_size,
                dtype=model.dtype,
            )
            room = max(int(_MEMORY_SHARE * free_bytes(model.device)), 1)
            config = EngineConfig(
                max_batch_size=batch_size, kv_cache_bytes=min(enough, room), backend=self._backend
            )
            self._engines[key] = Engine(model, config, row.loaded.tokenizer)
        return self._engines[key]

    def close(self) -> None:
        """Give all memory back."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
