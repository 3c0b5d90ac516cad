import pytest
from tests.unit.training.tiny_run import make_config

from d2f.models.lora import LoraConfig
from d2f.testing import write_tokenizer
from d2f.text import Tokenizer


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """No test keeps token ids in the user's own folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("D2F_CACHE", str(folder))
    return folder


@pytest.fixture(params=["autoregressive", "masked-diffusion", "d2f", "d2f-lora"])
def stage_config(request, tmp_path):
    if request.param == "d2f-lora":
        return make_config(tmp_path, "d2f", lora=LoraConfig(r=4, alpha=8, dropout=0.2))
    return make_config(tmp_path, request.param)


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path / "tokenizer"))
