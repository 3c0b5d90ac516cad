"""Nothing slow is imported on the way to the first token."""

from __future__ import annotations

import subprocess
import sys

from d2f.testing import write_adapter, write_checkpoint

SCRIPT = """
import sys
from d2f.models.checkpoint import load_model
from d2f.text import Tokenizer
import torch
model = load_model(sys.argv[1], sys.argv[2], device="cpu")
ids = Tokenizer.load(sys.argv[1]).encode_prompt("1+1=")
model.logits(torch.tensor([ids]))
# torch's compiler takes two seconds, transformers one and a half.
slow = {"torch._dynamo", "transformers", "huggingface_hub", "peft"} & sys.modules.keys()
sys.exit(f"imported {slow}" if slow else 0)
"""


def test_loading_and_running_imports_nothing_slow(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "llada", tokenizer=True)
    adapter = write_adapter(tmp_path / "a", "llada")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
