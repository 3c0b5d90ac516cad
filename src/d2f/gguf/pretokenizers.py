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

    def pre_tokenizer(self, *, add_prefix_space: bool = False) -> Any:
        """Return the rule as the library `tokenizers` has it."""
        from tokenizers import Regex, pre_tokenizers

        steps: list[Any] = [
            pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in self.cuts
        ]
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.append(
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=not self.cuts)
        )
        return pre_tokenizers.Sequence(steps)


def _named(names: str, rule: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), rule)


PRE_TOKENIZERS = {
    **_named("default gpt-2 phi-2 olmo mpt jais trillion", PreTokenizer()),
    **_named(
        "smollm starcoder refact codeshell command-r exaone minerva-7b", PreTokenizer(digits=True)
    ),
    **_named(
        "llama3 llama-v3 llama-bpe smaug-bpe",
        PreTokenizer(cuts=(_LLAMA3,), ignores_merges=True, adds_bos=True),
    ),
    **_named("falcon3 pixtral", PreTokenizer(cuts=(_LLAMA3,), ignores_merges=True)),
    "dbrx": PreTokenizer(cuts=(_LLAMA3,)),
    "tekken": PreTokenizer(cuts=(_TEKKEN,), ignores_merges=True, adds_bos=True),
    **_named("qwen2 deepseek-r1-qwen", PreTokenizer(cuts=(_QWEN2,), composes=True)),
    "megrez": PreTokenizer(cuts=(_QWEN2,)),
    "deepseek-coder": PreTokenizer(cuts=_DEEPSEEK_CODER, digits=True, adds_bos=True),
}
"""Rules by the metadata entry `tokenizer.ggml.pre`."""
