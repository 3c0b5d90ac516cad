"""GSM8K's problems as prompts: the form that training rows and benchmarks share."""

from __future__ import annotations

__all__ = ["grade_school_prompt"]


def grade_school_prompt(question: str) -> str:
    r"""The text that asks for a problem's answer, as lm-eval's task gsm8k puts it without examples.

    Example:
        >>> grade_school_prompt("What is 1+1?")
        'Question: What is 1+1?\nAnswer:'
    """
    return f"Question: {question}\nAnswer:"
