"""Pairs of prompt and response of a recipe's data, and their token ids.

Free of torch, since the worker processes that encode problems import it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from d2f.errors import ConfigError, RequestError, TrainingError, counted
from d2f.problems import ProblemConfig, generate_problems
from d2f.problems.functions import FunctionConfig, generate_function_problems
from d2f.text import Tokenizer
from d2f.training.pairs import BadRow, BadRows, Pair, Prompt, Reserved, read_pair
from d2f.training.rows import Part, open_parts
from d2f.training.token_cache import Encoded, Sample, cache_file, read_cache, write_cache

if TYPE_CHECKING:
    from d2f.models.spec import ModelSpec
    from d2f.training.sections import DataConfig

Note = Callable[[str], object]
"""Is told in one line what the user should know."""
Style = tuple[str, bool | None]
"""Suffix of responses, and whether prompts go through the chat template."""
Knobs = ProblemConfig | FunctionConfig
Task = tuple[int, int, Knobs, int]
"""Number of problems, seed, settings (whose type names the generator), and the first problem."""
CHUNK = 2_000
"""Problems that one task generates; a fixed number, so that workers do not change the data."""
_POOL_FROM = 20_000
_LEFT_OUT = {"system": "a system message", "history": "what was said before the last question"}
T = TypeVar("T")


def read_pairs(config: DataConfig, limit: int | None = None) -> Iterator[Pair]:
    """Read the pairs of a run's data, at most `limit`; bad rows are left out.

    Raises:
        TrainingError: Data cannot be read or lack a column, or a row is bad and `data.bad_rows` is
            "refuse"; the message names the file and the line.
    """
    knobs = _knobs(config)
    if knobs is None:
        pairs = _used_rows(config, open_parts(config), BadRows(), lambda pair: pair)
        return islice(pairs, limit)
    assert config.num_problems is not None
    count = min(config.num_problems, limit or config.num_problems)
    return _problem_pairs(count, config.seed, knobs)


def read_held_out(config: DataConfig, count: int) -> list[Pair]:
    """Read pairs to look at while training: problems of the test split, or the first rows.

    Raises:
        TrainingError: As `read_pairs`.
    """
    knobs = _knobs(config)
    if knobs is None:
        return list(read_pairs(config, count))
    return list(_problem_pairs(count, config.seed, knobs, split="test"))


def encode_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    note: Note | None = None,
    spec: ModelSpec | None = None,
) -> Encoded:
    """Encode all pairs; `folder` is where worker processes find the same tokenizer.

    The result does not depend on the number of processes, nor on the cache. Rows whose texts hold
    a mask or end token are bad; the model's `spec` may know more of those than the tokenizer.
    `note` is told about bad rows and about a cache that cannot be written.

    Raises:
        ConfigError: `data.chat_template` is true and the tokenizer has none.
        TrainingError: As `read_pairs`, or all rows are bad.
    """
    if config.chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            "data.chat_template is true, but the tokenizer has no chat template; leave it out, or "
            "use a tokenizer that has one"
        )
    knobs = _knobs(config)
    if knobs is None:
        reserved = Reserved.of(tokenizer, spec, config.response_suffix)
        return _encode_read(config, tokenizer, reserved, note or (lambda text: None))
    assert config.num_problems is not None
    starts = range(0, config.num_problems, CHUNK)
    tasks = [
        (min(CHUNK, config.num_problems - start), config.seed, knobs, start) for start in starts
    ]
    workers = config.num_workers or (_num_cores() if config.num_problems >= _POOL_FROM else 1)
    style = (config.response_suffix, config.chat_template)
    result = Encoded()
    if workers == 1:
        for task in tasks:
            result.extend(_encode_problems(tokenizer, style, task))
        return result
    # Not fork: torch and the tokenizer run threads of their own, which a fork would cut off.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(tasks)), context, _start_worker, (str(folder), style)
    ) as pool:
        with _no_interrupts():
            parts = pool.map(_run_task, tasks)
        for part in parts:
            result.extend(part)
    return result


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes that are started within it leave an interrupt at the terminal to this one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_pairs(tokenizer: Tokenizer, pairs: Iterable[Pair], style: Style = ("", None)) -> Encoded:
    """Encode pairs: the prompt through the chat template, the response as it is."""
    result = Encoded()
    for pair in pairs:
        result.add(*_encode_pair(tokenizer, pair, style))
    return result


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, chat: bool | None = None) -> list[int]:
    """Encode a prompt, up to where the response begins; `chat` is `data.chat_template`.

    Raises:
        RequestError: Messages without a chat template, or the template refuses them, or leaves
            out some without a word.
    """
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt, chat=chat)
    if chat is False or tokenizer.chat_template is None:
        raise RequestError("several messages, and no chat template to write them")
    roles = [message["role"] for message in prompt]
    has = {"system": "system" in roles, "history": len(roles) > 1 + roles.count("system")}
    for kind in tokenizer.left_out:
        if has[kind]:
            raise RequestError(f"the chat template leaves out {_LEFT_OUT[kind]}")
    return tokenizer.encode_chat(prompt)


def _encode_pair(tokenizer: Tokenizer, pair: Pair, style: Style) -> Sample:
    suffix, chat = style
    return encode_prompt(tokenizer, pair.prompt, chat), tokenizer.encode(pair.response + suffix)


def _encode_read(
    config: DataConfig, tokenizer: Tokenizer, reserved: Reserved, note: Note
) -> Encoded:
    """Encode data that are read, from the cache if they are there."""
    parts = open_parts(config)
    bad_rows = BadRows()
    style = (config.response_suffix, config.chat_template)
    written = config.chat_template is False or tokenizer.chat_template is None

    def encode(pair: Pair) -> Sample:
        reserved.check(pair, written=written)
        return _encode_pair(tokenizer, pair, style)

    def samples() -> Iterator[Sample]:
        bad_rows.clear()
        return _used_rows(config, parts, bad_rows, encode)

    file = cache_file(config.cache, _cache_key(config, tokenizer, reserved, parts))
    result = None if file is None else read_cache(file)
    if file is not None and result is None:
        try:
            write_cache(file, samples, bad_rows)
            result = read_cache(file)
        except OSError as error:
            note(f"token ids are not kept in {file.parent}: {error.strerror or error}")
    if result is None:
        result = Encoded(bad_rows=bad_rows)
        for sample in samples():
            result.add(*sample)
    bad = result.bad_rows
    if bad.count:
        rows = counted(bad.count + len(result.prompt_lengths), "row", ",")
        note(f"{bad.count:,} of {rows} are bad and left out: {bad.text()}")
    return result


def cached_data(
    config: DataConfig, tokenizer: Tokenizer, spec: ModelSpec | None = None
) -> Encoded | None:
    """Data that were read before, from the cache; None if they are not there.

    Raises:
        TrainingError: There is no such file, folder or data set.
    """
    reserved = Reserved.of(tokenizer, spec, config.response_suffix)
    key = _cache_key(config, tokenizer, reserved, open_parts(config))
    file = cache_file(config.cache, key)
    return None if file is None else read_cache(file)


def _used_rows(
    config: DataConfig, parts: list[Part], bad_rows: BadRows, use: Callable[[Pair], T]
) -> Iterator[T]:
    """Give what `use` makes of each row's pair; rows that it or `read_pair` refuses are bad."""
    found_any = False
    for where, row in chain.from_iterable(part.rows() for part in parts):
        columns: object = row
        try:
            if isinstance(row, BadRow):
                raise row
            pair = read_pair(row, config.columns)
            columns = None  # they are as they should be
            used = use(pair)
        except (BadRow, RequestError) as error:
            if config.bad_rows == "refuse":
                raise TrainingError(
                    f'{where}: {error}; data.bad_rows = "report" leaves such rows out and counts '
                    "them"
                ) from None
            bad_rows.add(where, str(error), columns)
        else:
            found_any = True
            yield used
    if bad_rows.count and not found_any:
        columns_text = ", ".join(sorted(bad_rows.columns))
        remedy = f". The rows have the columns: {columns_text}. Map them in [data.columns]"
        raise TrainingError(
            f"none of {counted(bad_rows.count, 'row', ',')} can be used: {bad_rows.text()}"
            f"{remedy if columns_text else ''}"
        )


def _cache_key(
    config: DataConfig, tokenizer: Tokenizer, reserved: Reserved, parts: list[Part]
) -> list[Any]:
    """All that token ids depend on; not lengths, since samples are cut and dropped later."""
    return [
        tokenizer.fingerprint(),
        asdict(config.columns),
        [config.response_suffix, config.chat_template, config.bad_rows],
        asdict(reserved),
        [[type(part).__name__, *part.identity()] for part in parts],
    ]


def _knobs(config: DataConfig) -> Knobs | None:
    """The generator's settings; None for data that are read."""
    if config.kind == "functions":
        return config.functions
    return config.problems if config.kind == "problems" else None


def _problem_pairs(
    count: int, seed: int, knobs: Knobs, start: int = 0, split: str = "train"
) -> Iterator[Pair]:
    problems: Iterable[Any]
    if isinstance(knobs, FunctionConfig):
        problems = generate_function_problems(
            count, seed=seed, split=split, config=knobs, start=start
        )
    else:
        problems = generate_problems(count, seed=seed, split=split, config=knobs, start=start)
    return (Pair(problem.prompt, problem.response) for problem in problems)


def _encode_problems(tokenizer: Tokenizer, style: Style, task: Task) -> Encoded:
    count, seed, knobs, start = task
    return encode_pairs(tokenizer, _problem_pairs(count, seed, knobs, start), style)


_worker: list[tuple[Tokenizer, Style]] = []


def _start_worker(folder: str, style: Style) -> None:
    # One process per core already; the tokenizer's own threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.append((Tokenizer.load(folder), style))


def _run_task(task: Task) -> Encoded:
    return _encode_problems(*_worker[-1], task)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
