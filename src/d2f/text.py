"""Text to token ids and back: the only place in the package where this happens.

Built on `tokenizers` and a sandboxed `jinja2` alone. Nothing of a checkpoint is executed, and the
import takes a tenth of a second where `transformers` takes several.
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

    Beginning-of-sequence tokens follow one rule. A prompt, with or without a chat template, starts
    with exactly one BOS if the template or the text writes it, if tokenizer_config.json says
    `add_bos_token`, or, where that says nothing, if the tokenizer's own post-processing adds it;
    otherwise with none. Never with two.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
        >>> tokenizer.decode(tokenizer.encode_prompt("1+1="))
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
        # Some files ask for cutting and padding, which is for their trainer to know.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        self._tidies = _tidies(backend, config)
        self.special_tokens = files.hidden
        """Texts of the tokens that `decode` leaves out unless it is told to show them."""
        begins = config.get("add_bos_token")
        if begins is None:
            processed = backend.encode("a", add_special_tokens=True).ids
            begins = processed[:1] == [self.bos_token_id]
        self._begins = bool(begins)

    @classmethod
    def load(cls, path_or_hub_id: str | Path) -> Tokenizer:
        """Load the tokenizer of a model folder, hub id or GGUF file.

        tokenizer.json is read if there; else vocab.json and merges.txt, for Qwen2 and Dream. Tokens
        that other files add have the ids and flags that transformers 5 gives them.

        Raises:
            CheckpointError: There is no such folder or no tokenizer in it, or it is broken or of
                another kind, or a file gives an added token an id that it cannot have.
        """
        folder = resolve_folder(path_or_hub_id, weights=False)
        files = read_tokenizer(folder)
        return cls(files, read_chat_template(folder, files.config))

    def with_bos(self, add_bos: bool) -> Tokenizer:
        """The same tokenizer, whose prompts begin with its BOS, or with none that it adds itself.

        A BOS that a chat template writes stays, and there are never two.

        Raises:
            CheckpointError: A BOS is asked for, and the tokenizer has none.

        Example:
            >>> from d2f.testing import write_tokenizer
            >>> import tempfile
            >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
            >>> len(tokenizer.with_bos(False).encode_prompt("ab"))
            2
        """
        if add_bos and self.bos_token_id is None:
            raise CheckpointError("this tokenizer has no BOS token to begin prompts with")
        changed = copy.copy(self)
        changed._begins = add_bos
        return changed

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a BOS or other additions."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError):
            raise RequestError("the text is not valid Unicode") from None

    def encode_prompt(self, text: str, *, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt, as one message of the user if the tokenizer has a chat template.

        Args:
            text: The prompt.
            chat: True demands the template, False leaves it out, None uses it if there is one.

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
        """What the chat template drops from a conversation without a word, found by trying.

        Of `system`, a system message, and `history`, all before the user's last message, those
        that leave the token ids as they are. What a template refuses is not dropped.

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
        except RequestError:  # no template, or one that says no
            return False

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next answer begins.

        Args:
            messages: Mappings with `role` and `content`.

        Raises:
            RequestError: The messages are not of that form, or the template refuses them.
            CheckpointError: The template is broken.
        """
        if self.chat_template is None:
            raise RequestError("this tokenizer has no chat template; pass the prompt without one")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise RequestError(f"{message!r} is no message; it needs 'role' and 'content'")
        return self._begin(self.encode(render_chat(self.chat_template, messages, self._special)))

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Text of a conversation that is over: no answer of the assistant's begins behind it.

        Raises:
            RequestError: There is no chat template, or it refuses the messages.
            CheckpointError: The template is broken.
        """
        if self.chat_template is None:
            raise RequestError("this tokenizer has no chat template")
        return render_chat(self.chat_template, messages, self._special, open_answer=False)

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary, or an added token, spells like this."""
        return self._backend.token_to_id(text)

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """Texts of the tokens that are kept whole wherever they stand in a text, by id."""
        added = self._backend.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items()}

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give nothing."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return tidy(text) if self._tidies else text

    def decode_after(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text that token ids add behind other text.

        Some tokenizers take the space from a token that a text begins with; here it stays.

        Example:
            >>> from tokenizers import Tokenizer as Backend, decoders, models
            >>> from d2f.testing import write_tokenizer
            >>> import tempfile
            >>> folder = write_tokenizer(tempfile.mkdtemp())
            >>> backend = Backend(models.WordLevel({"▁a": 0}, unk_token="▁a"))
            >>> backend.decoder = decoders.Metaspace()
            >>> backend.save(str(folder / "tokenizer.json"))
            >>> tokenizer = Tokenizer.load(folder)
            >>> tokenizer.decode([0]), tokenizer.decode_after([0])
            ('a', ' a')
        """
        stream = self.stream(skip_special_tokens=skip_special_tokens, follows=True)
        return stream.push(ids) + stream.close()

    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text gets, the chat template included."""
        parts = [self._backend.to_str(), self.chat_template, dict(self._special), self._begins]
        return hashlib.blake2b(
            json.dumps(parts, sort_keys=True).encode(), digest_size=16
        ).hexdigest()

    def stream(self, *, skip_special_tokens: bool = True, follows: bool = False) -> TextStream:
        """A decoder for ids that arrive bit by bit; `follows`: behind other text."""
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
        """What finds the token of an id, None for one that is not shown."""

        def shown(token_id: int) -> str | None:
            token = self._backend.id_to_token(token_id)
            return None if token in self.special_tokens else token

        return shown if skip_special_tokens else self._backend.id_to_token

    def _id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _tidies(backend: _Backend, config: Mapping[str, Any]) -> bool:
    """Whether decoded texts lose spaces before punctuation, as transformers 5 decides it."""
    wanted = config.get("clean_up_tokenization_spaces", False)
    # Made for WordPiece; many a BPE's config asks for it and would lose what it wrote.
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    return bool(wanted and (forced or type(backend.model).__name__ != "BPE"))
