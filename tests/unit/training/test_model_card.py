"""The cards of models and adapters, and that PEFT reads what stands beside them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.training.test_evaluations import config_for, files, scores
from tests.unit.training.tiny_run import make_config

from d2f.diffusion.policy import DecodingPolicy
from d2f.models.checkpoint import load_model
from d2f.models.lora import LoraConfig
from d2f.testing import tiny_spec
from d2f.training.model_card import CardFacts, _without_folders, model_card
from d2f.training.run import train
from d2f.training.sections import EvaluateConfig, ModelConfig, SampleConfig

assert files  # the fixture
yaml = pytest.importorskip("yaml")
LORA = LoraConfig(r=4, alpha=8)


def front_matter(card):
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_of_an_adapter_of_the_hubs_model(tmp_path):
    config = make_config(
        tmp_path, "d2f", model=ModelConfig(init="GSAI-ML/LLaDA-8B-Instruct"), lora=LORA,
        evaluate=EvaluateConfig(every=100, task="gsm8k"),
    )  # fmt: skip
    facts = CardFacts(
        steps=1200,
        data={"used": 12345, "dropped": 7, "truncated": 0, "held_out": 3, "bad_rows": 2},
        loss=0.25,
        evaluation={
            "step": 1000, "score": 0.775, "standard_error": 0.0187, "tokens_per_forward": 4.5,
            "num_problems": 500, "mean_tokens": 120.5,
        },
    )  # fmt: skip
    card = model_card(config, tiny_spec("llada"), DecodingPolicy(block_size=16), facts)
    assert front_matter(card) == {
        "base_model": "GSAI-ML/LLaDA-8B-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["d2f", "llada", "diffusion", "lora"],
    }
    for text in (
        "1,200", "12,345", "77.5%", "1.9%", "4.50", "500 of gsm8k", '"block_size": 16', "0.25",
        "d2f generate --model GSAI-ML/LLaDA-8B-Instruct --adapter THIS_FOLDER",
        "PeftModel.from_pretrained",
    ):  # fmt: skip
        assert text in card


def test_a_folder_that_looks_like_an_id_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "blob").write_text("")
    gone = ("runs/teacher", "models/some.Q8_0.gguf")
    for init in ("models/mine", "models/blob", *gone, str(tmp_path / "models" / "mine")):
        config = make_config(tmp_path, "d2f", model=ModelConfig(init=init), lora=LORA)
        card = model_card(config, tiny_spec("llada"), None, CardFacts(steps=1, data={}))
        assert "base_model" not in front_matter(card)
        assert str(tmp_path) not in card


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_runs_folders_have_cards_without_its_paths(files, lora):
    config = config_for(
        files,
        "d2f",
        lora=lora,
        evaluate=EvaluateConfig(every=3, task="word-problems"),
        sample=SampleConfig(every=3),
    )
    train(config, device="cpu", make_evaluator=scores(0.5, 0.25))
    for name, score in (("final", "25.0%"), ("best", "50.0%")):
        folder = Path(config.output) / name
        card = (folder / "README.md").read_text()
        assert str(files) not in card
        assert score in card
        assert "| samples trained on | 40 |" in card
        front = front_matter(card)
        assert "base_model" not in front
        assert front["library_name"] == ("d2f" if lora is None else "peft")
    plain = replace(config_for(files, "autoregressive", "plain"), evaluate=None)
    card = (Path(train(plain, device="cpu").folder) / "README.md").read_text()
    assert "## Evaluation" not in card
    assert front_matter(card)["library_name"] == "transformers"


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_the_adapter_of_a_run(files):
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    config = config_for(files, "autoregressive", lora=LORA)
    final = Path(train(config, device="cpu").folder)
    card = (final / "README.md").read_text()
    assert "AutoModelForCausalLM" in card
    assert "trust_remote_code" not in card
    assert json.loads((final / "adapter_config.json").read_text())["peft_type"] == "LORA"
    base = transformers.AutoModelForCausalLM.from_pretrained(files / "qwen2", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, final).eval()
    ours = load_model(files / "qwen2", adapter=final, device="cpu", merge_adapter=False)
    bare = load_model(files / "qwen2", device="cpu")
    ids_BL = torch.tensor([[5, 9, 20, 3]])
    with torch.no_grad():
        expected = theirs(ids_BL).logits
        hidden = ours(ids_BL, blocks_BL=torch.arange(4, dtype=torch.int32)[None])
        torch.testing.assert_close(ours.head(hidden), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(bare.logits(ids_BL), ours.logits(ids_BL), atol=1e-4)


def test_folders_keep_their_last_part():
    given = ["/home/me/x.jsonl", "../private/y.jsonl", "./z", "org/name"]
    assert _without_folders(given) == ["x.jsonl", "y.jsonl", "z", "org/name"]
