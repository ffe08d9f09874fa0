"""Rewards depend on nothing but their own sequences: every architecture is exact, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import ARCHITECTURES, REFUSED, expected, form_of, tiny_reward_model
from support.tiny_models import SIZE, VOCAB
from transformers import MambaConfig

from btrm_core.errors import CheckpointError, ConfigError
from btrm_core.model.base import freeze
from btrm_core.model.leakage import (
    Use,
    architectures,
    check_max_length,
    examine,
    positions_depend_on_batch,
    positions_problem,
    require_head_class,
    token_mixers,
    trusted,
    without_dropout,
)
from btrm_core.model.reward import RewardModel
from btrm_core.model.shape import read_shape
from btrm_core.packing import Batch, grow, pack_row, pad_rows
from btrm_core.settings import ModelConfig

LEAKING = ["qwen3_next", "qwen3_5_text", "jamba", "zamba", "zamba2", "minimax"]
"""Layers with a state that runs over the border between sequences."""


def sequences(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(list(lengths))
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


def rewards(model: RewardModel, batch: Batch) -> list[float]:
    with torch.no_grad():
        return [float(reward) for reward in model(batch)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exact_or_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    """The form is the one recorded, and short sequences beside a long one get the rewards they get alone."""
    model, (form, reason) = tiny_reward_model(name), expected(name)
    if form == REFUSED:
        with pytest.raises(ConfigError, match=f"cannot be computed exactly, not even one .*{reason}"):
            trusted(model, [], Use(cache_dir=str(tmp_path)))
        return
    trust = trusted(model, [], Use(cache_dir=str(tmp_path)))
    assert form_of(trust) == form, trust.note
    assert reason in (trust.note or "")
    assert (trust.note is None) == (trust.layout == "shared")
    model.eval()
    trees = [grow([ids]) for ids in sequences(70, 2, 9)] + [grow([[5, 6, 7, 8], [5, 6, 9]])]
    batch = pack_row(trees).batch() if trust.layout == "shared" else pad_rows(trees).batch()
    found = rewards(model, batch)
    fresh = tiny_reward_model(name).eval()
    fresh.use_kernel("padded")
    fresh.one_by_one = True
    separate = [rewards(fresh, pad_rows([alone]).batch())[0] for tree in trees for alone in tree.unshared()]
    np.testing.assert_allclose(found, separate, atol=1e-4 * max(1.0, *map(abs, separate)))


def test_no_causal_architecture_is_left_out() -> None:
    """The others have a head of another form, and are refused for it."""
    tried = {architecture.model_type for architecture in ARCHITECTURES.values()}
    encoders = "bert camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roc_bert"
    encoders += " roformer xlm xlm-roberta xlm-roberta-xl xmod big_bird reformer"
    both = "bart bigbird_pegasus mbart mvp plbart"
    others = "ctrl modernbert-decoder xlnet"
    the_same_text_model = {"qwen3_5"}
    not_made_from_sizes_alone = {"cohere_compass_text"}
    left = set(architectures()) - tried - the_same_text_model - not_made_from_sizes_alone
    assert left == set(f"{encoders} {both} {others}".split())


@pytest.mark.parametrize("name", ["mixtral", "phimoe"])
def test_routers_draw_no_noise_in_training(name: str) -> None:
    """Otherwise no reward of a step is that of a separate pass; the settings stay, as some are read in use too."""
    kept = tiny_reward_model(name, dropout=True)
    config = kept.base_model.config
    settings = {key: value for key, value in vars(config).items() if "jitter" in key}
    changed = without_dropout(kept.base_model)
    assert {f"{key}={value:g}" for key, value in settings.items() if value} == set(changed)
    assert {key: getattr(config, key) for key in settings} == settings
    assert without_dropout(kept.base_model) == []
    trees = [grow([ids]) for ids in sequences(30, 9)]
    in_use = rewards(kept.eval(), pad_rows(trees).batch())
    assert rewards(kept.train(), pad_rows(trees).batch()) == pytest.approx(in_use, abs=1e-5)


class Noise(torch.nn.Module):
    """Adds random numbers in training, and no setting says so."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.01 * torch.randn_like(hidden) if self.training else hidden


class BatchNorm(torch.nn.BatchNorm1d):
    """Looks at all tokens of a batch in training, and at none of them in use."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("layer", [Noise(), BatchNorm(32)], ids=["noise", "batch norm"])
def test_what_computes_otherwise_in_training_is_refused(layer: torch.nn.Module, tmp_path: Path) -> None:
    model = tiny_reward_model("llama")
    model.base_model.model.norm = torch.nn.Sequential(layer, model.base_model.model.norm)
    with pytest.raises(ConfigError, match=r"not even one sequence at a time: rewards differ from those in use \(by "):
        trusted(model, [], Use(cache_dir=str(tmp_path)))


def test_several_tokens_may_end_a_text(tmp_path: Path) -> None:
    """As in the configurations of Llama 3.1 and Gemma 3."""
    model = tiny_reward_model("llama")
    model.base_model.config.eos_token_id = [2, 3]
    assert trusted(model, [], Use(cache_dir=str(tmp_path))).note is None


def test_a_tower_for_pictures_is_no_part_of_the_text() -> None:
    """Its positions and its convolution have nothing to do with conversations."""
    base = tiny_reward_model("gemma3").base_model
    assert any(isinstance(module, torch.nn.Conv2d) for module in base.modules())
    assert check_max_length(base, 200) is None
    assert token_mixers(base) is None
    freeze(base, ModelConfig())
    frozen = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in base.named_parameters() if ".vision_tower." in name}
    assert read_shape(base.config)[1].windows == (9, None)


@pytest.mark.parametrize("name", LEAKING)
def test_a_state_that_runs_on_is_seen_in_the_gradients(name: str) -> None:
    """Without a look at the structure."""
    model = tiny_reward_model(name)
    leak = examine(model, layout="shared", training=False)
    assert not leak.ok
    assert "tokens of other sequences (gradient not zero)" in leak.reason
    assert token_mixers(model.base_model) is not None


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_positions_that_depend_on_the_batch_are_seen_in_the_rewards(name: str, layout: str) -> None:
    leak = examine(tiny_reward_model(name), layout=layout, training=False)
    assert not leak.ok
    assert "rewards change with what else is in the batch" in leak.reason


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_below_the_length_where_positions_change_rows_are_packed(name: str, tmp_path: Path) -> None:
    model = tiny_reward_model(name)
    assert positions_depend_on_batch(model.base_model, 48) is None
    trust = trusted(model, [], Use(longest=48, cache_dir=str(tmp_path)))
    assert form_of(trust) == "shared"
    assert form_of(trusted(model, [], Use(longest=49, cache_dir=str(tmp_path)))) == "one by one"


def test_earlier_batches_are_forgotten() -> None:
    """Dynamic frequencies of transformers stay those of the longest sequence so far."""
    model = tiny_reward_model("llama-dynamic").eval()
    model.use_kernel("padded")
    model.one_by_one = True
    long, middle = (pad_rows([grow([ids])]).batch() for ids in sequences(90, 60))
    expected = rewards(tiny_one_by_one(), middle)
    rewards(model, long)
    assert rewards(model, middle) == expected


def tiny_one_by_one() -> RewardModel:
    model = tiny_reward_model("llama-dynamic").eval()
    model.use_kernel("padded")
    model.one_by_one = True
    return model


def test_one_at_a_time_has_the_gradients_of_separate_passes() -> None:
    model = tiny_one_by_one()
    trees = [grow([ids]) for ids in sequences(70, 3, 50)]
    model(pad_rows(trees).batch()).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for tree in trees:
        model(pad_rows([tree]).batch()).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, atol=1e-5, rtol=1e-4)


class Summing(torch.nn.Module):
    """Adds a little of all earlier tokens of the row, whatever sequence they are of."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.scale * hidden.cumsum(1)


@pytest.mark.parametrize("scale", [1e-2, 1e-12])
def test_a_leak_far_below_rounding_is_found(scale: float, tmp_path: Path) -> None:
    model = tiny_reward_model("llama")
    norm = model.base_model.model.norm
    model.base_model.model.norm = torch.nn.Sequential(Summing(scale), norm)
    trust = trusted(model, [], Use(cache_dir=str(tmp_path)))
    assert "tokens of other sequences (gradient not zero)" in str(trust.note)
    assert trust.wrong
    assert model.kernel == "padded"


def test_a_token_that_is_not_looked_at_is_found() -> None:
    """A window that is one too short cuts off a token's only way to the reward."""
    model = tiny_reward_model("llama")

    def forget(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output if output.shape[1] < 100 else output * (torch.arange(output.shape[1]) != 41)[None, :, None]

    model.base_model.model.embed_tokens.register_forward_hook(forget)
    model.base_model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((forget(None, None, args[0]), *args[1:]), kwargs), with_kwargs=True
    )
    leak = examine(model, layout="shared", training=False)
    assert not leak.ok


def test_lines_without_padding_are_looked_at_too(tmp_path: Path) -> None:
    """transformers gives their layers no mask, and one that makes its own of the mask would see later tokens."""
    model = tiny_reward_model("llama")

    def see_all(_module: Any, args: Any, options: dict[str, Any]) -> Any:
        hidden = args[0]
        return (hidden if options["attention_mask"] is not None else hidden + 0.1 * hidden.mean(1, True),), options

    model.base_model.model.layers[0].register_forward_pre_hook(see_all, with_kwargs=True)
    leak = examine(model, layout="padded", training=False)
    assert not leak.ok
    assert "rewards change with what else is in the batch" in leak.reason
    with pytest.raises(ConfigError, match="cannot be computed exactly, not even one sequence at a time"):
        trusted(model, [], Use(layout="padded", cache_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "biogpt", "opt"])
def test_dropout_under_any_name_is_found_in_the_mode_that_is_used(name: str, tmp_path: Path) -> None:
    """Kept, attention dropout refuses packed rows before the first step; set to 0, they are exact."""
    kept = tiny_reward_model(name, dropout=True)
    if name != "opt":  # its default has dropout in the residual stream only
        trust = trusted(kept, [], Use(cache_dir=str(tmp_path)))
        assert "dropout" in str(trust.note)
        assert form_of(trust) == "padded"
    assert without_dropout(kept.base_model)
    assert without_dropout(kept.base_model) == []
    assert not any(m.p for m in kept.modules() if isinstance(m, torch.nn.Dropout))


def test_an_exception_leads_to_the_next_kernel_with_its_reason(tmp_path: Path) -> None:
    model = tiny_reward_model("llama")

    class InductorError(RuntimeError):
        """As a compiler's own."""

    def fail(*_args: Any) -> None:
        if model.kernel == "varlen":
            raise InductorError("no valid choices\nmany lines")

    model.base_model.model.layers[0].register_forward_pre_hook(fail)
    trust = trusted(model, [], Use(cache_dir=str(tmp_path)))
    assert (trust.layout, trust.kernel) == ("shared", "sdpa")
    assert trust.note == (
        "packed rows cannot be used for this model (varlen attention: InductorError: no valid choices); "
        "going on with sdpa attention in packed rows"
    )


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    model = tiny_reward_model("llama")
    with torch.no_grad():
        model.base_model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(
        ConfigError, match="cannot be computed exactly, not even one sequence at a time: rewards are not"
    ):
        trusted(model, [], Use(cache_dir=str(tmp_path)))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_reward_model("mistral").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trusted(model, [grow(sequences(20, 30))], Use(cache_dir=str(tmp_path)))
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.base_model.get_input_embeddings()._forward_hooks


def test_verdicts_are_kept_by_architecture_and_versions(tmp_path: Path) -> None:
    def kept() -> set[str]:
        return {path.name for path in (tmp_path / "leakage").glob("*.json")}

    trusted(tiny_reward_model("llama"), [], Use(cache_dir=str(tmp_path)))
    first = kept()
    assert len(first) == 1
    trusted(tiny_reward_model("llama"), [], Use(cache_dir=str(tmp_path)))
    assert kept() == first
    trusted(tiny_reward_model("mistral"), [], Use(cache_dir=str(tmp_path)))
    assert len(kept()) == 2
    changed = tiny_reward_model("llama")
    changed.base_model.model.norm = torch.nn.Sequential(Summing(1e-3), changed.base_model.model.norm)
    assert trusted(changed, [], Use(cache_dir=str(tmp_path))).wrong


def test_learned_positions_are_a_limit_and_rotary_ones_a_warning() -> None:
    learned, opt, rotary = (tiny_reward_model(name).base_model for name in ("gpt2", "opt", "llama"))
    for model in (learned, opt):
        assert check_max_length(model, 256) is None
        with pytest.raises(ConfigError, match=r"257 tokens.* knows 256 positions, and no more: .*--max-length 256"):
            check_max_length(model, 257)
        assert positions_problem(model.config, 257) == positions_problem(model.config, 257, model)
    assert check_max_length(rotary, 256) is None
    assert check_max_length(rotary, 257) == (
        "conversations may have 257 tokens, and the base model (llama) knows 256 positions: what is beyond them it has "
        "never seen; keep to them with --max-length 256"
    )
    assert positions_problem(rotary.config, 257) == (False, check_max_length(rotary, 257))
    assert positions_problem(MambaConfig(), 10_000_000) is None


@pytest.mark.parametrize("kind", ["granite", "cohere", "lfm2", "falcon_mamba"])
def test_architectures_without_a_head_class_are_named(kind: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert kind not in architectures()
    sizes = {key: value for key, value in SIZE.items() if key != "num_labels"}
    with pytest.raises(CheckpointError, match=rf"no sequence-classification model for its architecture \({kind}\)"):
        require_head_class(CONFIG_MAPPING[kind](**sizes), "some/model")


def test_architectures_with_a_head_class_pass() -> None:
    for name in ("llama", "gemma3_text", "phi3", "qwen3_next"):
        assert ARCHITECTURES[name].model_type in architectures()
        require_head_class(tiny_reward_model(name).base_model.config, "some/model")
