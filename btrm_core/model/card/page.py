"""The model card, `README.md` of a model directory: a function of `btrm.json` and of the model's name alone.

Decides: what stands in it. Everything that others wrote (names of files, subsets, models) stands in code spans, which
nothing can leave, and the front matter is written by the hub's own library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from btrm_core.errors import printable
from btrm_core.evaluation import wilson
from btrm_core.model.card.usage import how_to_use

CARD = """---
{front}---

# Reward model of the {family} family

Trained with btrm {version} on pairs of a chosen and a rejected conversation, with the Bradley-Terry loss
`-log sigmoid(r_chosen - r_rejected)`. It reads a conversation and returns one number, the reward, at the terminal token
{terminal}. Weights are {dtype}; the longest conversation has {max_length} tokens.

## Data

{data}

## Recipe

{recipe}

All settings, the data's fingerprint, hashes of the files and self-test vectors are in `btrm.json`, for `btrm verify`.

## Evaluation

{evaluation}

## Use

{use}

The chat template writes every control token itself, the first one included. Text that went through it is therefore
tokenised with `add_special_tokens=False`: many tokenizers would put a second BOS before it, and the reward would be
another one. Servers that are sent messages or ids do the right thing. The directory is read by transformers 4 (from
4.57) and 5.{attention}

## Limits

- Only differences between answers to the same prompt mean something: the difference of two rewards is the logit of the
  probability that the first is preferred. One reward by itself, or across prompts, is no measure of quality.
- It repeats the judgement of its data, mistakes and preferences for length or style included. What holds for other
  prompts, languages and conversations longer than {max_length} tokens was not measured here.
- A policy that is trained against it will find answers that it overrates; watch them, and keep a held-out judge.

## Licence

{licence}
"""


SOFTCAP = """
Attention is soft-capped in this architecture: with transformers before 5.4, load it with
`attn_implementation="eager"`, or the cap is dropped without a word; later versions read that from `config.json`."""


RECIPE = {
    "train.epochs": "epochs",
    "train.pairs_per_step": "pairs per step",
    "train.learning_rate": "peak learning rate",
    "train.warmup_ratio": "warm-up, share of the steps",
    "train.weight_decay": "weight decay",
    "train.optimizer": "optimizer",
    "train.seed": "seed",
    "loss.margin": "margins in the loss",
    "loss.label_smoothing": "label smoothing",
    "loss.centering": "centering",
    "loss.ranking": "loss over",
    "lora.rank": "LoRA rank",
    "lora.alpha": "LoRA alpha",
    "model.quantize": "quantised base",
    "distributed.deepspeed": "DeepSpeed",
}
"""Settings of the recipe that stand in the card, unless they are off."""
FIGURES = {
    "loss": "loss",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "reward_margin": "mean reward margin",
    "ties": "ties, which count half",
    "longer_wins_tokens": 'accuracy of "the longer answer wins"',
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
LONGEST = 80
"""Characters of a stranger's word that are shown."""


def model_card(made: dict[str, Any], name: str) -> str:
    """The model card for a manifest.

    Args:
        made: the content of `btrm.json`, as a run writes it.
        name: the directory or hub id by which the code in it loads the model.
    """
    blocks = [_fenced(*block) for block in how_to_use(made, name)]
    return CARD.format(
        front=_front(made),
        family=_code(made["family"]),
        version=made["btrm_version"],
        terminal=_code(made["terminal_token"]),
        dtype=made["dtype"],
        max_length=made["max_length"],
        data=_data(made),
        recipe=_recipe(made),
        evaluation=_evaluation(made),
        use="\n\n".join(blocks),
        attention=SOFTCAP if made.get("card", {}).get("softcap") else "",
        licence=_licence(made),
    )


def _fenced(title: str, language: str, code: str) -> str:
    """A block of code that nothing in it can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code)), default=0))
    return f"{title}:\n\n{fence}{language}\n{code}\n{fence}"


def _front(made: dict[str, Any]) -> str:
    """The YAML that the hub reads: only what is surely of its kind."""
    from huggingface_hub import ModelCardData

    about, apart = made.get("card", {}), not (made.get("adapters") or {"merged": True})["merged"]
    front: dict[str, Any] = {
        "library_name": "peft" if apart else "transformers",
        "pipeline_tag": "text-classification",
        **about.get("licence", {}),
        "tags": ["reward-model", "bradley-terry", "btrm"],
    }
    if not about.get("base_is_local", True) and _HUB_ID.fullmatch(str(made["base_model"])):
        front["base_model"] = made["base_model"]
        front["base_model_relation"] = "adapter" if apart else "finetune"
    if about.get("datasets"):
        front["datasets"] = list(about["datasets"])
    if made["evaluation"]:
        front["metrics"] = ["accuracy"]
    return f"{ModelCardData(**front).to_yaml(original_order=list(front))}\n"


def _data(made: dict[str, Any]) -> str:
    data = made["data"]
    rows, encoded = data.get("rows", {}), data.get("encoding", {})
    lines = [f"- trained on {_names(data.get('sources', ()))}", _counted("training", rows, encoded, "train")]
    if "eval" in encoded:
        held = data.get("eval_sources")
        lines.append(f"- evaluated on {held if isinstance(held, str) else _names(held or ())}")
        lines.append(_counted("held-out", rows, encoded, "eval"))
    return "\n".join(line for line in lines if line)


def _counted(what: str, rows: dict[str, Any], encoded: dict[str, Any], side: str) -> str:
    """How many pairs there are of a side, and what became of the others."""
    told, made = rows.get(side, {}), encoded.get(side, {})
    if not made:
        return ""
    left = sum(_counts(told.get("bad"))) + sum(_counts(told.get("left_out"))) + sum(_counts(made.get("dropped")))
    prompts = f" of {made['groups']:,} prompts" if "groups" in made else ""  # the first version did not count them
    text = f"- {made['encoded']:,} {what} pairs{prompts}, {made['tokens']:,} tokens"
    text += f"; {made['truncated']:,} shortened" if made.get("truncated") else ""
    return text + (f"; {left:,} rows or pairs left out" if left else "")


def _counts(value: Any) -> Iterable[int]:
    return (count for count in (value or {}).values() if isinstance(count, int))


def _recipe(made: dict[str, Any]) -> str:
    settings, training = made["config"], made["training"]
    rows = [("steps", f"{training['steps']:,}"), ("seconds", f"{training['seconds']:,}")]
    off = (None, False, 0, 0.0, "none")
    rows += [
        (title, _code(settings[key], cell=True))
        for key, title in RECIPE.items()
        if key in settings and (settings[key] not in off or key == "train.seed")
    ]
    rows.append(("rows", f"{training['layout']} with {training['kernel']} attention"))
    if training.get("skipped_steps"):
        rows.append(("steps skipped, not finite", str(len(training["skipped_steps"]))))
    return _table(("setting", "value"), rows)


def _evaluation(made: dict[str, Any]) -> str:
    figures = made["evaluation"]
    if not figures:
        return "There was no evaluation: nothing is known of how good this model is."
    pairs = made["data"].get("encoding", {}).get("eval", {})
    low, high = figures.get("accuracy_interval") or _interval(figures)
    rows = [("all", figures["pairs"], figures["accuracy"], low, high)]
    rows += [
        (_code(row["name"], cell=True), row["pairs"], row["accuracy"], *_interval(row))
        for row in figures.get("subsets", ())
        if row.get("pairs")
    ]
    heads = ("held-out pairs", "number", "accuracy", "95 % interval")
    text = _table(heads, [(n, f"{c:,}", f"{a:.3f}", f"{x:.3f} to {y:.3f}") for n, c, a, x, y in rows])
    text += "\n\nIntervals are Wilson's for independent pairs."
    if pairs.get("groups", 0) < pairs.get("encoded", 0):
        text += " Several pairs have one prompt here, so the true ones are wider; `btrm eval` resamples by prompt."
    others = [(title, _short(figures[key])) for key, title in FIGURES.items() if figures.get(key) is not None]
    return text + "\n\n" + _table(("on all of them", "value"), others)


def _interval(row: dict[str, Any]) -> tuple[float, float]:
    found = wilson(row["accuracy"] * row["pairs"], row["pairs"])
    return found.low, found.high


def _licence(made: dict[str, Any]) -> str:
    about, base = made.get("card", {}), str(made["base_model"])
    local = about.get("base_is_local", True)
    shown = _code(Path(base).name if local else base)
    found = about.get("licence", {})
    if not found:
        where = "in its directory" if local else f"at https://huggingface.co/{base}"
        return f"The base model {shown} states no licence {where}. Whatever binds it binds this model too."
    named = _code(found.get("license_name", found["license"]))
    link = f" (<{found['license_link']}>)" if "license_link" in found else ""
    return f"The base model {shown} is under the licence {named}{link}, which binds this model too."


def _names(sources: Iterable[str]) -> str:
    """Sources as they are known to others: of a path, its last part."""
    known = [text.rpartition("/")[2] if re.match(r"(?:[\w-]+=)?/", text) else text for text in sources]
    return ", ".join(map(_code, known)) or "no source"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(value: Any, *, cell: bool = False) -> str:
    """A code span that holds any text: one line, and a fence longer than any in it."""
    line = printable(" ".join(str(value).split())) or " "
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line.replace('|', chr(92) + '|') if cell else line}{space}{fence}"


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
