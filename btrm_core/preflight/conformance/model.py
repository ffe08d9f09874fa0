"""Checks of what a family means for a model: detection, head, recipe, and a tiny training from start to scoring."""

from __future__ import annotations

import math

from btrm_core import families
from btrm_core.chat import ONE, TWO
from btrm_core.errors import FamilyError
from btrm_core.families import PROJECT, Family
from btrm_core.preflight.conformance.small import SMALL
from btrm_core.preflight.conformance.subject import Subject
from btrm_core.preflight.conformance.verdict import Missing, NotConforming, require

CONVERSATIONS = [ONE, TWO]
"""What is scored by every way of scoring; of different lengths, so that a batch of them is padded."""


_TOLERANCE = 1e-4
"""Largest accepted difference of two rewards in float32 that must be equal but for rounding."""


class ModelChecks:
    """Detection, head, recipe; and a two-layer model that is trained, saved, loaded and asked."""

    subject: Subject

    def test_claims_its_own_only(self) -> None:
        """The family claims its own checkpoint's config and none of the families that come with btrm."""
        from transformers import AutoConfig

        subject = self.subject
        if "claims" not in subject.family.hooks:
            raise Missing("the family has no claims hook: it is never detected, but can be named")
        config = subject.config
        require(
            subject.family.claims(config),
            f"the family does not claim its own checkpoint (model_type {config.model_type!r})",
            "`btrm train --family NAME` refuses a checkpoint that the family does not claim",
            "let claims(config) return True for the configs it is made for, the recipe's tiny shape included",
        )
        for entry in families.discover():
            if entry.distribution != PROJECT or entry.name == subject.name:
                continue
            tiny = families.load(entry.name).recipe().tiny
            if tiny is None:
                continue
            foreign = AutoConfig.for_model(tiny.model_type, **{**SMALL, **dict(tiny.config)})
            require(
                not subject.family.claims(foreign),
                f"the family also claims checkpoints of '{entry.name}' (model_type {tiny.model_type!r})",
                "with both installed, `btrm train --model` could no longer tell which one to use",
                "look at more of the config, such as rope_theta or vocab_size; or leave claims out, so that the family "
                "must be named",
            )

    def test_head_is_initialised(self) -> None:
        """The head's initialiser fills the tensor with finite values of a right size, the same for equal seeds."""
        family = self.subject.family
        for size in (64, 4096):
            head, again = _drawn_head(family, size), _drawn_head(family, size)
            require(
                all(math.isfinite(value) for value in head),
                f"{sum(not math.isfinite(value) for value in head)} of the {size} values of the head are not finite",
                "every reward would be NaN",
                "fill the whole (1, hidden_size) tensor in place",
            )
            require(
                head == again,
                f"the head differs between two draws with the same seed (hidden size {size})",
                "every process draws for itself, and they would start from different models",
                "draw from torch's global generator only",
            )
            if "init_head" not in family.hooks:
                continue
            spread = math.sqrt(sum(value * value for value in head))
            require(
                0.01 <= spread <= 3,
                f"the head has norm {spread:.3g} at hidden size {size} (btrm's default has 1)",
                "the last hidden state has entries of about 1, so rewards would start out all alike, or so large that "
                "the first loss is far from ln 2 and btrm stops",
                "choose a standard deviation near 1 / sqrt(hidden_size + 1)",
            )

    def test_recipe_is_sane(self) -> None:
        """The recipe's values lie in the ranges that settings allow, and its kernels exist."""
        try:
            recipe = self.subject.family.recipe()
        except FamilyError as error:
            raise NotConforming(
                str(error), "every run of the family stops there", "give what is expected, or leave the value out"
            ) from error
        allowed = {
            "learning_rate": (recipe.learning_rate, 0, 0.1),
            "pairs_per_step": (recipe.pairs_per_step, 0, 1 << 20),
            "max_length": (recipe.max_length, 15, 1 << 24),
            "epochs": (recipe.epochs, 0, 1000),
            "warmup_ratio": (recipe.warmup_ratio, -1e-9, 1),
            "weight_decay": (recipe.weight_decay, -1e-9, 1),
        }
        for name, (value, above, at_most) in allowed.items():
            whole = name in ("pairs_per_step", "max_length")
            require(
                above < float(value or 0) <= at_most,
                f"recipe: {name} is {value!r}",
                "every run of the family that does not say otherwise starts with it",
                f"give a {'whole ' if whole else ''}number above {max(above, 0)} and at most {at_most}, or None",
            )

    def test_tiny_model_is_built(self) -> None:
        """`btrm train --family NAME` alone has a model to train: the tiny shape builds and gets a reward head."""
        _ = self.subject.family
        try:
            _ = self.subject.base
        except Missing as error:
            raise NotConforming(
                str(error),
                "`btrm train --family NAME` without a model has nothing to train, and nothing below can be checked",
                "give recipe() a TinyShape: model_type, config values, special tokens as in the real tokenizer",
            ) from error
        _ = self.subject.chat
        try:
            _ = self.subject.model
        except Missing as error:
            raise NotConforming(
                str(error),
                "no model of this family can be trained",
                "look at init_head, and at recipe().attention: one that runs on a CPU (eager) should be among them",
            ) from error

    def test_training_lowers_the_loss(self) -> None:
        """Three steps on a repeated batch of packed pairs lower the loss, with finite gradients."""
        losses = self.subject.losses
        require(
            all(map(math.isfinite, losses)) and losses[-1] < losses[0],
            f"the loss on one repeated batch goes {', '.join(f'{loss:.4f}' for loss in losses)}",
            "a model that cannot fit seven pairs cannot be trained",
            "look at the template (is the answer before the terminal token?), the head and the tiny shape's config",
        )

    def test_packed_equals_separate(self) -> None:
        """Rewards of packed rows depend on their own sequences alone: gradients elsewhere are exactly zero."""
        trust = self.subject.trust
        require(
            not trust.wrong,
            str(trust.note),
            "btrm refuses such rows at start-up, and training may be several times slower",
            "name in recipe().attention the kernels that compute this architecture exactly, e.g. ('eager',)",
        )
        if trust.note:
            raise Missing(trust.note)

    def test_saved_model_scores_alike(self) -> None:
        """The saved directory, loaded without the plugin, gives the live model's rewards, also through `Scorer`."""
        import torch
        from transformers import AutoModelForSequenceClassification

        from btrm_core.scoring import Scorer

        directory = self.subject.saved
        loaded, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            require(
                not info[kind],
                f"the saved model loads with {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}",
                "a checkpoint must load with transformers alone",
                "this is about the architecture, not the hooks: report it to btrm",
            )
        with torch.no_grad():
            ids = [torch.tensor([ids]) for ids in self.subject.chat.encode(CONVERSATIONS)]
            self._require_equal([float(loaded.eval()(line).logits) for line in ids], "transformers' own forward pass")
        scored = Scorer(str(directory), dtype="fp32", device="cpu").rewards(CONVERSATIONS)
        self._require_equal([float(reward) for reward in scored], "btrm's Scorer")

    def test_pipeline_scores_alike(self) -> None:
        """`transformers.pipeline` on the rendered text, as the model card shows it, gives the live model's rewards."""
        from transformers import AutoTokenizer, pipeline

        directory = self.subject.saved
        tokenizer = AutoTokenizer.from_pretrained(directory)
        classify = pipeline("text-classification", model=str(directory), tokenizer=tokenizer, device="cpu")
        texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in CONVERSATIONS]
        options = {"top_k": None, "function_to_apply": "none", "add_special_tokens": False}
        found = classify(texts, batch_size=len(texts), **options)
        self._require_equal([labels[0]["score"] for labels in found], "the transformers pipeline, all texts a batch")

    def _require_equal(self, rewards: list[float], who: str) -> None:
        live = self.subject.rewards(CONVERSATIONS)
        difference = max(abs(a - b) for a, b in zip(live, rewards, strict=True))
        require(
            difference <= _TOLERANCE,
            f"{who} gives rewards that differ by {difference:.2g} from the live model's",
            "a checkpoint would score otherwise than it was trained",
            "look at what does not survive saving: tokenizer settings, or config values of the tiny shape",
        )


def _drawn_head(family: Family, size: int) -> list[float]:
    """The values of a head as the family draws it."""
    try:
        return [float(value) for value in family.drawn_head(size, seed=1).flatten()]
    except FamilyError as error:
        raise NotConforming(
            str(error),
            "training from a base model stops there",
            "return a function that fills a (1, hidden_size) float32 tensor in place",
        ) from error
