"""The settings of a training run: names, types, defaults and what each means.

Decides: which settings exist and which values they may take. Reading, overriding and checking them is `config`'s.
A setting left at None is filled by the family's recipe or derived by the module that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The base model and how it computes."""

    name: str | None = None
    """Directory or hub id of the base model; None trains the embedded default."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: str = "auto"
    """Compute type: auto (bf16 on a GPU, fp32 on CPU), bf16 or fp32. Masters, head and loss are fp32 in any case."""
    attention: str = "auto"
    """Attention kernel: auto, flash, varlen, flex, sdpa or eager."""
    quantize: str = "none"
    """Frozen base weights in 4 bits: none or 4bit (NF4, only with adapters; QLoRA, arXiv:2305.14314)."""
    kernels: str = "auto"
    """Kernels of norms, rotary embedding and MLP: liger (needs liger-kernel and a GPU) or torch; auto is torch."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    activation_offload: bool = False
    """Keep saved activations in CPU memory between forward and backward."""
    train_last_layers: int | None = None
    """Train only the last N layers (and the final norm and head); the rest stays frozen."""
    freeze_embeddings: bool = False
    """Do not train the token embeddings."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off unless asked for."""


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

    init_std: float | None = None
    """Standard deviation of the initial head; None: the family's, else 1/sqrt(hidden + 1)."""


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from and what happens to long or broken ones."""

    train: tuple[str, ...] = ()
    """Sources of training pairs; several are mixed."""
    eval: tuple[str, ...] = ()
    """Sources of evaluation pairs; none: held out from the training data by prompt hash."""
    max_length: int | None = None
    """Longest conversation in tokens; longer ones lose whole oldest turns of the prompt, equally on both sides."""
    held_out_fraction: float = 0.05
    """Share of the training pairs held out for evaluation when no evaluation data is given; 0 holds out none."""
    scored: str = "best-vs-worst"
    """Pairs of a row with several scored responses: best-vs-worst, best-vs-each or all; a row's pairs weigh 1 together,
    are computed together and count as one pair of a step (InstructGPT, arXiv:2203.02155, section 3.5)."""
    ties: str = "skip"
    """Declared ties and equal scores: skip, or half to train on them as half a win for each answer (Davidson 1970)."""
    group_by: str = "prompt"
    """What is shuffled: prompt (its pairs then fall into one step and share its tokens; InstructGPT, arXiv:2203.02155,
    section 3.5) or pair. Every step has the same number of pairs either way."""
    strict: bool = False
    """Stop at the first bad row instead of counting it and going on."""
    workers: int | None = None
    """Processes that tokenise; None: one per two cores, at most 8."""
    cache_dir: str | None = None
    """Where prepared data is kept; None: $BTRM_CACHE, else the user's cache directory."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation, in pairs per step, and the memory, in tokens per micro-batch."""

    pairs_per_step: int | None = None
    """Pairs of one optimiser step over all processes; the result depends on it and not on the number of GPUs."""
    tokens_per_batch: int = 8192
    """Token budget of one micro-batch on one process. Memory only: it never changes the result."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW."""
    epochs: float | None = None
    """Passes over the training pairs."""
    max_steps: int | None = None
    """Stop after this many optimiser steps."""
    max_hours: float | None = None
    """Stop cleanly, with a saved model, after this many hours."""
    warmup_ratio: float | None = None
    """Share of the steps over which the learning rate rises; a cosine brings it down to zero."""
    weight_decay: float | None = None
    """AdamW weight decay; never on norms, biases or the head."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    optimizer: str = "adamw"
    """adamw, adamw-8bit or adamw-8bit-paged (both moments in 8 bits; bitsandbytes, arXiv:2110.02861)."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    seed: int = 0
    """Seed of the head, of the order of the pairs and of any dropout."""
    layout: str = "shared"
    """Rows: shared (packed, common prefixes once), packed (no sharing) or padded (the reference)."""
    auto_budget: bool = False
    """After running out of GPU memory, halve tokens_per_batch and go on from the same step."""
    skip_nan: bool = False
    """Skip and count steps with a loss or gradient that is not finite, instead of stopping."""
    early_stopping: int | None = None
    """Stop when the evaluation loss has not fallen for this many evaluations."""


@dataclass(frozen=True)
class LossConfig:
    """Variations of the Bradley-Terry loss; all off by default."""

    margin: bool = False
    """Subtract the data's margin from the reward margin (Llama 2, arXiv:2307.09288, section 3.2.2)."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (conservative loss, arXiv:2305.18290 follow-up note; 0 to 0.5)."""
    centering: float = 0.0
    """Coefficient of mean((r_chosen + r_rejected)^2), which keeps rewards centred (arXiv:2312.09244)."""
    ranking: str = "pairs"
    """Several responses to a prompt: the mean over its pairs (InstructGPT, arXiv:2203.02155, section 3.5), or
    plackett-luce, the likelihood of the whole ranking (arXiv:2305.18290, appendix A.3)."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (peft); the head is always trained and saved."""

    rank: int | None = None
    """Rank of the adapters; None trains all weights."""
    alpha: float | None = None
    """Scale; None: twice the rank."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names to adapt; all-linear means every linear layer of the backbone."""
    merge: bool = True
    """Save an ordinary checkpoint with the adapters merged; false saves the adapters alone."""


@dataclass(frozen=True)
class DistributedConfig:
    """Processes and ZeRO."""

    deepspeed: str = "zero1"
    """zero1, zero2, zero2-offload, zero3, zero3-offload or a DeepSpeed JSON file."""
    join_seconds: float = 300.0
    """How long the processes of a run wait for each other at its start."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind, and how often."""

    dir: str | None = None
    """Directory of the finished model; None: runs/<family>-<model>."""
    overwrite: bool = False
    """Replace a finished model that is already there."""
    eval_every: int | None = None
    """Steps between evaluations; None: ten times in a run."""
    save_every: int | None = None
    """Steps between resumable checkpoints; None: only at the end."""
    keep_last: int = 2
    """Resumable checkpoints to keep."""
    keep_best: bool = False
    """Also keep the model with the lowest evaluation loss, and make it the final one."""
    resume: str = "no"
    """no, auto (the newest complete checkpoint of the output directory), latest-good, or a checkpoint directory."""
    force_resume: bool = False
    """Resume although data or settings have changed."""
    restart_optimizer: bool = False
    """Resume with weights and position of the checkpoint and a fresh optimizer; goes on under another ZeRO stage."""
    report_to: str = "none"
    """none, wandb, tensorboard, or several separated by commas."""
    project: str = "btrm"
    """Project name for the tracker."""
    run_name: str | None = None
    """Name of the run for the tracker."""
    profile: bool = False
    """Write a profiler trace of a few steps and print where the time goes."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run."""

    family: str | None = None
    """Name of the family plugin; None asks every installed family whether it claims the checkpoint."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


CHOICES: dict[str, tuple[str, ...]] = {
    "data.scored": ("best-vs-worst", "best-vs-each", "all"),
    "data.group_by": ("prompt", "pair"),
    "data.ties": ("skip", "half"),
    "loss.ranking": ("pairs", "plackett-luce"),
    "model.dtype": ("auto", "bf16", "fp32"),
    "model.attention": ("auto", "flash", "varlen", "flex", "sdpa", "eager"),
    "model.kernels": ("auto", "liger", "torch"),
    "model.quantize": ("none", "4bit"),
    "train.layout": ("shared", "packed", "padded"),
    "train.optimizer": ("adamw", "adamw-8bit", "adamw-8bit-paged"),
}


POSITIVE = (
    "data.max_length",
    "data.workers",
    "distributed.join_seconds",
    "head.init_std",
    "lora.alpha",
    "lora.rank",
    "model.train_last_layers",
    "output.eval_every",
    "output.keep_last",
    "output.save_every",
    "train.early_stopping",
    "train.epochs",
    "train.learning_rate",
    "train.max_grad_norm",
    "train.max_hours",
    "train.max_steps",
    "train.pairs_per_step",
    "train.tokens_per_batch",
)


NOT_NEGATIVE = ("train.weight_decay", "loss.centering", "train.warmup_ratio", "data.held_out_fraction", "lora.dropout")
