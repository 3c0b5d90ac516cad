"""`d2f import` and the other commands on GGUF files."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import transformers
from tests.unit.gguf_files import tiny, vocabulary, write_gguf
from tokenizers import Tokenizer as Backend

from d2f.cli.inspect import inspect_model
from d2f.cli.model_files import weights_sha256
from d2f.models.checkpoint import load_model
from d2f.models.imported import import_gguf
from d2f.testing import write_tokenizer
from d2f.text import Tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Quantised, with the tokenizer of 96 tokens whose last two are special."""
    folder = tmp_path_factory.mktemp("gguf")
    whole = json.loads((write_tokenizer(folder / "t") / "tokenizer.json").read_text())
    whole["model"]["vocab"]["1+"] = whole["model"]["vocab"].pop("|")
    whole["model"]["merges"] = [["1", "+"]]
    backend = Backend.from_str(json.dumps(whole))
    ids = {f"tokenizer.ggml.{name}_token_id": 95 for name in ("bos", "eos")}
    entries = vocabulary(backend, "gpt2", "gpt-2", **ids) | {
        "tokenizer.ggml.eot_token_id": 94,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }
    model = tiny("Llama")
    return write_gguf(folder / "Tiny-Q8_0.gguf", model, kinds=("Q8_0", "Q4_0"), metadata=entries)


def test_the_folder_is_the_file(d2f, file, tmp_path):
    done = d2f("import", file, tmp_path / "m", "--dtype", "bfloat16")
    assert (done.code, done.out) == (0, f"{tmp_path / 'm'}\n")
    assert " in Q8_0, " in done.err
    ours, imported = (load_model(p, device="cpu", dtype="bfloat16") for p in (file, tmp_path / "m"))
    assert imported.spec == ours.spec
    assert imported.spec.eos_token_ids == (95, 94)
    for (name, one), other in zip(ours.named_parameters(), imported.parameters(), strict=True):
        assert torch.equal(one, other), name
    tokenizers = [Tokenizer.load(p) for p in (file, tmp_path / "m")]
    assert len({t.fingerprint() for t in tokenizers}) == 1
    about = json.loads((tmp_path / "m" / "import.json").read_text())
    assert (about["file"], about["layout"], about["dtype"]) == (file.name, "llama", "bfloat16")


def test_transformers_reads_the_folder(file, tmp_path):
    import_gguf(file, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw_BLV = theirs(ids).logits
    assert theirs.dtype == torch.float32
    ours = load_model(file, device="cpu").logits(ids)
    torch.testing.assert_close(ours[:, 1:], raw_BLV[:, :-1], atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("1+1=")["input_ids"] == [95, *Tokenizer.load(file).encode("1+1=")]
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        Tokenizer.load(file).render_chat(messages)
    )


def test_only_a_folder_of_its_own_is_replaced(d2f, file, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    done = d2f("import", file, tmp_path / "other")
    assert done.code == 1
    assert "other' is not empty and was not made by an import; give a new folder" in done.err
    bare = write_gguf(tmp_path / "bare.gguf", tiny("Qwen2"), kinds=("Q8_0",))
    done = d2f("import", bare, tmp_path / "m")
    assert (done.code, "bare.gguf holds no tokenizer" in done.err) == (0, True)
    assert d2f("import", file, tmp_path / "m").code == 0
    assert Tokenizer.load(tmp_path / "m").chat_template == TEMPLATE
    # The remedy for a file without one: what somebody puts there stays.
    assert d2f("import", bare, tmp_path / "n").code == 0
    write_tokenizer(tmp_path / "n")
    assert d2f("import", bare, tmp_path / "n").code == 0
    assert Tokenizer.load(tmp_path / "n").eos_token_id == 95


def test_nothing_is_left_of_an_import_that_was_stopped(file, tmp_path):
    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(file, tmp_path / "m", on_bytes=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none.gguf", "m"], 1, "there is no file 'none.gguf'"),
        ([".", "m"], 1, "'.' is a folder, which needs no import; give a GGUF file"),
        (["FILE", "m", "--dtype", "int4"], 2, "unknown dtype 'int4'"),
        (["text.gguf", "m"], 1, "text.gguf is no GGUF"),
        (["text", "m"], 1, "'text' is a file; give the folder that holds it, or a GGUF file"),
    ],
)
def test_wrong_arguments_get_one_line(d2f, file, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    for name in ("text.gguf", "text"):
        (tmp_path / name).write_text("a text that is longer than a header")
    done = d2f("import", *[file if a == "FILE" else a for a in arguments])
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert message in done.err
    assert not (tmp_path / "m").exists()


def test_commands_take_the_file_as_a_model(d2f, file, tmp_path):
    import_gguf(file, tmp_path / "m")
    answers = [
        d2f("generate", "1+1=", "--model", model, "--max-new-tokens", 8, "--json").out
        for model in (file, tmp_path / "m")
    ]
    assert json.loads(answers[0])["token_ids"] == json.loads(answers[1])["token_ids"]
    bare = write_gguf(tmp_path / "bare.gguf", tiny("Llama"))
    done = d2f("generate", "1+1=", "--model", bare)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "bare.gguf holds no tokenizer; import the file" in done.err


def test_inspect_tells_layout_block_types_and_bytes(d2f, file):
    report = inspect_model(file)
    assert report["architecture"] == "llama"
    assert [f["name"] for f in report["files"]] == [file.name]
    assert report["files"][0]["bytes"] == file.stat().st_size
    blocks = report["gguf_blocks"]
    assert list(blocks) == ["Q8_0", "Q4_0", "F32"]
    assert blocks["Q8_0"]["bytes"] == blocks["Q8_0"]["numbers"] // 32 * 34
    assert sum(b["numbers"] for b in blocks.values()) == report["parameters"]
    assert [end["id"] for end in report["ends"]] == [95, 94]
    text = d2f("inspect", file).out
    assert "Q4_0" in text
    assert "a chat template" in text


def test_a_score_names_the_file_by_its_bytes(file):
    digest = hashlib.sha256(hashlib.sha256(file.read_bytes()).digest()).hexdigest()
    assert weights_sha256(str(file), None) == digest
