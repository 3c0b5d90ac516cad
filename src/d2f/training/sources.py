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
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from d2f.errors import ConfigError, RequestError, TrainingError, counted
from d2f.problems import generate_problems
from d2f.problems.functions import generate_function_problems
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
Task = tuple[int, int]
"""Number of problems, and the first of them."""
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
    if config.num_problems is None:
        pairs = _used_rows(config, open_parts(config), BadRows(), lambda pair: pair)
        return islice(pairs, limit)
    return _pairs(_generator(config)(min(config.num_problems, limit or config.num_problems)))


def read_held_out(config: DataConfig, count: int) -> list[Pair]:
    """Read pairs to look at while training: problems of the test split, or the first rows."""
    if config.num_problems is None:
        return list(read_pairs(config, count))
    return list(_pairs(_generator(config)(count, split="test")))


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
    count = config.num_problems
    if count is None:
        return _encode_read(config, tokenizer, spec, note or (lambda text: None))
    tasks = [(min(CHUNK, count - start), start) for start in range(0, count, CHUNK)]
    style = (config.response_suffix, config.chat_template)
    # Settings alone: a recipe would bring torch to the workers.
    encode = partial(_encode_problems, _generator(config), style)
    workers = config.num_workers or (_num_cores() if count >= _POOL_FROM else 1)
    result = Encoded()
    if workers == 1:
        for task in tasks:
            result.extend(encode(tokenizer, task))
        return result
    # Not fork: torch and the tokenizer run threads of their own, which a fork would cut off.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(tasks))
    with ProcessPoolExecutor(workers, context, _start_worker, (str(folder),)) as pool:
        with _no_interrupts():
            parts = pool.map(partial(_run_task, encode), tasks)
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

    Raises `RequestError` where there is no chat template for messages, or it refuses or drops some.
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
    config: DataConfig, tokenizer: Tokenizer, spec: ModelSpec | None, note: Note
) -> Encoded:
    """Encode data that are read, from the cache if they are there."""
    parts = open_parts(config)
    reserved = Reserved.of(tokenizer, spec, config.response_suffix)
    style = (config.response_suffix, config.chat_template)
    written = config.chat_template is False or tokenizer.chat_template is None

    def encode(pair: Pair) -> Sample:
        reserved.check(pair, written=written)
        return _encode_pair(tokenizer, pair, style)

    def samples(bad_rows: BadRows) -> Iterator[Sample]:
        return _used_rows(config, parts, bad_rows, encode)

    file = cache_file(config.cache, _cache_key(config, tokenizer, reserved, parts))
    result = None if file is None else read_cache(file)
    if file is not None and result is None:
        try:
            write_cache(file, samples)
            result = read_cache(file)
        except OSError as error:
            note(f"token ids are not kept in {file.parent}: {error.strerror or error}")
    if result is None:
        result = Encoded()
        for sample in samples(result.bad_rows):
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

    Raises `TrainingError` if there is no such file, folder or data set.
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


def _generator(config: DataConfig) -> Callable[..., Iterable[Any]]:
    """The generator of a recipe's problems, bound to its settings: `(count, start=, split=)`."""
    if config.kind == "functions":
        return partial(generate_function_problems, seed=config.seed, config=config.functions)
    return partial(generate_problems, seed=config.seed, config=config.problems)


def _pairs(problems: Iterable[Any]) -> Iterator[Pair]:
    return (Pair(problem.prompt, problem.response) for problem in problems)


def _encode_problems(
    generate: Callable[..., Iterable[Any]], style: Style, tokenizer: Tokenizer, task: Task
) -> Encoded:
    count, start = task
    return encode_pairs(tokenizer, _pairs(generate(count, start=start)), style)


_worker: list[Tokenizer] = []


def _start_worker(folder: str) -> None:
    # One process per core already; the tokenizer's own threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.append(Tokenizer.load(folder))


def _run_task(encode: Callable[[Tokenizer, Task], Encoded], task: Task) -> Encoded:
    return encode(_worker[-1], task)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
