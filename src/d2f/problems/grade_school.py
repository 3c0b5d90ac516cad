"""Prompts of GSM8K's problems, in the form that training rows and benchmarks share."""

from __future__ import annotations


def grade_school_prompt(question: str) -> str:
    r"""Return the prompt of a problem as lm-eval's task gsm8k writes it without examples.

    Example:
        >>> grade_school_prompt("What is 1+1?")
        'Question: What is 1+1?\nAnswer:'
    """
    return f"Question: {question}\nAnswer:"
