"""The tokenizer: turns text into token ids and back; nothing else in the package does.

It needs the libraries `tokenizers` and `jinja2` only. No code of a checkpoint is executed (its chat
template runs in a sandbox), and the import takes a tenth of a second where that of `transformers`
takes several.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f.chat_template import read_chat_template, render_chat
from d2f.errors import CheckpointError, RequestError
from d2f.hub import resolve_folder
from d2f.text_stream import TextStream, tidy
from d2f.tokenizer_files import TokenizerFiles, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Backend


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    One rule decides about the beginning-of-sequence token (BOS). A prompt, with or without a chat
    template, starts with exactly one BOS in three cases: the template or the text writes one;
    tokenizer_config.json sets `add_bos_token`; or that file does not mention it and the tokenizer's
    own post-processing adds one. In all other cases it starts with none.

    Example:
        >>> from d2f.shipped import shipped_model
        >>> tokenizer = Tokenizer.load(shipped_model())
        >>> tokenizer.decode(tokenizer.encode("1+1="))
        '1+1='
    """

    def __init__(self, files: TokenizerFiles, chat_template: str | None) -> None:
        backend, config = files.backend, files.config
        self._backend = backend
        self._special = files.special
        self.chat_template = chat_template
        """The jinja template that turns messages into one text, if there is one."""
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.mask_token_id = self._id("mask_token")
        self.pad_token_id = self._id("pad_token")
        self.unk_token_id = self._id("unk_token")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        # Some files ask for truncation and padding; both are the trainer's decision.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        self._tidies = _tidies(backend, config)
        self.special_tokens = files.hidden
        """Texts of the tokens that `decode` leaves out by default."""
        begins = config.get("add_bos_token")
        if begins is None:
            processed = backend.encode("a", add_special_tokens=True).ids
            begins = processed[:1] == [self.bos_token_id]
        self._begins = bool(begins)

    @classmethod
    def load(cls, path_or_hub_id: str | Path) -> Tokenizer:
        """Load the tokenizer of a model folder, hub id or GGUF file.

        tokenizer.json is read if it exists, else vocab.json and merges.txt (Qwen2 and Dream).
        Tokens that other files add have the ids and flags that transformers 5 gives them.

        Raises:
            CheckpointError: The folder does not exist or holds no tokenizer; the tokenizer is
                broken or of an unsupported kind; or a file gives an added token an id that the
                vocabulary cannot give it.
        """
        folder = resolve_folder(path_or_hub_id, weights=False)
        files = read_tokenizer(folder)
        return cls(files, read_chat_template(folder, files.config))

    def with_bos(self, add_bos: bool) -> Tokenizer:
        """Return a copy whose prompts begin with the BOS, or to which no BOS is added.

        A BOS that a chat template writes stays, and a prompt never begins with two.

        Raises:
            CheckpointError: `add_bos` is true and the tokenizer has no BOS.

        Example:
            >>> from d2f.shipped import shipped_model
            >>> tokenizer = Tokenizer.load(shipped_model()).with_bos(False)
            >>> tokenizer.encode_prompt("ab", chat=False) == tokenizer.encode("ab")
            True
        """
        if add_bos and self.bos_token_id is None:
            raise CheckpointError("this tokenizer has no BOS token to begin prompts with")
        changed = copy.copy(self)
        changed._begins = add_bos
        return changed

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and other additions."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError):
            raise RequestError("the text is not valid Unicode") from None

    def encode_prompt(self, text: str, *, chat: bool | None = None) -> list[int]:
        """Return the token ids of a prompt, as one user message if there is a chat template.

        Args:
            text: The prompt.
            chat: True requires the chat template, False does without it, None uses it if the
                tokenizer has one.

        Raises:
            RequestError: `chat` is True and there is no template.
        """
        if chat is None:
            chat = self.chat_template is not None
        if chat:
            return self.encode_chat([{"role": "user", "content": text}])
        return self._begin(self.encode(text))

    @functools.cached_property
    def left_out(self) -> tuple[str, ...]:
        """Return which parts of a conversation the chat template silently drops.

        The parts are `system`, the system message, and `history`, all before the last user message.
        The template is tried with and without each; a part is dropped if the token ids are the
        same. A part for which the template raises an error is not listed.

        Example:
            >>> from d2f.shipped import shipped_model
            >>> Tokenizer.load(shipped_model()).left_out
            ('system', 'history')
        """
        question = {"role": "user", "content": "a"}
        before = {
            "system": [{"role": "system", "content": "b"}],
            "history": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
        }
        return tuple(name for name, given in before.items() if self._drops(given, question))

    def _drops(self, given: list[dict[str, str]], question: dict[str, str]) -> bool:
        try:
            return self.encode_chat([*given, question]) == self.encode_chat([question])
        except RequestError:  # no template, or the template refuses the messages
            return False

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: Mappings with `role` and `content`.

        Raises:
            RequestError: A message lacks `role` or `content`, or the template refuses the messages.
            CheckpointError: The template is broken.
        """
        if self.chat_template is None:
            raise RequestError("this tokenizer has no chat template; pass the prompt without one")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise RequestError(f"{message!r} is no message; it needs 'role' and 'content'")
        return self._begin(self.encode(render_chat(self.chat_template, messages, self._special)))

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a whole conversation, without the header of a further answer.

        Raises:
            RequestError: There is no chat template, or the template refuses the messages.
            CheckpointError: The template is broken.
        """
        if self.chat_template is None:
            raise RequestError("this tokenizer has no chat template")
        return render_chat(self.chat_template, messages, self._special, open_answer=False)

    def token_id(self, text: str) -> int | None:
        """Return the id of the token (added ones included) with this text; None if none has it."""
        return self._backend.token_to_id(text)

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """Texts of the added tokens by id; encoding never splits them."""
        added = self._backend.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items()}

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids that the tokenizer does not know add nothing."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return tidy(text) if self._tidies else text

    def decode_after(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text that token ids add when other text stands before them.

        Some tokenizers remove the space of a text's first token; here that space stays.

        Example:
            >>> from d2f.shipped import shipped_model
            >>> tokenizer = Tokenizer.load(shipped_model())
            >>> tokenizer.decode_after(tokenizer.encode(" pens"))
            ' pens'
        """
        stream = self.stream(skip_special_tokens=skip_special_tokens, follows=True)
        return stream.push(ids) + stream.close()

    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text gets, the chat template included."""
        parts = [self._backend.to_str(), self.chat_template, dict(self._special), self._begins]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def stream(self, *, skip_special_tokens: bool = True, follows: bool = False) -> TextStream:
        """Return a decoder for ids that arrive piece by piece; `follows`: other text precedes."""
        return TextStream(
            self._backend.decoder,
            self._token_of(skip_special_tokens),
            tidies=self._tidies,
            follows=follows,
        )

    def _begin(self, ids: list[int]) -> list[int]:
        bos = self.bos_token_id
        if bos is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        return [bos, *ids[start:]] if start or self._begins else ids

    def _token_of(self, skip_special_tokens: bool) -> Callable[[int], str | None]:
        """Return a function from an id to its token; it gives None for tokens not shown."""

        def shown(token_id: int) -> str | None:
            token = self._backend.id_to_token(token_id)
            return None if token in self.special_tokens else token

        return shown if skip_special_tokens else self._backend.id_to_token

    def _id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _tidies(backend: _Backend, config: Mapping[str, Any]) -> bool:
    """Return whether decoding removes spaces before punctuation, as transformers 5 decides it."""
    wanted = config.get("clean_up_tokenization_spaces", False)
    # Meant for WordPiece. The config of many BPE tokenizers asks for it, which would lose spaces.
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    return bool(wanted and (forced or type(backend.model).__name__ != "BPE"))
