"""Text to token ids and back: the only place in the package where this happens.

Built on `tokenizers` and a sandboxed `jinja2` alone. Nothing of a checkpoint is executed, and the
import takes a tenth of a second where `transformers` takes several.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f.errors import CheckpointError, RequestError
from d2f.hub import resolve_folder
from d2f.text_stream import TextStream, tidy

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer as _Backend

_CONFIG = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "mask_token", "pad_token", "unk_token")
# Classes whose vocab.json and merges.txt mean Qwen2's byte-level BPE.
_QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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

    def __init__(
        self, backend: _Backend, config: Mapping[str, Any], chat_template: str | None
    ) -> None:
        self._backend = backend
        self._special = {
            name: text for name in _TOKENS if (text := _content(config.get(name))) is not None
        }
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
        self._tidies = _tidies(backend, config)
        self._unshown = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        begins = config.get("add_bos_token")
        if begins is None:
            processed = backend.encode("a", add_special_tokens=True).ids
            begins = processed[:1] == [self.bos_token_id]
        self._begins = bool(begins)

    @classmethod
    def load(cls, path_or_hub_id: str | Path) -> Tokenizer:
        """Load the tokenizer of a model folder or hub id.

        tokenizer.json is read if there; else vocab.json and merges.txt, for Qwen2 and Dream.

        Raises:
            CheckpointError: There is no such folder or no tokenizer in it, or it is broken or of
                another kind.
        """
        folder = resolve_folder(path_or_hub_id, weights=False)
        config = _read_config(folder)
        return cls(_read_backend(folder, config), config, _read_chat_template(folder, config))

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
        return self._begin(self.encode(_render(self.chat_template, messages, self._special)))

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Text of a conversation that is over: no answer of the assistant's begins behind it.

        Raises:
            RequestError: There is no chat template, or it refuses the messages.
            CheckpointError: The template is broken.
        """
        if self.chat_template is None:
            raise RequestError("this tokenizer has no chat template")
        return _render(self.chat_template, messages, self._special, add_generation_prompt=False)

    def token_id(self, text: str) -> int | None:
        """The id of the token that the vocabulary, or an added token, spells like this."""
        return self._backend.token_to_id(text)

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """Texts of the tokens that are kept whole wherever they stand in a text, by id."""
        added = self._backend.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items()}

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        """Texts of the tokens that `decode` leaves out unless it is told to show them."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token.content for token in added.values() if token.special)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give nothing."""
        text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return tidy(text) if self._tidies else text

    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text gets, the chat template included."""
        parts = [self._backend.to_str(), self.chat_template, self._special, self._begins]
        return hashlib.blake2b(
            json.dumps(parts, sort_keys=True).encode(), digest_size=16
        ).hexdigest()

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for ids that arrive bit by bit."""
        return TextStream(
            self._backend.decoder,
            self._shown if skip_special_tokens else self._backend.id_to_token,
            tidies=self._tidies,
        )

    def _begin(self, ids: list[int]) -> list[int]:
        bos = self.bos_token_id
        if bos is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == bos:
            start += 1
        return [bos, *ids[start:]] if start or self._begins else ids

    def _shown(self, token_id: int) -> str | None:
        token = self._backend.id_to_token(token_id)
        return None if token in self._unshown else token

    def _id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _tidies(backend: _Backend, config: Mapping[str, Any]) -> bool:
    """Whether decoded texts lose spaces before punctuation, as transformers 5 decides it."""
    wanted = config.get("clean_up_tokenization_spaces", False)
    # Made for WordPiece; many a BPE's config asks for it and would lose what it wrote.
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    return bool(wanted and (forced or type(backend.model).__name__ != "BPE"))


def _content(token: Any) -> str | None:
    """Text of a special token, which configs write as a string or as a table."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", _CONFIG):
        if (folder / name).exists():
            config |= _read_json(folder / name)
    return config


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_backend(folder: Path, config: Mapping[str, Any]) -> _Backend:
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    try:
        if file.exists():
            return Backend.from_file(str(file))
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            file = folder / "vocab.json"
            return _qwen2_backend(folder, config)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} is no tokenizer that can be read: {error}") from None
    raise CheckpointError(
        f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt. "
        "Give a folder that has one, or save it with transformers as tokenizer.json"
    )


def _qwen2_backend(folder: Path, config: Mapping[str, Any]) -> _Backend:
    """Qwen2's byte-level BPE with the added tokens that tokenizer_config.json lists."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind = config.get("tokenizer_class", _QWEN2_CLASSES[0])
    if kind not in _QWEN2_CLASSES:
        raise CheckpointError(
            f"{folder / _CONFIG}: vocab.json and merges.txt of a {kind} cannot be read, only of "
            f"{', '.join(_QWEN2_CLASSES)}; save the tokenizer with transformers as tokenizer.json"
        )
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(models.BPE.from_file(*files))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    added = config.get("added_tokens_decoder") or {}
    for number, token in sorted((int(number), token) for number, token in added.items()):
        flags = {
            name: bool(token[name])
            for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
            if name in token
        }
        backend.add_tokens([AddedToken(token["content"], **flags)])
        if backend.token_to_id(token["content"]) != number:
            raise CheckpointError(
                f"{folder / _CONFIG}: the added token {token['content']!r} should have id "
                f"{number}, but vocab.json leaves {backend.token_to_id(token['content'])} for it"
            )
    # Special tokens named without an id come last, as transformers adds them.
    named = [_content(config.get(name)) for name in ("eos_token", "pad_token", "bos_token")]
    backend.add_tokens([AddedToken(text, special=True) for text in named if text])
    return backend


def _render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation, as `transformers` renders it."""
    from jinja2 import TemplateSyntaxError

    try:
        return _compiled(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    except TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is broken: {error}") from None
    except RequestError:
        raise
    except Exception as error:  # a template is a program and can fail in any way
        raise RequestError(f"the chat template cannot render these messages: {error}") from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """A template made ready once: that takes longer than to fill it in."""
    # Imported here: most uses of ids need no template.
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise RequestError(f"the chat template refuses the messages: {message}")

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)
