"""Trains the small byte-level BPE tokenizer of models that are made from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

EOS, BOS, MASK, ANSWER = "<|endoftext|>", "<|startoftext|>", "<|mask|>", "<|answer|>"
SPECIAL_TOKENS = (EOS, BOS, MASK, ANSWER)
"""Special tokens; their ids are 0, 1, 2, 3."""

QUESTION_TEMPLATE = (
    "{# This model was trained on single questions: it is given the user's last message, without "
    "system messages and without what was said before. #}"
    "{% set last = namespace(at=none) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% if last.at is none %}"
    "{{ raise_exception('this model answers a message of the user, and there is none') }}"
    "{% endif %}"
    "{{ bos_token + messages[last.at]['content'] + '<|answer|>' }}"
    "{% for message in messages[last.at + 1:] %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Chat template of models trained on single questions, the shipped ones among them."""

CONVERSATION_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '<|answer|>' }}{% endif %}"
    "{% endfor %}"
)
"""Chat template of models whose data hold several messages before an answer."""


def train_tokenizer(
    texts: Iterable[str], folder: str | Path, *, vocab_size: int, single_questions: bool = False
) -> Path:
    """Train a tokenizer on texts and write tokenizer.json and tokenizer_config.json.

    Byte-level BPE whose digits stand alone, so that numbers are read digit by digit. A prompt is
    BOS, the question, `<|answer|>`; EOS is the padding too. The same texts give the same files.

    Args:
        texts: Prompts and responses.
        folder: Created if need be.
        vocab_size: Tokens in all, the four special ones and 256 bytes among them.
        single_questions: The data hold neither system messages nor what was said before. The chat
            template then gives the model what it is trained on, the last question alone.

    Example:
        >>> from tempfile import mkdtemp
        >>> sorted(path.name for path in train_tokenizer(["a a"], mkdtemp(), vocab_size=260)
        ...        .iterdir())
        ['tokenizer.json', 'tokenizer_config.json']
    """
    # Late: recipes are parsed, and batches drawn, without it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "extra_special_tokens": [ANSWER],
        "clean_up_tokenization_spaces": False,
        "chat_template": QUESTION_TEMPLATE if single_questions else CONVERSATION_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder
