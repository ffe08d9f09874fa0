"""The settings of a training run: names, types, defaults, what each means, and which values it may take.

Decides: everything about one setting, beside the setting: its choices or range, its flag on the command line and, in
the first sentence of its docstring, the flag's help. Reading, overriding and what settings mean together are
`config`'s; `cli.flags` makes the flags. A setting left at None is filled by the family's recipe or derived by the
module that needs it.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any

from btrm_core.marks import Above, AtLeast, AtMost, Flag, OneOf, Rule, Setting


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it computes."""

    name: Annotated[str | None, Flag("model", "ID|DIR")] = None
    """Base model. Default: a tiny model of the family. A directory or a hub id; None trains the toy."""
    revision: Annotated[str | None, Flag()] = None
    """Branch, tag or commit of a hub id."""
    dtype: Annotated[str, OneOf("auto", "bf16", "fp32"), Flag(names_choices=True)] = "auto"
    """Compute type; auto is bf16 on a GPU and fp32 on CPU. Masters, head and loss are fp32 in any case."""
    attention: Annotated[str, OneOf("auto", "flash", "varlen", "flex", "sdpa", "eager"), Flag(names_choices=True)] = (
        "auto"
    )
    """Attention kernel."""
    quantize: Annotated[str, OneOf("none", "4bit"), Flag(metavar="BITS")] = "none"
    """4bit: frozen weights in 4 bits under the adapters (QLoRA). The type is NF4 (arXiv:2305.14314); only with
    adapters."""
    kernels: Annotated[str, OneOf("auto", "liger", "torch"), Flag(names_choices=True)] = "auto"
    """Kernels of norms, rotary embedding and MLP; liger needs liger-kernel and a GPU, auto is torch."""
    gradient_checkpointing: Annotated[bool, Flag(negated=True)] = False
    """Less memory, more compute. Activations are computed again in the backward pass: about a third more."""
    selective_checkpointing: Annotated[bool, Flag()] = False
    """Gradient checkpointing that keeps products of matrices. They and attention stay; norms, activations and the like
    are computed again: faster than computing everything again, and more memory (arXiv:2205.05198, section 5)."""
    activation_offload: Annotated[bool, Flag()] = False
    """Keep activations in CPU memory meanwhile. They come back for the backward pass."""
    dropout: bool = False
    """Keep the dropout of the base model's config. Off: set to 0; packed rows cannot have dropout in attention."""
    freeze_embeddings: Annotated[bool, Flag()] = False
    """Do not train the token embeddings."""
    train_last_layers: Annotated[int | None, Above(0), Flag(metavar="N")] = None
    """Train only the last N layers, final norm and head. The rest stays frozen."""
    trust_remote_code: Annotated[bool, Flag()] = False
    """Run code that comes with the checkpoint. Off unless asked for."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Answers that beat the family's own."""

    pad_token: str | None = None
    """Padding token to use instead of the family's."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the family's."""


@dataclass(frozen=True)
class HeadConfig:
    """The linear map from hidden state to reward."""

    init_std: Annotated[float | None, Above(0)] = None
    """Standard deviation of the initial head; None: the family's, else 1/sqrt(hidden + 1)."""


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and what happens to long or broken ones."""

    train: Annotated[tuple[str, ...], Flag("data", "SRC", repeat=True)] = ()
    """Training pairs; repeat to mix. Default: the sample."""
    eval: Annotated[tuple[str, ...], Flag("eval-data", "SRC", repeat=True)] = ()
    """Evaluation pairs. Default: held out by prompt. `held_out_fraction` says how many."""
    map: Annotated[tuple[str, ...], Flag("map", "NAME=COLUMN,...", repeat=True)] = ()
    """The data's own names, as prompt=question. Also role.expert=assistant, margin=scores; in TOML a table
    [data.map]."""
    max_length: Annotated[int | None, Above(0), Flag()] = None
    """Longest conversation in tokens. Longer ones lose whole oldest turns of the prompt, equally on both sides."""
    held_out_fraction: Annotated[float, AtLeast(0), AtMost(1, included=False)] = 0.05
    """Share of the training pairs held out for evaluation when no evaluation data is given; 0 holds out none."""
    format: str | None = None
    """Format of the rows by name, as hh or ultrafeedback; None finds it out row by row."""
    scored: Annotated[str, OneOf("best-vs-worst", "best-vs-each", "all", "random")] = "best-vs-worst"
    """Pairs of a row with several scored responses: best-vs-worst, best-vs-each, all or random (one pair of unequal
    scores, drawn by a hash of the answers and so the same in every run). A row's pairs weigh 1 together, are computed
    together and count as one pair of a step (InstructGPT, arXiv:2203.02155, section 3.5)."""
    ties: Annotated[str, OneOf("skip", "half")] = "skip"
    """Declared ties and equal scores: skip, or half to train on them as half a win for each answer (Davidson 1970)."""
    group_by: Annotated[str, OneOf("prompt", "pair"), Flag(metavar="WHAT")] = "prompt"
    """What is shuffled: prompt (its pairs share a step) or pair. Every step has the same number of pairs either way;
    pairs of one step share their tokens (InstructGPT, arXiv:2203.02155, section 3.5)."""
    own_prompts: bool = False
    """Train also on pairs whose two answers have prompts of their own (conversations that part before the end)."""
    strict: Annotated[bool, Flag()] = False
    """Stop at the first bad row. Otherwise it is counted, and the run goes on."""
    workers: Annotated[int | None, Above(0), AtMost(1024)] = None
    """Processes that tokenise; None: one per two cores, at most 8."""
    cache_dir: str | None = None
    """Where prepared data is kept; None: $BTRM_CACHE, else the user's cache directory."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation, in pairs per step, and the memory, in tokens per micro-batch."""

    pairs_per_step: Annotated[int | None, Above(0), Flag()] = None
    """Pairs of an optimiser step, over all processes. The result depends on it and not on the number of GPUs."""
    tokens_per_batch: Annotated[int, Above(0), Flag()] = 8192
    """Tokens of a micro-batch on one process (memory only). It never changes the result. Processes that share rows
    (`--sequence-parallel N`) have rows of N times as many."""
    learning_rate: Annotated[float | None, Above(0), Flag()] = None
    """Peak learning rate. AdamW uses it."""
    epochs: Annotated[float | None, Above(0), AtMost(1_000_000), Flag()] = None
    """Passes over the pairs."""
    max_steps: Annotated[int | None, Above(0), Flag()] = None
    """Stop after so many steps."""
    max_hours: Annotated[float | None, Above(0), Flag()] = None
    """Stop cleanly after so many hours. They count from this start; the model is saved."""
    max_total_hours: Annotated[float | None, Above(0)] = None
    """Stop cleanly, with a saved model, after this many hours of training over all starts of the run."""
    warmup_ratio: Annotated[float | None, AtLeast(0), AtMost(1)] = None
    """Share of the steps over which the learning rate rises; a cosine brings it down to zero."""
    weight_decay: Annotated[float | None, AtLeast(0)] = None
    """AdamW weight decay; never on norms, biases or the head."""
    max_grad_norm: Annotated[float, Above(0)] = 1.0
    """Global gradient norm above which gradients are scaled down."""
    optimizer: Annotated[
        str, OneOf("adamw", "adamw-8bit", "adamw-8bit-paged"), Flag(metavar="NAME", names_choices=True)
    ] = "adamw"
    """AdamW, or with both moments in 8 bits (bitsandbytes, arXiv:2110.02861)."""
    adam_beta1: Annotated[float, AtLeast(0, below=1)] = 0.9
    """AdamW's first moment decay."""
    adam_beta2: Annotated[float, AtLeast(0, below=1)] = 0.999
    """AdamW's second moment decay."""
    adam_eps: Annotated[float, Above(0)] = 1e-8
    """AdamW's epsilon."""
    seed: Annotated[int, AtLeast(0), Flag()] = 0
    """Seed of head and order. It is the seed of any dropout as well."""
    layout: Annotated[str, OneOf("shared", "packed", "padded")] = "shared"
    """Rows: shared (packed, common prefixes once), packed (no sharing) or padded (the reference)."""
    auto_budget: Annotated[bool, Flag()] = False
    """Halve the token budget when GPU memory runs out. The run goes on from the same step."""
    skip_nan: Annotated[bool, Flag()] = False
    """Skip and count steps that are not finite. Otherwise a loss or gradient that is not finite stops the run."""
    early_stopping: Annotated[int | None, Above(0), Flag(metavar="N")] = None
    """Stop when N evaluations bring no lower loss."""


@dataclass(frozen=True)
class LossConfig:
    """Variations of the Bradley-Terry loss; all off by default."""

    margin: bool = False
    """Subtract the data's margin from the reward margin (Llama 2, arXiv:2307.09288, section 3.2.2)."""
    label_smoothing: Annotated[float, AtLeast(0, below=0.5)] = 0.0
    """Probability that a label is wrong (conservative loss, arXiv:2305.18290 follow-up note; 0 to 0.5)."""
    centering: Annotated[float, AtLeast(0)] = 0.0
    """Coefficient of mean((r_chosen + r_rejected)^2), which keeps rewards centred (arXiv:2312.09244)."""
    ranking: Annotated[str, OneOf("pairs", "plackett-luce")] = "pairs"
    """Several responses to a prompt: the mean over its pairs (InstructGPT, arXiv:2203.02155, section 3.5), or
    plackett-luce, the likelihood of the whole ranking (arXiv:2305.18290, appendix A.3)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (peft); the head is always trained and saved."""

    rank: Annotated[int | None, Above(0), Flag("lora-rank", "N")] = None
    """Train low-rank adapters instead of all weights. Their rank; None trains all weights."""
    alpha: Annotated[float | None, Above(0), Flag("lora-alpha")] = None
    """Scale of the adapters. Default: twice the rank."""
    dropout: Annotated[float, AtLeast(0), AtMost(1, included=False), Flag("lora-dropout")] = 0.0
    """Dropout on the adapters' input."""
    targets: Annotated[tuple[str, ...], Flag("lora-targets", "NAME,...")] = ("all-linear",)
    """Layers to adapt, as q_proj,v_proj. Default: all linear ones. The word for these is all-linear."""
    merge: Annotated[bool, Flag(negated=True)] = True
    """Save whole weights, or the adapters alone. Default: merge. Merged they are an ordinary model directory."""


@dataclass(frozen=True)
class DistributedConfig:
    """Processes and ZeRO."""

    deepspeed: Annotated[str, Flag(metavar="PRESET|FILE")] = "zero1"
    """zero1, zero2, zero2-offload, zero3, zero3-offload or JSON. JSON is a DeepSpeed configuration file."""
    sequence_parallel: Annotated[int, Above(0), Flag(metavar="N")] = 1
    """Processes that share the tokens of each row. For long conversations: each computes its slice of a row, and some
    heads of attention over all of it (Ulysses, arXiv:2309.14509). N divides the number of processes and the model's
    attention heads; the result does not depend on it."""
    join_seconds: Annotated[float, Above(0), AtMost(1_000_000)] = 300.0
    """How long the processes of a run wait for each other at its start."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind, and how often."""

    dir: Annotated[str | None, Flag("output", "DIR")] = None
    """Where to write. Default: runs/FAMILY-MODEL."""
    overwrite: Annotated[bool, Flag()] = False
    """Replace a finished model."""
    eval_every: Annotated[int | None, Above(0), Flag()] = None
    """Steps between evaluations. None: ten times in a run."""
    save_every: Annotated[int | None, Above(0), Flag()] = None
    """Steps between resumable checkpoints. None: only at the end."""
    keep_last: Annotated[int, Above(0), Flag(metavar="N")] = 2
    """Resumable checkpoints to keep."""
    wait_for_room: Annotated[float, AtLeast(0)] = 1200.0
    """Seconds to wait for room on a full disk when the finished model is saved."""
    keep_best: Annotated[bool, Flag()] = False
    """Keep the model with the lowest evaluation loss. It becomes the final one."""
    best_by: Annotated[str, Flag(metavar="[NAME.]FIGURE")] = "loss"
    """What is best instead of the lowest loss, as accuracy or chat.accuracy. One of loss, brier, ece, accuracy and
    reward_margin, of all pairs or of a subset; another than the loss keeps the best model."""
    resume: Annotated[str, Flag(bare="auto")] = "no"
    """Go on from the last checkpoint, or the one named. Values: no, auto (the newest complete checkpoint of the output
    directory), latest-good, or a checkpoint directory."""
    force_resume: Annotated[bool, Flag()] = False
    """Resume although data or settings differ."""
    restart_optimizer: Annotated[bool, Flag()] = False
    """Resume with a fresh optimizer, at any stage. Weights and position are the checkpoint's; the stage is ZeRO's."""
    push_to: Annotated[str | None, Flag(metavar="HUB_ID")] = None
    """Upload the finished model to the Hugging Face Hub. Token and repository are tried before training; None uploads
    nothing."""
    private: Annotated[bool, Flag()] = False
    """Make the repository private. That is, if `push_to` has to make one."""
    report_to: Annotated[str, Flag(metavar="TRACKER")] = "none"
    """none, wandb, tensorboard, ... Several are separated by commas."""
    project: str = "btrm"
    """Project name for the tracker."""
    run_name: str | None = None
    """Name of the run for the tracker."""
    profile: Annotated[bool, Flag()] = False
    """Profile a few steps. Writes a trace and prints where the time goes."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run."""

    family: Annotated[str | None, Flag(metavar="NAME")] = None
    """Model family; `btrm families` lists them. Default: ask them all. The name of a plugin; None asks every installed
    one whether it claims the checkpoint."""
    force_family: Annotated[bool, Flag()] = False
    """Use the named family on a checkpoint that it does not claim. `btrm.json` then carries a warning."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


@cache
def declared() -> dict[str, Setting]:
    """Every setting by its key, in the order of the dataclasses."""
    found: dict[str, Setting] = {}
    for name, hint in typing.get_type_hints(RunConfig, include_extras=True).items():
        if is_dataclass(hint):
            section = typing.get_type_hints(hint, include_extras=True)
            found.update({f"{name}.{key}": _setting(f"{name}.{key}", inner) for key, inner in section.items()})
        else:
            found[name] = _setting(name, hint)
    return found


def _setting(key: str, hint: Any) -> Setting:
    kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    kinds = typing.get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return Setting(
        key,
        kind=next(k for k in kinds if k is not type(None)),
        optional=type(None) in kinds,
        rules=tuple(mark for mark in marks if isinstance(mark, Rule)),
        flag=next((mark for mark in marks if isinstance(mark, Flag)), None),
    )
