"""Turn rows of a file of prompts into requests, and finished answers into lines of output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from d2f.cli.answer_file import AnswerFile
from d2f.cli.asked import Asked
from d2f.cli.prompt_file import PromptFile, PromptRow
from d2f.cli.usage import UsageError
from d2f.errors import RequestError, counted
from d2f.training.pairs import BadRow, BadRows

if TYPE_CHECKING:
    from d2f.engine.request import Request
    from d2f.evaluation.answering import Answer
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer


class AnswerDesk:
    """Makes a request for each missing answer, and a line for each finished one.

    Args:
        source: The rows with prompts.
        answers: The file of answers; rows that it already answers get no request.
        asked: The options of the command, which decide how prompts are encoded.
        model: The model that answers.
        tokenizer: The model's tokenizer.
        request: The settings that all requests share.
        num_samples: Number of answers for each row.
    """

    def __init__(
        self,
        source: PromptFile,
        answers: AnswerFile,
        asked: Asked,
        model: Transformer,
        tokenizer: Tokenizer,
        request: Request,
        *,
        num_samples: int,
    ) -> None:
        self._source, self._answers, self._asked = source, answers, asked
        self._spec, self._tokenizer, self._request = model.spec, tokenizer, request
        self._num_samples = num_samples
        self.bad_rows = BadRows()
        """Rows without a prompt, and rows whose request failed."""
        self._open: dict[int, tuple[PromptRow, int, Request]] = {}
        """Row, sample and request of each answer in progress, by its number."""
        self._failed: set[int] = set()

    def numbers(self) -> Iterator[int]:
        """Yield a number for each missing answer; bad rows are counted and get no number."""
        number = 0
        for row in self._source.prompts(self.bad_rows):
            samples = range(self._num_samples)
            missing = [one for one in samples if not self._answers.has(row.number, one)]
            if not missing:
                continue
            try:
                request = self._ask(row)
            except (BadRow, RequestError) as error:
                self.bad_rows.add(self._source.where(row.number), str(error))
                continue
            for sample in missing:
                number += 1
                self._open[number] = row, sample, self._seeded(request, row.number, sample)
                yield number

    def request(self, number: int) -> Request:
        """Return the request with a number."""
        return self._open[number][2]

    def take(self, finished: Sequence[Answer]) -> list[dict[str, Any]]:
        """The lines of answers; what has failed is counted."""
        records = []
        for answer in finished:
            row, sample, request = self._open.pop(answer.index)
            if answer.error is None:
                records.append(self._record(row, sample, request, answer))
            elif row.number not in self._failed:
                self._failed.add(row.number)
                self.bad_rows.add(self._source.where(row.number), answer.error)
        return records

    def _ask(self, row: PromptRow) -> Request:
        prompt_ids = self._asked.prompt_ids(self._tokenizer, row.prompt)
        try:
            request = self._asked.limited(self._request, self._spec, prompt_ids)
        except UsageError as error:
            # The options fit the model, but not the few positions that this prompt leaves.
            raise BadRow(str(error)) from None
        if len(prompt_ids) + request.max_new_tokens > self._spec.max_positions:
            raise BadRow(
                f"the prompt and {counted(request.max_new_tokens, 'new token')} are more than the "
                f"model's {counted(self._spec.max_positions, 'position')}"
            )
        return request

    def _seeded(self, request: Request, row: int, sample: int) -> Request:
        """With noise of its own, which depends on nothing but the seed and the place."""
        from d2f.training.data import derive_seed

        if request.temperature == 0:
            return request
        return replace(request, seed=derive_seed(request.seed, f"answer {sample}", row))

    def _record(
        self, row: PromptRow, sample: int, request: Request, answer: Answer
    ) -> dict[str, Any]:
        from d2f.engine.response_text import ResponseText

        ends = self._spec.eos_token_ids
        text = ResponseText(self._tokenizer, eos_token_ids=ends, stop=request.stop).end(
            answer.token_ids
        )
        new: dict[str, Any] = {}
        if row.messages is not None:
            new[row.messages] = self._continued(row.row[row.messages], text)
        new |= {self._source.columns.response: text, "row": row.number}
        if self._num_samples > 1:
            new["sample"] = sample
        if request.temperature > 0:
            new["seed"] = request.seed
        new |= {
            "num_tokens": len(answer.token_ids),
            "num_forwards": answer.num_forwards,
            "finish_reason": answer.finish_reason,
        }
        return kept_columns(row.row, new, row.messages) | new

    def _continued(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[Any]:
        """Return the conversation with the answer at its end, replacing an assistant's message."""
        columns = self._source.columns
        last = messages[-1][columns.role]
        before = messages[:-1] if columns.roles.get(last, last) == "assistant" else messages
        return [*before, {columns.role: "assistant", columns.content: text}]


def kept_columns(
    row: Mapping[str, Any], new: Mapping[str, Any], messages: str | None = None
) -> dict[str, Any]:
    """Return the columns of a row to keep beside those of its answer, renamed if names collide.

    Args:
        row: The row as it was read.
        new: The columns of the answer.
        messages: The column with the conversation. It is not kept if `new` only continues it.

    Example:
        >>> kept_columns({"response": "gold", "id": 7}, {"response": "2", "row": 1})
        {'input_response': 'gold', 'id': 7}
    """
    kept: dict[str, Any] = {}
    for name, value in row.items():
        if name == messages and len(new[name]) > len(value):
            continue
        free = name
        while free in new or free in kept or (free != name and free in row):
            free = f"input_{free}"
        kept[free] = value
    return kept
