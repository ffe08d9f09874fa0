"""The same work for every arm: one model directory, one list of token ids, one order of pairs, written once to disk.

Decides: which pairs are measured and in which order, what a truncated model is, and how tokens are counted. Every arm
loads exactly this, so a difference between arms is a difference of training, not of data, weights or tokenisation.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from btrm_core.model import causal_entries, read_shape, training_flops

Pair = tuple[np.ndarray, np.ndarray]  # chosen ids, rejected ids
Prompts = list[list[int]]  # places of the pairs of each prompt


@dataclass(frozen=True)
class Settings:
    """Everything that was chosen for a run; it is part of the result."""

    model: str
    data: tuple[str, ...]
    family: str | None = None
    layers: int | None = None
    random_weights: bool = False
    precision: str = "fp32"
    attention: str = "auto"
    max_length: int = 4096
    pairs_per_step: int = 64
    micro_batch: int = 8
    tokens_per_batch: int = 4096
    steps: int = 1
    passes: int = 3
    warmup: int = 1
    learning_rate: float = 1e-5
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int = 2


@dataclass
class Workload:
    """What an arm is given."""

    settings: Settings
    directory: Path
    pairs: list[Pair]
    prompts: list[int]
    """How many pairs each prompt has; the pairs of a prompt stand one after another."""
    steps: list[list[int]]
    pad_id: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def model_dir(self) -> Path:
        """Directory of the prepared model and tokenizer."""
        return self.directory / "model"

    @property
    def first_step(self) -> int:
        """Where an arm begins: the end of epoch 0 is the warm-up, epochs 1 and later are the measured passes."""
        return self.settings.steps - self.settings.warmup

    def save(self) -> None:
        """Write pairs, order and settings beside the model."""
        flat = [ids for pair in self.pairs for ids in pair]
        lengths = np.array([len(ids) for ids in flat], dtype=np.int64)
        np.savez(self.directory / "pairs.npz", tokens=np.concatenate(flat), lengths=lengths)
        record = {"settings": asdict(self.settings), "steps": self.steps, "pad_id": self.pad_id, "facts": self.facts}
        record["prompts"] = self.prompts
        (self.directory / "workload.json").write_text(json.dumps(record), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Workload:
        """Read what `save` wrote."""
        record = json.loads((directory / "workload.json").read_text(encoding="utf-8"))
        arrays = np.load(directory / "pairs.npz")
        flat = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
        settings = record["settings"]
        settings["data"] = tuple(settings["data"])
        return cls(
            settings=Settings(**settings),
            directory=directory,
            pairs=list(zip(flat[::2], flat[1::2], strict=True)),
            prompts=record["prompts"],
            steps=record["steps"],
            pad_id=record["pad_id"],
            facts=record["facts"],
        )


def build(settings: Settings, directory: Path) -> Workload:
    """Encode the data, choose and order the pairs, prepare the model, and write it all to `directory`."""
    pairs, keys, pad_id, tokenizer, encoding = encode(settings)
    kept = [i for i, pair in enumerate(pairs) if max(map(len, pair)) <= settings.max_length]
    needed = settings.steps * settings.pairs_per_step
    if len(kept) < needed:
        raise ValueError(f"{needed} pairs are needed for {settings.steps} steps, the data has {len(kept)}")
    groups = by_prompt(kept, keys, settings.seed)
    taken = taken_of(groups, needed)
    chosen = [pairs[i] for group in taken for i in group]
    counts = [len(group) for group in taken]
    directory.mkdir(parents=True, exist_ok=True)
    work = Workload(settings, directory, chosen, counts, plan_steps(settings, chosen, counts), pad_id)
    parameters, config = prepare_model(settings, work.model_dir, tokenizer, pad_id)
    work.facts = {
        **encoding,
        "too_long": len(pairs) - len(kept),
        "parameters": parameters,
        "layers": config.num_hidden_layers,
        "all_data": token_counts([pairs[i] for i in kept], settings.micro_batch),
        "measured": token_counts(chosen, settings.micro_batch, counts),
        "flops_minimal": minimal_flops(config, chosen, counts),
    }
    if settings.device == "cuda":
        work.facts["planned_memory"] = planned_memory(settings, str(work.model_dir))
    work.save()
    return work


def planned_memory(settings: Settings, model: str) -> dict[str, int]:
    """Peak bytes of tensors on a GPU that `btrm plan` foresees for `btrm-shared`, and what they are."""
    from btrm_core.preflight import plan

    trained = plan.Workload(
        pairs_per_step=settings.pairs_per_step,
        tokens_per_batch=settings.tokens_per_batch,
        max_length=settings.max_length,
        bf16=settings.precision == "bf16",
    )
    kept: plan.Kept = "inputs" if settings.gradient_checkpointing else "all"
    (found,) = plan.estimate(model, trained, deepspeed="zero1", kept=kept)
    return {"total": found.memory.total, **asdict(found.memory)}


def by_prompt(kept: Sequence[int], keys: Sequence[str], seed: int) -> Prompts:
    """The places in `kept` by their prompts, the prompts in a random order."""
    groups: dict[str, list[int]] = {}
    for place in kept:
        groups.setdefault(keys[place], []).append(place)
    found = list(groups.values())
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def taken_of(groups: Prompts, needed: int) -> Prompts:
    """Whole prompts until `needed` pairs are there; the last one gives what is still missing."""
    taken: Prompts = []
    for group in groups:
        if needed > 0:
            taken.append(group[:needed])
            needed -= len(taken[-1])
    return taken


def trees_of(pairs: Sequence[Pair], prompts: Sequence[int]) -> list[Any]:
    """The trie of each prompt's conversations, as btrm makes them."""
    from btrm_core.packing import grow

    ends = np.cumsum(prompts)
    parts = [pairs[end - count : end] for end, count in zip(ends, prompts, strict=True)]
    return [grow([ids for pair in part for ids in pair]) for part in parts]


def trie_tokens(pairs: Sequence[Pair], prompts: Sequence[int]) -> int:
    """Tokens of the tries of all prompts: what an exact trainer has to compute at least once."""
    return sum(len(tree.tokens) for tree in trees_of(pairs, prompts))


def plan_steps(settings: Settings, pairs: Sequence[Pair], prompts: Sequence[int]) -> list[list[int]]:
    """Pair ids of every step: epoch 0 (its end is the warm-up), then one epoch per pass, each in btrm's seeded order.

    Every arm takes the same pairs in the same step. Inside a step they are shuffled, because the peers cut it into
    micro-batches as it comes and a sampler's order is random.
    """
    from btrm_core.packing import StepBudget, plan_epoch, row_form

    places, form = store_of(pairs, prompts).places, row_form("shared", "varlen", "cpu", 0)
    what = StepBudget(settings.pairs_per_step, settings.tokens_per_batch, seed=settings.seed)
    steps = []
    for epoch in range(settings.passes + 1):
        made = plan_epoch(places, form, what, epoch)
        random = np.random.default_rng([settings.seed, epoch])
        steps += [random.permutation(step.pair_ids).tolist() for step in made]
    return steps


def store_of(pairs: Sequence[Pair], prompts: Sequence[int]) -> Any:
    """Pairs given as ids as btrm stores them: the pairs of a prompt together, in the order given."""
    from btrm_core.data import TokenStore

    ends = np.cumsum(prompts)
    parts = [pairs[end - count : end] for end, count in zip(ends, prompts, strict=True)]
    return TokenStore.of_ids(
        [
            ([ids.tolist() for pair in part for ids in pair], [(2 * i, 2 * i + 1) for i in range(len(part))])
            for part in parts
        ]
    )


def encode(settings: Settings) -> tuple[list[Pair], list[str], int, Any, dict[str, Any]]:
    """Token ids of all pairs, a key of each pair's prompt, the padding id, the tokenizer, and how they were made.

    With a family, btrm's own encoding; without one, the checkpoint's template through transformers.
    """
    from transformers import AutoTokenizer

    rows = list(read_rows(settings.data))
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if settings.family:
        from transformers import AutoConfig

        from btrm_core import families
        from btrm_core.chat import format

        made = format.prepare_chat(
            tokenizer, AutoConfig.from_pretrained(settings.model), families.load(settings.family)
        )
        tokenizer = made.tokenizer
        encoded = made.encode([row[side] for row in rows for side in ("chosen", "rejected")])
        pad_id, how = made.pad_id, f"family {settings.family}"
    else:
        conversations = [row[side] for row in rows for side in ("chosen", "rejected")]
        encoded = tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=False)
        pad_id, how = unused_special_id(tokenizer, encoded), "the checkpoint's own chat template"
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    arrays = [np.asarray(ids, dtype=np.int32) for ids in encoded]
    facts = {"encoding": how, "trl_tokenisation": trl_agreement(tokenizer, rows, arrays)}
    keys = [json.dumps(row["chosen"][:-1]) for row in rows]
    return list(zip(arrays[::2], arrays[1::2], strict=True)), keys, pad_id, tokenizer, facts


def read_rows(sources: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of JSONL or JSONL.gz files in the standard format (`chosen` and `rejected` lists of messages)."""
    for source in sources:
        opener = gzip.open if source.endswith(".gz") else open
        with opener(source, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def unused_special_id(tokenizer: Any, encoded: Sequence[Sequence[int]]) -> int:
    """A special token that occurs in no conversation: padding with it cannot move the position of a reward.

    transformers reads the reward at the last id that differs from padding, so padding with EOS (SmolLM2's default)
    would make every padded arm read another position than btrm's.
    """
    used = {int(i) for ids in encoded for i in ids}
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(tokenizer.added_tokens_decoder)]
    for candidate in candidates:
        if candidate is not None and candidate not in used:
            return int(candidate)
    raise ValueError("every special token of this tokenizer occurs in the data: none can serve as padding")


def trl_agreement(tokenizer: Any, rows: Sequence[dict[str, Any]], ids: Sequence[np.ndarray]) -> dict[str, int] | None:
    """Over the first 64 pairs: of how many conversations TRL's own tokenisation gives the same ids; None without TRL.

    Training uses our ids in every arm; this only says whether TRL would have trained on the same ones.
    """
    try:
        from trl.data_utils import _tokenize
    except ImportError:
        return None
    conversations = [row[side] for row in rows[:64] for side in ("chosen", "rejected")]
    theirs = [_tokenize(tokenizer, conversation)["input_ids"] for conversation in conversations]
    same = sum(list(a) == b.tolist() for a, b in zip(theirs, ids[: len(theirs)], strict=True))
    return {"compared": len(theirs), "equal": same}


def prepare_model(settings: Settings, target: Path, tokenizer: Any, pad_id: int) -> tuple[dict[str, int], Any]:
    """Write the sequence-classification model all arms start from; returns parameter counts and its text config.

    The head is drawn from N(0, 1/(hidden + 1)) with the run's seed. `layers` keeps the first layers only.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(settings.seed)
    config = AutoConfig.from_pretrained(settings.model, num_labels=1)
    text = config.get_text_config()
    text.pad_token_id = pad_id
    if settings.layers:
        text.num_hidden_layers = min(settings.layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    if settings.random_weights:
        # a GPU draws billions of weights in a second; what all arms start from is rounded as they compute
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        with torch.device(settings.device):
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(settings.model, config=config, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=(text.hidden_size + 1) ** -0.5)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    backbone = getattr(model, model.base_model_prefix)
    total = sum(p.numel() for p in backbone.parameters())
    embeddings = sum(p.numel() for p in backbone.get_input_embeddings().parameters())
    del model, backbone
    torch.cuda.empty_cache()  # the arms need all of the memory
    return {"backbone": total, "backbone_without_embeddings": total - embeddings}, text


def common_prefix(pair: Pair) -> int:
    """Length of the longest common prefix of the two finished sequences."""
    n = min(map(len, pair))
    differ = np.flatnonzero(pair[0][:n] != pair[1][:n])
    return int(differ[0]) if len(differ) else n


def token_counts(pairs: Sequence[Pair], micro_batch: int, prompts: Sequence[int] | None = None) -> dict[str, int]:
    """Tokens of `pairs`, in this order, under each way to lay them out.

    `conversations`: both conversations in full. `minimal`: the prefix that the sides of a pair share once. `trie`: what
    conversations of a prompt begin with once, which no exact trainer can undercut; `prompts` says how many pairs each
    prompt has. `padded`: batches of `micro_batch` pairs, all 2 x `micro_batch` sequences padded to the longest.
    """
    counts = [1] * len(pairs) if prompts is None else prompts
    longest = np.array([max(map(len, pair)) for pair in pairs])
    both = sum(len(a) + len(b) for a, b in pairs)
    groups = [longest[i : i + micro_batch] for i in range(0, len(longest), micro_batch)]
    return {
        "pairs": len(pairs),
        "conversations": both,
        "minimal": both - sum(map(common_prefix, pairs)),
        "trie": trie_tokens(pairs, counts),
        "prompts": len(counts),
        "padded": int(sum(2 * len(group) * group.max() for group in groups)),
        "longest": int(longest.max()),
    }


def tree_entries(tree: Any, window: int | None = None) -> int:
    """Visible attention entries of a trie: every token sees those before it on its path, as far as a window reaches."""
    return sum(
        causal_entries(int(depth + stop - start), window) - causal_entries(int(depth), window)
        for (start, stop, _), depth in zip(tree.edges, tree.depths, strict=True)
    )


def minimal_flops(config: Any, pairs: Sequence[Pair], prompts: Sequence[int]) -> float:
    """FLOPs of one forward and backward over `pairs` with every token of a prompt's trie computed once."""
    parameters, shape = read_shape(config)
    trees = trees_of(pairs, prompts)
    entries = {window: sum(tree_entries(tree, window) for tree in trees) for window in set(shape.windows)}
    per_layer = [entries[window] for window in shape.windows]
    return training_flops(parameters, shape, trie_tokens(pairs, prompts), per_layer)
