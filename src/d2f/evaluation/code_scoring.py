"""Marking generated programs: lm-eval's scoring functions over the sandbox.

The official functions assemble the programs and ask a metric `code_eval` to run them. `CodeEval`
stands in for it: it first collects all programs, runs them in the sandbox many at a time, and then
answers what it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2f.evaluation.code_answer import humaneval_program, mbpp_solution
from d2f.evaluation.code_paper import paper_solution
from d2f.evaluation.harness_answers import cut, first_metric, official_scores, stop_strings
from d2f.evaluation.sandbox import run_programs
from d2f.evaluation.task import Verdict

Execute = Callable[[Sequence[str]], Sequence[Any]]
"""Runs programs; a result has `passed` and `reason`."""


class CodeEval:
    """Takes the place of the hub's metric `code_eval`, for one sample a problem.

    A program is a candidate, a newline and its tests.

    Example:
        >>> from types import SimpleNamespace
        >>> metric = CodeEval(lambda programs: [SimpleNamespace(passed=True, reason="")])
        >>> ask = dict(references=["assert f()"], predictions=[["f = lambda: 1"]], k=[1])
        >>> before = metric.compute(**ask)[0]
        >>> metric.run()
        >>> before, metric.compute(**ask)[0]
        ({'pass@1': 0.0}, {'pass@1': 1.0})
    """

    def __init__(self, execute: Execute = run_programs) -> None:
        self._execute = execute
        self._results: dict[str, Any] = {}
        self._waiting: dict[str, None] = {}

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The share of candidates that pass; 0 for those that have not run yet."""
        programs = [
            f"{candidate}\n{tests}"
            for tests, candidates in zip(references, predictions, strict=True)
            for candidate in candidates
        ]
        self._waiting.update((p, None) for p in programs if p not in self._results)
        passed = [p in self._results and bool(self._results[p].passed) for p in programs]
        return {f"pass@{k[0]}": sum(passed) / len(passed)}, {}

    def run(self) -> None:
        """Run all programs that were asked for."""
        programs = list(self._waiting)
        self._waiting.clear()
        if programs:
            self._results.update(zip(programs, self._execute(programs), strict=True))

    def reason(self, candidate: str, tests: str) -> str | None:
        """Why a candidate failed."""
        result = self._results[f"{candidate}\n{tests}"]
        return None if result.passed else str(result.reason)

    def forget(self) -> None:
        """Drop all programs and results."""
        self._waiting.clear()
        self._results.clear()


class CodeScorer:
    """Marks the answers of `humaneval` and `mbpp`.

    `pass@1` decides: it marks the program that the clean-up finds in an answer (`code_answer`).
    Beside it stands lm-eval's own number, always of the text cut at lm-eval's stop strings:
    `pass@1,create_test` or `pass_at_1,none`.

    Args:
        code_eval: What lm-eval's functions ask to run programs.
        clean_up: "ours"; or "paper", as the authors of D2F do: `code_paper` for HumanEval, and on
            MBPP nothing, so that lm-eval's own number decides.
    """

    def __init__(self, code_eval: CodeEval, *, clean_up: str = "ours") -> None:
        self._code_eval = code_eval
        self._clean_up = clean_up

    def __call__(self, task: Any, docs: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        """Mark one text per problem."""
        pairs = list(zip(docs, texts, strict=True))
        programs = [self._program(task, doc, text) for doc, text in pairs]
        for pair, program in zip(pairs, programs, strict=True):
            self._mark(task, *pair, program)
        self._code_eval.run()
        verdicts = [
            self._verdict(task, *pair, program)
            for pair, program in zip(pairs, programs, strict=True)
        ]
        self._code_eval.forget()
        return verdicts

    def _program(self, task: Any, doc: Mapping[str, Any], text: str) -> str:
        """The program that decides, without the tests."""
        tests = task.doc_to_target(doc)
        if "entry_point" not in doc:
            setup = doc.get("test_setup_code") or ""
            return text if self._clean_up == "paper" else mbpp_solution(text, tests, setup)
        prompt, entry_point = doc["prompt"], doc["entry_point"]
        if self._clean_up == "paper":
            return paper_solution(prompt, text, entry_point)
        return humaneval_program(prompt, text, doc["test"], entry_point).removesuffix(f"\n{tests}")

    def _mark(self, task: Any, doc: Any, text: str, program: str) -> dict[str, float]:
        """The metrics, the first deciding."""
        official = official_scores(task, doc, cut(text, stop_strings(task)))
        if self._clean_up == "paper" and "entry_point" not in doc:
            return official
        tests = [task.doc_to_target(doc)]
        passed, _ = self._code_eval.compute(references=tests, predictions=[[program]], k=[1])
        return {**passed, **official}

    def _verdict(self, task: Any, doc: Any, text: str, program: str) -> Verdict:
        metrics = self._mark(task, doc, text, program)
        return Verdict(
            correct=first_metric(metrics) == 1,
            answer=program,
            reason=self._code_eval.reason(program, task.doc_to_target(doc)),
            metrics=metrics,
        )
