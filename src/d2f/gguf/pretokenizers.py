"""Pre-tokenizers: the rules by which byte-level tokenizers cut a text before they merge bytes.

A GGUF holds only a rule's name, `tokenizer.ggml.pre`, where the hub's tokenizer.json holds the
rule. The rules here are those of the hub's models after which llama.cpp named them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACES}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_SYMBOLS_AND_SPACES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """The rules that one name stands for."""

    cuts: tuple[str, ...] = ()
    """Regular expressions, applied in turn; none: GPT-2's, which `tokenizers` has built in."""
    digits: bool = False
    """Whether each digit is a piece; cut before GPT-2's rule, or after `cuts`."""
    composes: bool = False
    """Whether the text is first normalised to composed characters (NFC)."""
    ignores_merges: bool = False
    """Whether a piece that is itself a token is taken whole, without merging bytes."""
    adds_bos: bool = False
    """Whether texts begin with BOS if the GGUF does not say."""

    def normalizer(self) -> dict[str, Any] | None:
        """Return the entry `normalizer` of tokenizer.json."""
        return {"type": "NFC"} if self.composes else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """Return the entry `pre_tokenizer` of tokenizer.json."""
        steps: list[dict[str, Any]] = [
            {
                "type": "Split",
                "pattern": {"Regex": cut},
                "behavior": "Isolated",
                "invert": False,
            }
            for cut in self.cuts
        ]
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        steps.append(byte_level(use_regex=not self.cuts))
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """Return the step that writes bytes as characters; `use_regex`: it also cuts as GPT-2 does."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


_GPT2_RULE = PreTokenizer()
_DIGITS_RULE = PreTokenizer(digits=True)
_LLAMA3_RULE = PreTokenizer(cuts=(_LLAMA3,), ignores_merges=True, adds_bos=True)
_LLAMA3_WITHOUT_BOS = PreTokenizer(cuts=(_LLAMA3,), ignores_merges=True)
_QWEN2_RULE = PreTokenizer(cuts=(_QWEN2,), composes=True)

PRE_TOKENIZERS = {
    "default": _GPT2_RULE,
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "olmo": _GPT2_RULE,
    "mpt": _GPT2_RULE,
    "jais": _GPT2_RULE,
    "trillion": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "refact": _DIGITS_RULE,
    "codeshell": _DIGITS_RULE,
    "command-r": _DIGITS_RULE,
    "exaone": _DIGITS_RULE,
    "minerva-7b": _DIGITS_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "smaug-bpe": _LLAMA3_RULE,
    "falcon3": _LLAMA3_WITHOUT_BOS,
    "pixtral": _LLAMA3_WITHOUT_BOS,
    "dbrx": PreTokenizer(cuts=(_LLAMA3,)),
    "tekken": PreTokenizer(cuts=(_TEKKEN,), ignores_merges=True, adds_bos=True),
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "megrez": PreTokenizer(cuts=(_QWEN2,)),
    "deepseek-coder": PreTokenizer(cuts=_DEEPSEEK_CODER, digits=True, adds_bos=True),
}
"""Rules by the metadata entry `tokenizer.ggml.pre`."""
