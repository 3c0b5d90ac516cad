"""The tables of a training recipe: model, tokenizer, data, noise, objective, optimizer and more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d2f.diffusion.schedule import MaskRatioSchedule
from d2f.errors import ConfigError
from d2f.hub import is_hub_id
from d2f.models.lora_config import ADAPTER_DTYPES
from d2f.problems import ProblemConfig
from d2f.problems.functions import FunctionConfig
from d2f.recipe import at_least, one_of
from d2f.training.objective import check_names

PADDING = ("full", "longest", "packed")
DTYPES = ("float32", "bfloat16")
ANSWERS = ("number", "exact")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`[model]`: the weights that are trained, and their teacher."""

    init: str | None = None
    """Folder, hub id or GGUF file of the weights to start from; none: new weights after `config`.
    Autoregressive weights in a diffusion stage become a Dream model, whose head stays shifted."""
    init_adapter: str | None = None
    """LoRA adapter on `init`, folder or hub id, to start from. With [lora] it is what is trained
    on; without, it is merged into the weights."""
    base_name: str | None = None
    """The hub id of `init`, for the model card and the adapter's config. None: `init` itself."""
    config: Mapping[str, Any] | None = None
    """The architecture of new weights, as the entries of a published config.json."""
    mask_token_id: int | None = None
    """Mask token for weights that name none; none: the tokenizer's."""
    teacher: str = "init"
    """Stage d2f: a folder or hub id; or "init", the weights that the run starts from (the model
    with its adapter off, or a frozen copy where all weights are trained)."""
    teacher_adapter: str | None = None
    """LoRA adapter on `teacher`: folder or hub id."""
    train_embeddings: bool = True
    """If all weights are trained, train the token embeddings too, and a head that shares them.
    AdamW moves the rows of tokens that the data never has as far as any other. Where answers repeat
    names of their prompts, false keeps the model able to read and write names it was not shown."""
    dtype: str = "float32"
    """Type of the weights in memory; bfloat16 is for frozen weights below an adapter."""
    output_dtype: str | None = None
    """Type of the weights in `final/`: float32, bfloat16 or, of an adapter, int8. None: bfloat16,
    and float32 of an adapter."""
    max_new_tokens: int | None = None
    """Longest answer that `final/` recommends; none: that of `init`, if of the same kind."""
    max_shard_mib: int | None = None
    """Largest weight file in MiB; none: one file."""

    def __post_init__(self) -> None:
        if (self.init is None) == (self.config is None):
            raise ConfigError("[model] needs either init (weights) or config (a new architecture)")
        one_of("model.dtype", self.dtype, DTYPES)
        if self.output_dtype is not None:
            one_of("model.output_dtype", self.output_dtype, ADAPTER_DTYPES)
        at_least("model.max_shard_mib", self.max_shard_mib, 1)
        at_least("model.max_new_tokens", self.max_new_tokens, 1)
        if self.init is None and (self.init_adapter or self.base_name):
            raise ConfigError("model.init_adapter and model.base_name belong to model.init")
        if self.init is None and not self.train_embeddings:
            raise ConfigError(
                "model.train_embeddings = false keeps the embeddings of model.init; new weights "
                "have none that are worth keeping"
            )
        if self.base_name is not None and not is_hub_id(self.base_name):
            raise ConfigError(f"model.base_name is '{self.base_name}'; it must be a hub id")
        if self.teacher == "init" and self.teacher_adapter is not None:
            raise ConfigError(
                "model.teacher_adapter belongs to model.teacher, which must name its base; with "
                "model.init_adapter the teacher is the model that the run starts from"
            )

    @property
    def weights_dtype(self) -> str:
        """Type of the weights in `final/` where all of them are trained."""
        return self.output_dtype or "bfloat16"

    @property
    def adapter_dtype(self) -> str:
        """Type of the adapter in `final/` where one is trained."""
        return self.output_dtype or "float32"


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """`[tokenizer]`: the source of the tokenizer; without this table, `model.init`."""

    path: str | None = None
    """Folder, hub id or GGUF file."""
    vocab_size: int | None = None
    """Train a byte-level BPE of this size on the data instead."""
    num_samples: int = 20_000
    """Samples that such a tokenizer is trained on."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.vocab_size is None):
            raise ConfigError("[tokenizer] needs either path or vocab_size")
        at_least("tokenizer.vocab_size", self.vocab_size, 260)
        at_least("tokenizer.num_samples", self.num_samples, 1)


@dataclass(frozen=True, kw_only=True)
class ColumnConfig:
    """`[data.columns]`: the columns of a row that hold prompt and response."""

    prompt: str = "prompt"
    """Text of the user's message."""
    response: str = "response"
    """Text of the answer."""
    messages: str | None = None
    """Instead of both, a list of messages: the last one, the assistant's, is the response, and all
    before it are the prompt."""
    role: str = "role"
    """Key of a message's speaker; ShareGPT's is "from"."""
    content: str = "content"
    """Key of a message's text; ShareGPT's is "value"."""
    roles: Mapping[str, str] = field(default_factory=lambda: {"human": "user", "gpt": "assistant"})
    """Names of speakers in the data, and the chat template's names for them."""
    system: str | None = None
    """Text of a system message put first; a row may leave it null or empty."""

    def __post_init__(self) -> None:
        if self.messages is not None and (self.prompt, self.response) != ("prompt", "response"):
            raise ConfigError(
                "[data.columns] needs either messages or prompt and response, not both"
            )
        for name, role in self.roles.items():
            one_of(f"data.columns.roles.{name}", role, ("system", "user", "assistant", "tool"))

    @property
    def conversations(self) -> bool:
        """Whether more than one message may precede a response."""
        return self.messages is not None or self.system is not None

    def used(self, *, response: bool = True) -> tuple[str, ...]:
        """List the columns that a row must have; without the response, to be answered only."""
        texts = (self.messages,) if self.messages else (self.prompt, self.response)
        texts = texts if response else texts[:1]
        return (*texts, self.system) if self.system else texts


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`[data]`: pairs of prompt and response, and how they become sequences."""

    kind: str
    """problems, functions: the built-in generators; dataset: files, folders and hub data sets;
    jsonl: files with one JSON object a line, whatever they are called; hub: hub data sets."""
    sequence_length: int
    """Tokens of every sequence. Each starts at position 0; what follows the response is EOS."""
    num_problems: int | None = None
    """Problems to generate."""
    seed: int = 0
    """Seed of the generator."""
    problems: ProblemConfig = field(default_factory=ProblemConfig)
    """Settings of the word problems (kind problems)."""
    functions: FunctionConfig = field(default_factory=FunctionConfig)
    """Settings of the functions to write (kind functions)."""
    paths: tuple[str, ...] = ()
    """Files (.jsonl, .json, .parquet), patterns such as "data/*.parquet", folders, or ids of hub
    data sets; used one after the other, and shuffled together."""
    split: str = "train"
    """Split of hub data sets; of a folder, files whose name names another split are left out."""
    subset: str | None = None
    """Configuration of the hub data sets, for those that have several."""
    revision: str | None = None
    """Branch, tag or commit of the hub data sets."""
    columns: ColumnConfig = field(default_factory=ColumnConfig)
    bad_rows: str = "report"
    """report leaves bad rows out (a column missing, empty or no text, broken JSON or Unicode) and
    says how many and which; refuse ends with an error at the first."""
    cache: bool | str = True
    """Folder that keeps the token ids of data that were read; true: $D2F_CACHE, or ~/.cache/d2f."""
    chat_template: bool | None = None
    """Put prompts through the tokenizer's chat template; none: if it has one."""
    response_suffix: str = ""
    """Text put behind each response, before EOS, such as LLaDA's end-of-turn token."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens; none: as long as one token of the response has room."""
    long_prompt: str = "drop"
    """Samples with a longer prompt: drop, or truncate the prompt, which then loses its first
    tokens, BOS and system message with them. Both are counted."""
    over_long: str = "drop"
    """Samples whose prompt, response and EOS exceed `sequence_length`: drop, or truncate the
    response, which then has no EOS. Both are counted."""
    padding: str = "full"
    """full: every sequence has `sequence_length` tokens. longest: the samples of a batch are sorted
    by length, and each micro-batch is cut to its longest, rounded up to one of eight lengths. A
    sample ends where its noise ends (in stage autoregressive, with its first EOS), and sees nothing
    behind. packed: as many whole samples as fit stand in one row of `sequence_length`; each ends as
    with longest, starts at position 0, and sees nothing of its neighbours. `batch_size` and
    `micro_batch_size` then count rows."""
    num_workers: int | None = None
    """Processes that generate and encode problems; none: one, or for large sets one per core."""

    def __post_init__(self) -> None:
        one_of("data.kind", self.kind, ("problems", "functions", "dataset", "jsonl", "hub"))
        one_of("data.over_long", self.over_long, ("drop", "truncate"))
        one_of("data.long_prompt", self.long_prompt, ("drop", "truncate"))
        one_of("data.bad_rows", self.bad_rows, ("report", "refuse"))
        one_of("data.padding", self.padding, PADDING)
        at_least("data.sequence_length", self.sequence_length, 2)
        for name in ("num_problems", "max_prompt_length", "num_workers"):
            at_least(f"data.{name}", getattr(self, name), 1)
        generated = self.kind in ("problems", "functions")
        if generated != (self.num_problems is not None):
            raise ConfigError(
                'data.num_problems belongs to the kinds "problems" and "functions", which need it; '
                f'the kind is "{self.kind}"'
            )
        if generated == bool(self.paths):
            raise ConfigError(
                'data.paths belongs to the kinds "dataset", "jsonl" and "hub", which need it'
            )
        if generated and self.columns != ColumnConfig():
            raise ConfigError(f'[data.columns] is for data that are read, not for "{self.kind}"')
        for kind, table in (("functions", FunctionConfig()), ("problems", ProblemConfig())):
            if self.kind != kind and getattr(self, kind) != table:
                raise ConfigError(f'[data.{kind}] belongs to kind "{kind}", not to "{self.kind}"')


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """`[noise]`: the mask ratios of the stages masked-diffusion and d2f."""

    kind: str
    """masked-diffusion: "uniform", one rate per sample, stratified over the batch. d2f: "monotone",
    "original" or "random", a `MaskRatioSchedule` over the blocks."""
    low: float
    """Smallest mask ratio."""
    high: float
    """Largest mask ratio."""
    block_size: int
    """Positions of a block. Stage masked-diffusion has blocks in the log's loss per block and for
    `train_on_eos_blocks` only."""
    frontier_share: float = 0.0
    """masked-diffusion: share of a batch's samples in which all before a random block is visible
    and all behind it masked, as in decoding block by block. See `Noiser.frontier`."""
    random_end: bool = False
    """masked-diffusion: sequences end anywhere behind their answers, not all at `sequence_length`.
    Without it the model learns that length, and answers worse when decoded with another one."""
    train_on_eos_blocks: bool = True
    """Mask blocks of nothing but EOS and count them in the loss. False: they stay visible EOS."""
    train_past_eos: bool = True
    """False, with `train_on_eos_blocks` false too: nothing but the response and its first EOS is
    trained on; the EOS behind in the same block stay visible as well."""

    def __post_init__(self) -> None:
        at_least("noise.block_size", self.block_size, 1)
        if not 0 <= self.frontier_share < 1 or (self.frontier_share and self.kind != "uniform"):
            raise ConfigError(
                f"noise.frontier_share is {self.frontier_share}; it must be in 0 … 1, and belongs "
                'to kind "uniform"'
            )
        if self.train_on_eos_blocks and not self.train_past_eos:
            raise ConfigError(
                "noise.train_past_eos = false needs train_on_eos_blocks = false, which leaves out "
                "the blocks behind"
            )
        if self.random_end and self.kind != "uniform":
            raise ConfigError('noise.random_end belongs to kind "uniform"')
        if self.kind == "uniform":
            if not 0 < self.low <= self.high <= 1:
                raise ConfigError(
                    f"noise from {self.low} to {self.high}: it must satisfy 0 < low <= high <= 1"
                )
        else:
            self.schedule()

    def schedule(self) -> MaskRatioSchedule:
        """Make the schedule of mask ratios per block."""
        return MaskRatioSchedule(kind=self.kind, low=self.low, high=self.high)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """`[objective]`: the loss of stage d2f; see `distillation_loss`."""

    objective: str = "forward_kl"
    """forward_kl, reverse_kl, soft_cross_entropy or cross_entropy (to the data, no teacher)."""
    weighting: str = "inverse_ratio"
    """Weighting of the loss: inverse_ratio or none."""
    normalization: str = "batch"
    """batch: one mean over the masked positions of all sequences of an update, so that a sequence
    with more of them weighs more; sequence: the mean of the sequences' means, as the authors'."""

    def __post_init__(self) -> None:
        check_names(self.objective, self.weighting, self.normalization)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`[optimizer]`: AdamW and its learning rate."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Number added to the denominator."""
    weight_decay: float = 0.05
    """Decay of matrices; never of norms, biases and the embedding table."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    schedule: str = "constant"
    """After warm-up: constant, linear or cosine down to `final_lr_share`, or wsd: stable, then
    linear from `decay_start` on."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    decay_start: float = 0.7
    """wsd: share of the run after which the learning rate falls."""
    final_lr_share: float = 0.0
    """Last learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        one_of("optimizer.schedule", self.schedule, ("constant", "linear", "cosine", "wsd"))
        for name in ("lr", "eps", "weight_decay", "clip_norm", "warmup_steps"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        for name in ("decay_start", "final_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; it must be in 0 … 1")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """`[sample]`: answers written to the log during training."""

    every: int
    """Steps between them."""
    num_prompts: int = 4
    """Prompts: held-out problems, or the first rows of the files."""
    max_new_tokens: int = 128
    """Longest answer."""

    def __post_init__(self) -> None:
        for name in ("every", "num_prompts", "max_new_tokens"):
            at_least(f"sample.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`[evaluate]`: a score during training, on problems that are not trained on.

    The model with the best score is kept in `best/`. The training is the same without this table.
    """

    every: int
    """Steps between evaluations; the last step has one too."""
    task: str | None = None
    """A benchmark that `d2f eval` knows: word-problems, functions, gsm8k, …."""
    held_out: int | None = None
    """Instead of a task, so many samples of the run's own data, which are then not trained on, nor
    are others with the same prompts."""
    answer: str = "number"
    """held_out: a right answer has the same last number ("number"), or the same text but for white
    space ("exact")."""
    num_problems: int = 100
    """task: the first so many problems."""
    split: str | None = None
    """task: "validation" or "test"; none: validation for the built-in problems, gsm8k-variants,
    advising and wikisql, else test."""
    data: str | None = None
    """task: folder of the benchmark's files; none: from the hub."""
    seed: int = 0
    """Seed of the built-in problems, or of the choice of samples."""
    strategy: str | None = None
    """Strategy that answers; none: that of the stage's samples (autoregressive, vanilla with two
    tokens a step, pipelined)."""
    batch_size: int = 16
    """Problems answered at once."""
    max_new_tokens: int = 256
    """Longest answer."""

    def __post_init__(self) -> None:
        one_of("evaluate.answer", self.answer, ANSWERS)
        for name in ("every", "held_out", "num_problems", "batch_size", "max_new_tokens"):
            at_least(f"evaluate.{name}", getattr(self, name), 1)
        if (self.task is None) == (self.held_out is None):
            raise ConfigError("[evaluate] needs either task or held_out")
        if self.held_out is not None and (self.data is not None or self.split is not None):
            raise ConfigError("evaluate.data and evaluate.split belong to evaluate.task")
        if self.held_out is not None and self.num_problems != EvaluateConfig.num_problems:
            raise ConfigError(
                "evaluate.num_problems belongs to evaluate.task; held_out is a number"
            )
        if self.task is not None and self.answer != EvaluateConfig.answer:
            raise ConfigError("evaluate.answer belongs to evaluate.held_out; a task has its own")
        if self.split is not None:
            one_of("evaluate.split", self.split, ("test", "validation"))
