"""A tiny benchmark and tiny models, for tests of evaluations."""

from __future__ import annotations

from d2f.evaluation.eval_recipe import load_eval_recipe
from d2f.evaluation.eval_row import LoadedModel
from d2f.evaluation.eval_run import Evaluation
from d2f.evaluation.task import Example, Verdict
from d2f.testing import tiny_model, write_tokenizer
from d2f.text import Tokenizer

ENVIRONMENT = {"device": "cpu", "dtype": "float32", "processor": "a test's"}
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"

RECIPE = """
task = "letters"
output = "{output}"
family = "tiny"
max_new_tokens = 12

[score]
num_problems = 7
batch_size = 3

[models.student]
path = "student"

[models.base]
path = "base"

[[rows]]
name = "pipelined"
model = "student"
strategy = "pipelined"
labels = {{add_threshold = 0.2}}
policy = {{block_size = 8, add_threshold = 0.2}}

[[rows]]
name = "vanilla"
model = "student"
strategy = "vanilla"
options = {{num_steps = 6}}
early_stop = false

[[rows]]
name = "autoregressive"
model = "base"
strategy = "autoregressive"
"""
SPEED = """
[speed]
num_problems = 3
num_runs = 2
"""


class Letters:
    """Right is an answer with an `e`; notes what it was asked to judge."""

    name, num_fewshot = "letters", None

    def __init__(self, count=7, *, stop=(), responses=True, prompts=None):
        self.stop = stop
        prompts = prompts or [f"Say {index}, then stop." for index in range(count)]
        self._examples = [
            Example(id=f"p{i}", prompt=text, response="e" * (i + 1) if responses else None)
            for i, text in enumerate(prompts)
        ]
        self.judged = []

    def examples(self):
        return self._examples

    def judge(self, examples, texts):
        self.judged += [(e.id, text) for e, text in zip(examples, texts, strict=True)]
        return [
            Verdict(
                correct="e" in text,
                answer=text[:1] or None,
                reason=None if "e" in text else "no e",
                metrics={"has_e": float("e" in text), "length": float(len(text))},
            )
            for text in texts
        ]


class Loader:
    """Tiny models by the names of `RECIPE`."""

    def __init__(self, folder, chat_template=None):
        self.tokenizer = Tokenizer.load(write_tokenizer(folder, chat_template=chat_template))
        self.loaded = []

    def __call__(self, name):
        self.loaded.append(name)
        kind = {"student": "llada", "base": "qwen2"}[name]
        description = {"name": name, "adapter": None, "num_parameters": 1, "sha256": "5" * 64}
        model = tiny_model(kind, seed=3)
        return LoadedModel(model=model, tokenizer=self.tokenizer, description=description)


def make_recipe(folder, *overrides, text=RECIPE, speed=False):
    """`RECIPE` as a recipe with some settings changed, its output in `folder`."""
    file = folder / "recipe.toml"
    score, rest = text.split("[models.student]", 1)
    text = score + (SPEED if speed else "") + "[models.student]" + rest
    file.write_text(text.format(output=folder / "out"), encoding="utf-8")
    return load_eval_recipe(file, overrides)


def make_evaluation(folder, *overrides, task=None, loader=None, speed=False, **keywords):
    """An evaluation of `RECIPE` with some settings changed."""
    loader = loader or Loader(folder / "tokenizer")
    recipe = make_recipe(folder, *overrides, speed=speed)
    task = task or Letters(recipe.num_examples)
    return Evaluation(recipe, task, loader, ENVIRONMENT, recipe_file="recipe.toml", **keywords)
