"""From a base model's directory or hub id to a model with a reward head, ready to be trained.

Decides: which weights are taken, which are new (the head, the row of a new token) and how they start, and what is
trained. Under ZeRO-3 the weights are spread over processes from the first moment, so new values are written on one
process and handed to all.

Shapes: H hidden.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btrm_core import weights
from btrm_core.chat import ChatFormat
from btrm_core.console import LongWork, quiet_libraries
from btrm_core.errors import CheckpointError, ConfigError, first_line
from btrm_core.families import Family
from btrm_core.hub import has_own_code, hub_problem
from btrm_core.model import adapters, leakage
from btrm_core.model.leakage import check_max_length, require_head_class, text_modules, towers, without_dropout
from btrm_core.model.quantized import loading_options, settle
from btrm_core.model.reward import RewardModel, choose_for, keep_in_memory
from btrm_core.model.savings import recompute_activations, use_kernels
from btrm_core.settings import ModelConfig, RunConfig


@dataclass(frozen=True)
class BaseModel:
    """A transformers sequence-classification model with one output, whether its head is new, and what was left out."""

    hf: Any
    head_is_new: bool
    note: str | None = None


def base_config(model: ModelConfig) -> Any:
    """The transformers configuration of the base model, without weights.

    Args:
        model: Names the directory or hub id and its revision.

    Raises:
        CheckpointError: there is no such directory or hub id, it holds no configuration, or its weights are damaged,
            quantised, or hold a trained head where nothing reads it.
    """
    from transformers import AutoConfig

    name = _checked_name(model)
    if Path(name).is_dir():
        weights.check_files(Path(name))
        weights.refuse_other_head(Path(name))
    try:
        config = AutoConfig.from_pretrained(name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises what its parsers raise
        why = hub_problem(error, name)
        raise CheckpointError(
            why or f"cannot read the configuration of the base model {name}: {first_line(error)}"
        ) from error
    weights.check_config(config, name)
    return config


def load_tokenizer(model: ModelConfig) -> Any:
    """The base model's tokenizer as it comes, before any family has set it up.

    Args:
        model: As for `base_config`.

    Raises:
        CheckpointError: it is not there, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        why = weights.no_tokenizer(Path(str(model.name))) or hub_problem(error, str(model.name))
        raise CheckpointError(why or f"cannot load the tokenizer of {model.name}: {first_line(error)}") from error


def load_base(model: ModelConfig, dtype: torch.dtype) -> BaseModel:
    """Load the weights under a one-output head, packed if the settings say so.

    Args:
        model: Names the base model, and says whether it is packed.
        dtype: Type of the weights; of packed ones, the type they are computed in.

    Raises:
        ConfigError: no base model is named, or packed weights need a bitsandbytes that is not there.
        CheckpointError: the directory has no (safetensors) weights, weights of the backbone are missing or not finite,
            or the architecture has no sequence-classification model with a linear head called `score`.
    """
    from transformers import AutoModelForSequenceClassification

    name = _checked_name(model)
    _check_weights(Path(name))
    require_head_class(base_config(model), name)
    packed = loading_options(model.quantize, dtype)
    try:
        # libraries report that the head is new: btrm checks it and says so itself
        with LongWork(f"loading {name}"), quiet_libraries(), leakage.frequencies_kept():
            hf, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                num_labels=1,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **packed,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers and safetensors raise many types
        why = hub_problem(error, name)
        raise CheckpointError(why or f"cannot load the base model {name}: {first_line(error)}") from error
    settle(hf)
    if getattr(hf, "_hf_peft_config_loaded", False):
        raise adapters.no_base_model(name)
    if not isinstance(getattr(hf, "score", None), nn.Linear):
        raise CheckpointError(f"{name}: {type(hf).__name__} has no linear head called `score`; btrm cannot train it")
    return BaseModel(hf, *weights.check_loaded(hf, info, name))


def set_reward_config(hf: Any, pad_id: int) -> None:
    """Write into the configuration what makes every reader return the raw reward: labels, problem type, pad.

    Args:
        hf: The model, whose configuration is changed.
        pad_id: Id of the chat format's pad token.
    """
    hf.config.id2label, hf.config.label2id = {0: "reward"}, {"reward": 0}
    hf.config.problem_type = "regression"
    hf.config.get_text_config().pad_token_id = pad_id
    hf.config.use_cache = False


def add_embedding_row(hf: Any, num_tokens: int, new_ids: list[int]) -> None:
    """Give new tokens a row: the mean of the old ones, so that their norm is like any token's.

    Resizes only if the vocabulary does not reach so far. The backbone's input embedding is the only one a reward model
    has, so tied embeddings need nothing more.

    Args:
        hf: The model, also spread over processes by ZeRO-3.
        num_tokens: Length of the tokenizer, new tokens included.
        new_ids: Ids whose rows are set; they are no part of the mean.
    """
    old = hf.get_input_embeddings().weight
    rows = getattr(old, "ds_shape", old.shape)[0]
    if num_tokens > rows:
        hf.resize_token_embeddings(num_tokens, mean_resizing=False)
    weight = hf.get_input_embeddings().weight
    with gathered(weight), torch.no_grad():
        if _writes_here(weight):
            known = [i for i in range(min(rows, num_tokens)) if i not in set(new_ids)]
            weight[new_ids] = weight[known].float().mean(0).to(weight.dtype)


def init_head(hf: Any, initialise: Callable[[Tensor], None], seed: int, who: str = "the head initialiser") -> None:
    """Fill the head with the hook's initialiser, the same values on every process for the same seed.

    Args:
        hf: The model; its head is `score`.
        initialise: Fills a (1, H) fp32 tensor of NaN in place.
        seed: Of its random numbers; the caller's random state is left as it was.
        who: What it is, for the error.

    Raises:
        ConfigError: the initialiser left values that are not finite, or only zeros.
    """
    weight = hf.score.weight
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    value_1H = torch.full(shape, math.nan, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            initialise(value_1H)
    if not torch.isfinite(value_1H).all():
        raise ConfigError(f"{who} left values that are not finite; init_head must fill the whole (1, hidden) tensor")
    if not value_1H.any():
        raise ConfigError(
            f"{who} left all weights at zero, so that every reward is 0 and the backbone learns nothing "
            "from the first step; init_head must fill the (1, hidden) tensor with random values"
        )
    with gathered(weight), torch.no_grad():
        if _writes_here(weight):
            weight.copy_(value_1H.to(weight))


def freeze(hf: Any, model: ModelConfig) -> None:
    """Freeze what the settings say; the final norm and the head always train.

    Args:
        hf: The model, without adapters.
        model: `freeze_embeddings`, and `train_last_layers`, which freezes all embeddings too.

    Raises:
        ConfigError: more layers are to be trained than there are, or they are in no list.
    """
    for tower in towers(hf).values():  # no gradient reaches them, and weight decay would
        tower.requires_grad_(False)
    if model.freeze_embeddings:
        hf.get_input_embeddings().requires_grad_(False)
    if model.train_last_layers is None:
        return
    for _, module in text_modules(hf):
        if isinstance(module, nn.Embedding):  # of tokens, and of positions where they are learned
            module.requires_grad_(False)
    count = hf.config.get_text_config().num_hidden_layers
    lists = [module for _, module in text_modules(hf) if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ConfigError(f"model.train_last_layers: {type(hf).__name__} has no list of {count} layers; leave it out")
    if model.train_last_layers > count:
        raise ConfigError(f"model.train_last_layers = {model.train_last_layers}: the model has {count} layers")
    for layer in lists[0][: count - model.train_last_layers]:
        layer.requires_grad_(False)


@contextlib.contextmanager
def gathered(*weights: Tensor) -> Iterator[None]:
    """Whole tensors inside the block, also under ZeRO-3; what rank 0 writes reaches every process."""
    if not any(hasattr(w, "ds_id") for w in weights):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0):
        yield


def _writes_here(weight: Tensor) -> bool:
    return not hasattr(weight, "ds_id") or torch.distributed.get_rank() == 0


def _checked_name(model: ModelConfig) -> str:
    name = model.name
    if name is None:
        raise ConfigError("no base model is named: give --model ID|DIR")
    path = Path(name)
    looks_local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not path.is_dir():
        raise CheckpointError(f"the base model {name} is neither a directory nor a hub id of the form owner/name")
    if looks_local and not (path / "config.json").exists():
        if (path / adapters.SETTINGS).exists():
            raise adapters.no_base_model(name)
        raise CheckpointError(f"the base model directory {name} has no config.json")
    return name


def _check_weights(path: Path) -> None:
    if (path / adapters.SETTINGS).exists():  # transformers would load them onto whole weights beside them
        raise adapters.no_base_model(str(path))
    if not path.is_dir() or any((path / file).exists() for file in (weights.WEIGHTS, weights.INDEX)):
        return
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    found = f"only {', '.join(others)}, which may run code or lose precision" if others else "none"
    raise CheckpointError(
        f"the base model directory {path} has no weights in safetensors form (found {found}); expected "
        "model.safetensors or model.safetensors.index.json"
    )


def build_model(
    config: RunConfig, family: Family, chat: ChatFormat, dtype: torch.dtype, device: torch.device
) -> tuple[RewardModel, bool]:
    """Load the base model, give it its head and settings; returns the reward model and whether its head is new.

    Args:
        config: Resolved settings.
        family: Initialises a new head, and says which attention kernels are allowed.
        chat: Its pad token gets a row if it is new.
        dtype: Type of the weights.
        device: Where the model will compute: the kernel is chosen for it, and weights on a CPU leave their file.

    Raises:
        ConfigError: as `load_base`, `init_head`, `freeze` and `use_kernels`, or settings do not go with the model.
        CheckpointError: as `load_base`.
    """
    base = load_base(config.model, dtype)
    hf = base.hf
    notes = [check_max_length(hf, config.data.max_length), base.note]
    if not config.model.dropout and (dropped := without_dropout(hf)):
        notes.append(
            f"dropout and noise of the base model's config are left out ({', '.join(dropped)}); "
            "--set model.dropout=true keeps them"
        )
    if has_own_code(hf.config):
        notes.append(
            "the base model comes with code of its own, which btrm does not run in a finished model: only transformers "
            "will open that, with trust_remote_code=True"
        )
    set_reward_config(hf, chat.pad_id)
    if chat.num_new_tokens:
        add_embedding_row(hf, len(chat.tokenizer), [chat.pad_id])
    if base.head_is_new:
        own = "init_head" in family.hooks and config.head.init_std is None
        who = f"family '{family.name}' ({family.origin}): the head" if own else "the head"
        size = hf.config.get_text_config().hidden_size
        init_head(hf, family.init_head(size), config.train.seed, f"{who} initialiser")
    use_kernels(hf, config.model.kernels, keep_products=config.model.selective_checkpointing)
    freeze(hf, config.model)
    recomputes = recompute_activations(hf, config.model)
    kernel = choose_for(hf, config.model.attention, device.type, family.recipe().attention)
    if config.lora.rank is not None:
        hf = adapters.add_adapters(hf, config.lora, config.train.seed)
        if recomputes:
            hf.enable_input_require_grads()
    model = RewardModel(keep_in_memory(hf, device), kernel)
    model.notes = tuple(note for note in notes if note)
    return model, base.head_is_new


def expected_kernel(model: ModelConfig, family: Family, dtype: torch.dtype, device_type: str) -> str:
    """The attention kernel that `build_model` will choose, from the model's configuration alone: no weights are read.

    Args:
        model: Settings of the base model.
        family: Whose recipe says which kernels are allowed.
        dtype: Compute type.
        device_type: "cuda" or "cpu".

    Raises:
        ConfigError: the kernel asked for cannot be used.
        CheckpointError: the architecture has no sequence-classification model.
    """
    from transformers import AutoModelForSequenceClassification

    described = base_config(model)
    require_head_class(described, str(model.name))
    try:
        with torch.device("meta"):
            hf = AutoModelForSequenceClassification.from_config(
                described, dtype=dtype, trust_remote_code=model.trust_remote_code
            )
    except Exception as error:  # a model's own
        raise CheckpointError(f"cannot load the base model {model.name}: {first_line(error)}") from error
    return choose_for(hf, model.attention, device_type, family.recipe().attention)
