import pytest
from tests.unit.training.tiny_run import make_config

from d2f.models.lora import LoraConfig


@pytest.fixture(params=["autoregressive", "masked-diffusion", "d2f", "d2f-lora"])
def stage_config(request, tmp_path):
    if request.param == "d2f-lora":
        return make_config(tmp_path, "d2f", lora=LoraConfig(r=4, alpha=8, dropout=0.2))
    return make_config(tmp_path, request.param)
