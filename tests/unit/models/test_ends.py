"""An answer ends where the published files say, and as transformers ends it."""

import functools
import itertools
import json

import pytest
import torch
import transformers
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from d2f.decoding.batch import cut_at_eos
from d2f.engine.ends import choose_ends
from d2f.engine.generate import generate_ids
from d2f.errors import CheckpointError, ConfigError
from d2f.models.checkpoint import as_diffusion, load_model, read_spec, save_model
from d2f.models.ends import find_ends
from d2f.models.families import spec_from_config
from d2f.testing import tiny_config, tiny_model, tiny_spec, write_checkpoint, write_tokenizer
from d2f.text import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
QWEN_1_5 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLADA = HEADERS + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA_2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def add_tokens(folder, texts, **config):
    """Put special tokens into a written tokenizer, in the places of its last letters."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    spare = dict(zip(texts, range(80, 80 + len(texts)), strict=True))
    vocab = content["model"]["vocab"]
    for letter, number in list(vocab.items()):
        if number in spare.values():
            del vocab[letter]
    vocab.update(spare)
    file.write_text(json.dumps(content))
    backend = Backend.from_file(str(file))
    backend.add_special_tokens([AddedToken(text, special=True) for text in texts])
    backend.save(str(file))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return spare


def checkpoint(folder, kind, *, texts=(), config=None, generation=None, tokenizer=None):
    """A tiny checkpoint with such files, and the ids of its new special tokens."""
    write_checkpoint(folder, kind, tokenizer=True)
    spare = add_tokens(folder, texts, **(tokenizer or {}))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return spare


PUBLISHED = {
    # Where the authors' code ends: kind, special tokens, template, further files, ends, all texts.
    "LLaDA-8B-Instruct": (
        "llada", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), LLADA, {}, {},
        {"<|endoftext|>": {"config.json", "tokenizer's EOS", "padding"},
         "<|eot_id|>": {"chat template"}},
    ),
    "Dream-v0-Instruct-7B": (
        "Dream", ("<|im_start|>", "<|im_end|>"), CHATML, {"eos_token_id": 95}, {},
        {"<|endoftext|>": {"config.json", "generation_config.json", "tokenizer's EOS", "padding"},
         "<|im_end|>": {"chat template"}},
    ),
    "DiffuCoder-7B-Instruct": (
        "Dream", ("<|im_start|>", "<|im_end|>", "<|dlm_pad|>"), CHATML, {"eos_token_id": 95}, {},
        {"<|endoftext|>": {"config.json", "generation_config.json", "tokenizer's EOS", "padding"},
         "<|im_end|>": {"chat template"}, "<|dlm_pad|>": {"padding"}},
    ),
    "Qwen1.5-7B-Chat": (
        "qwen2", ("<|im_start|>", "<|im_end|>"), QWEN_1_5, {"eos_token_id": 95}, {},
        {"<|endoftext|>": {"config.json", "generation_config.json", "tokenizer's EOS"},
         "<|im_end|>": {"chat template"}},
    ),
    "Qwen2.5-7B": (
        "qwen2", ("<|im_start|>", "<|im_end|>"), CHATML, {"eos_token_id": 95}, {},
        {"<|endoftext|>": {"config.json", "generation_config.json", "tokenizer's EOS"},
         "<|im_end|>": {"chat template"}},
    ),
    "Qwen2.5-7B-Instruct": (
        "qwen2", ("<|im_start|>", "<|im_end|>"), CHATML, {"eos_token_id": [81, 95]},
        {"eos_token": "<|im_end|>"},
        {"<|endoftext|>": {"config.json", "generation_config.json"},
         "<|im_end|>": {"generation_config.json", "tokenizer's EOS", "chat template"}},
    ),
    "Llama-3.1-8B-Instruct": (
        "llama", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"), HEADERS,
        {"eos_token_id": [95, 83, 82]}, {"eos_token": "<|eot_id|>", "pad_token": "<|mask|>"},
        {"<|endoftext|>": {"config.json", "generation_config.json"},
         "<|eom_id|>": {"generation_config.json"},
         "<|eot_id|>": {"generation_config.json", "tokenizer's EOS", "chat template"}},
    ),
    "Llama-2-7b-chat": (
        "llama", ("<s>", "<unk>"), LLAMA_2, {"eos_token_id": 95},
        {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<unk>"},
        {"<|endoftext|>":
            {"config.json", "generation_config.json", "tokenizer's EOS", "chat template"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_end_where_their_authors_end_them(tmp_path, name):
    kind, texts, template, generation, tokenizer, expected = PUBLISHED[name]
    checkpoint(
        tmp_path,
        kind,
        texts=texts,
        generation=generation or None,
        tokenizer={"chat_template": template} | tokenizer,
    )
    ends = find_ends(tmp_path, spec_from_config(json.loads((tmp_path / "config.json").read_text())))
    assert {end.text: set(end.sources) for end in ends} == expected
    ids = load_model(tmp_path, device="cpu").spec.eos_token_ids
    assert ids == tuple(end.id for end in ends)
    assert ids[0] == 95, "training ends and pads with the token that config.json names"


TEMPLATES = {
    "closed by two": ("{{ m['content'] }}<|im_end|><|eot_id|>", "<|im_end|>"),
    "words before it": ("{{ m['content'] }}\n\n</answer> <|eot_id|>", "<|eot_id|>"),
    "no special token": ("{{ m['content'] }}\n### ", None),
    "text lost": ("{{ m['role'] }}<|im_end|>", None),
    "text changed": ("{{ m['content'] | upper }}<|im_end|>", None),
    "closed by the mask": ("{{ m['content'] }}<|mask|>", None),
    "closed if another follows": (
        "{{ m['content'] }}{% if not loop.last %}<|eot_id|>{% endif %}",
        "<|eot_id|>",
    ),
    "refuses": ("{{ raise_exception('never') }}", None),
    "fails": ("{{ m['content'] + 1 }}", None),
    "broken": ("{% if %}", None),
    "wants a system message": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system?') }}{% endif %}"
        "{{ m['content'] }}<|eot_id|>",
        "<|eot_id|>",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_closes_a_turn_is_found_or_nothing_is(tmp_path, name):
    turn, closing = TEMPLATES[name]
    spare = checkpoint(
        tmp_path,
        "qwen2",
        texts=("<|im_end|>", "<|eot_id|>"),
        tokenizer={"chat_template": "{% for m in messages %}" + turn + "{% endfor %}"},
    )
    closed = [end.id for end in find_ends(tmp_path, tiny_spec("qwen2")) if end.id != 95]
    assert closed == ([] if closing is None else [spare[closing]])


def test_padding_ends_an_answer_of_a_diffusion_model_only(tmp_path):
    for kind, ends in {
        "llada": (95, 80),
        "Dream": (95, 80),
        "llama": (95,),
        "qwen2": (95,),
    }.items():
        folder = tmp_path / kind
        checkpoint(
            folder, kind, texts=("<pad>",), config={"pad_token_id": 80},
            tokenizer={"pad_token": "<pad>"},
        )  # fmt: skip
        assert load_model(folder, device="cpu").spec.eos_token_ids == ends
    # A token with another use says nothing of an end, nor does one that the model has no row for.
    for config, tokenizer in (
        ({"pad_token_id": 80, "bos_token_id": 80}, {}),
        ({"pad_token_id": 94}, {}),
        ({"pad_token_id": -1}, {}),
        ({}, {"pad_token": "<pad>", "unk_token": "<pad>"}),
    ):
        folder = tmp_path / f"{config}{tokenizer}"
        checkpoint(folder, "Dream", texts=("<pad>",), config=config, tokenizer=tokenizer)
        assert load_model(folder, device="cpu").spec.eos_token_ids == (95,)


class TestFiles:
    @pytest.mark.parametrize("value", ["95", 95.0, True, [95, None], {"id": 95}])
    def test_no_token_id_is_refused(self, tmp_path, value):
        checkpoint(tmp_path, "llada", generation={"eos_token_id": value})
        with pytest.raises(
            CheckpointError, match=r"generation_config.json: eos_token_id is .*95|True"
        ):
            load_model(tmp_path, device="cpu")

    def test_no_json_is_refused(self, tmp_path):
        checkpoint(tmp_path, "llada")
        (tmp_path / "generation_config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            load_model(tmp_path, device="cpu")

    def test_an_id_without_a_row_is_left_out_and_told(self, tmp_path):
        checkpoint(tmp_path, "llada", generation={"eos_token_id": [3, 96, -1]})
        assert load_model(tmp_path, device="cpu").spec.eos_token_ids == (95, 3)
        ends = find_ends(tmp_path, tiny_spec("llada"))
        assert [(end.id, end.has_row) for end in ends] == [
            (95, True), (3, True), (96, False), (-1, False),
        ]  # fmt: skip

    def test_no_tokenizer_is_needed(self, tmp_path):
        write_checkpoint(tmp_path, "Dream")
        assert load_model(tmp_path, device="cpu").spec.eos_token_ids == (95,)
        (tmp_path / "tokenizer.json").write_text("{}")
        assert load_model(tmp_path, device="cpu").spec.eos_token_ids == (95,)

    def test_without_a_word_of_config_the_tokenizer_says_it(self, tmp_path):
        checkpoint(tmp_path, "llada", config={"eos_token_id": None, "pad_token_id": None})
        assert load_model(tmp_path, device="cpu").spec.eos_token_ids == (95,)

    def test_a_saved_model_keeps_its_ends(self, tmp_path):
        checkpoint(tmp_path / "from", "qwen2", generation={"eos_token_id": [3, 95]})
        model = load_model(tmp_path / "from", device="cpu")
        save_model(model, tmp_path / "to")
        assert load_model(tmp_path / "to", device="cpu").spec.eos_token_ids == (95, 3)

    def test_a_mask_is_no_end_of_the_diffusion_model(self):
        model = tiny_model("qwen2", eos_token_id=[95, 94])
        assert as_diffusion(model, mask_token_id=94).spec.eos_token_ids == (95,)


MISSING = "missing"


def ids_of(value):
    return [] if value in (MISSING, None) else value if isinstance(value, list) else [value]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_same_end_as_transformers(tmp_path, kind):
    """All forms of eos_token_id in both files, and no generation_config.json at all."""
    transformers.logging.set_verbosity_error()
    write_checkpoint(tmp_path, kind, seed=2)
    config = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": None}
    their_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model, prompt = load_model(tmp_path, device="cpu"), [1, 2, 3]
    settings = {"max_new_tokens": 16, "strategy": "autoregressive"}
    answer = generate_ids(model, prompt, eos_token_id=(), **settings).token_ids

    @functools.cache
    def theirs(*ends):
        told = their_model.generate(
            torch.tensor([prompt]),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=list(ends) or None,
        )
        return told[0][len(prompt) :].tolist()

    # Ends that do come, so that a wrong one shows.
    early, late = answer[2], answer[8]
    compared = 0
    forms = (MISSING, None, early, late, [early, late], [late, 0])
    for said, generation in itertools.product(forms, ("absent", *forms)):
        told = {name: value for name, value in config.items() if name != "eos_token_id"}
        told |= {} if said == MISSING else {"eos_token_id": said}
        (tmp_path / "config.json").write_text(json.dumps(told))
        file = tmp_path / "generation_config.json"
        file.unlink(missing_ok=True)
        beside = {} if generation == MISSING else {"eos_token_id": generation}
        if generation != "absent":
            file.write_text(json.dumps(beside))
        model.spec = read_spec(tmp_path)
        ends = ids_of(said) + ([] if generation == "absent" else ids_of(generation))
        assert list(model.spec.eos_token_ids) == list(dict.fromkeys(ends))
        result = generate_ids(model, prompt, **settings)
        assert (result.token_ids, result.finish_reason) == cut_at_eos(answer, tuple(ends))
        # transformers asks generation_config.json alone where it is there.
        own = generation_config(tmp_path)
        if set(ends) != set(own):
            assert set(ids_of(said)) - set(own), "only config.json may say more than transformers"
            continue
        assert result.token_ids == theirs(*own)
        compared += 1
    assert compared >= 20


def generation_config(folder):
    """The ends that transformers reads from a folder, as its models do."""
    try:
        config = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        config = transformers.GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    return ids_of(config.eos_token_id)


def test_the_example_of_two_files(tmp_path):
    """A second end in generation_config.json alone: 40 tokens before, the right ones now."""
    model = tiny_model("qwen2", seed=2)
    prompt = [1, 2, 3]
    answer = generate_ids(
        model, prompt, max_new_tokens=40, eos_token_id=(), strategy="autoregressive"
    ).token_ids
    second = next(token for token in answer[10:] if token not in answer[:10])
    never = next(token for token in range(96) if token not in answer)
    write_checkpoint(tmp_path, "qwen2", seed=2, eos_token_id=never)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [never, second], "pad_token_id": never})
    )
    ours = generate_ids(load_model(tmp_path, device="cpu"), prompt, max_new_tokens=40,
                        strategy="autoregressive")  # fmt: skip
    theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        .generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0][3:]
        .tolist()
    )
    assert ours.token_ids == theirs
    assert (ours.token_ids[-1], ours.finish_reason) == (second, "eos")
    assert len(ours.token_ids) < 40


@pytest.mark.parametrize("strategy", ["pipelined", "serial", "vanilla", "dual-cache"])
def test_padding_is_no_text_in_the_counts(tmp_path, strategy):
    """What stands behind the end is in no count of tokens."""
    spare = checkpoint(tmp_path, "Dream", texts=("<|dlm_pad|>",))
    pad = spare["<|dlm_pad|>"]
    model = load_model(tmp_path, device="cpu")
    # A head that prefers the padding, as DiffuCoder's does behind an answer.
    model.lm_head.weight.data[pad] = model.lm_head.weight.data.abs().mean(0) * 20
    result = generate_ids(model, [1, 2, 3], max_new_tokens=24, strategy=strategy)
    free = generate_ids(model, [1, 2, 3], max_new_tokens=24, strategy=strategy, eos_token_id=())
    assert free.token_ids.count(pad) > 1, "the test is of no use without padding"
    assert pad not in result.token_ids[:-1]
    assert result.tokens_per_forward == len(result.token_ids) / result.num_forwards


class TestChoice:
    @pytest.fixture
    def tokenizer(self, tmp_path):
        return Tokenizer.load(write_tokenizer(tmp_path))

    def test_adds_and_replaces(self, tokenizer):
        spec = tiny_spec("llada")
        assert choose_ends([7, "<|endoftext|>"], tokenizer, spec) == (95, 7)
        assert choose_ends(["a", 7], tokenizer, spec, replace=True) == (66, 7)
        assert choose_ends([], tokenizer, spec, replace=True) == ()

    @pytest.mark.parametrize(
        ("named", "words"),
        [(96, "ids 0 to 95"), (-1, "ids 0 to 95"), (True, "ids 0 to 95"),
         ("ab", "not one token but 2"),
         ("", "not one token but 0"), (94, "the mask token"), ("<|mask|>", "the mask token")],
    )  # fmt: skip
    def test_what_is_no_end_is_refused(self, tokenizer, named, words):
        with pytest.raises(ConfigError, match=words):
            choose_ends([named], tokenizer, spec_from_config(tiny_config("llada")))
