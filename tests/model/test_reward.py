from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import tiny_reward_model
from support.tiny_models import CONFIGS, SIZE, awkward_groups, group, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from btrm_core.errors import ConfigError
from btrm_core.model.base import freeze
from btrm_core.model.reward import RewardHead, RewardModel, choose_for
from btrm_core.model.selfcheck import self_check
from btrm_core.packing.forms import PADDED, collate
from btrm_core.packing.rows import pack_row, pad_rows
from btrm_core.packing.trees import grow
from btrm_core.settings import ModelConfig


def rewards(model: RewardModel, kernel: str = "varlen") -> torch.Tensor:
    with torch.no_grad():
        return model(collate(awkward_groups(), kernel=kernel))


# --- head ----------------------------------------------------------------------------------------


def test_the_head_takes_over_the_weight_under_its_name() -> None:
    hf = tiny_model("llama3")
    weight, names = hf.score.weight, [name for name, _ in hf.named_parameters()]
    model = RewardModel(hf)
    assert isinstance(hf.score, RewardHead)
    assert hf.score.weight is weight
    assert [name for name, _ in hf.named_parameters()] == names
    assert RewardModel(hf).hf.score is model.hf.score, "a head is replaced once"


def test_the_head_computes_in_float32() -> None:
    linear = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = hidden.float() @ linear.weight.float().T
    head = RewardHead(linear)
    assert torch.equal(head(hidden), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden), expected)
    assert head(hidden.double()).dtype == torch.float64


def test_a_half_precision_model_gives_float32_rewards_and_half_gradients() -> None:
    model = RewardModel(tiny_model("llama3", torch.bfloat16), "varlen")
    found = model(collate(awkward_groups(), kernel="varlen"))
    assert found.dtype == torch.float32
    found.sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


def test_only_reward_positions_meet_the_head() -> None:
    model = RewardModel(tiny_model("llama3"), "varlen")
    seen = []
    model.hf.score.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    assert rewards(model).shape == (19,)
    assert seen == [(19, 32)]


@pytest.mark.parametrize("changes", [{"num_labels": 2}, {}])
def test_a_model_without_a_reward_head_is_refused(changes: dict[str, int]) -> None:
    hf = tiny_model("llama3", **changes) if changes else LlamaForCausalLM(LlamaConfig(**SIZE))
    with pytest.raises(ConfigError) as error:
        RewardModel(hf)
    assert str(error.value) == (
        f"{type(hf).__name__} has no head 'score' with one label; expected a sequence-classification model loaded with "
        "num_labels=1"
    )


# --- rows and batches ----------------------------------------------------------------------------


def test_a_row_without_pairs_gives_no_rewards_and_zero_gradients() -> None:
    model = RewardModel(tiny_model("llama3"), "varlen")
    for batch in (pack_row([], multiple_of=8).batch(), pad_rows([]).batch()):
        model.zero_grad()
        found = model(batch)
        assert found.shape == (0,)
        found.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_padding_does_not_change_rewards() -> None:
    model = RewardModel(tiny_model("mistral"), "varlen")
    with torch.no_grad():
        short, long = (model(collate(awkward_groups(), kernel="varlen", multiple_of=m)) for m in (1, 128))
    assert torch.allclose(short, long, atol=1e-5)


def test_a_reward_does_not_depend_on_its_neighbours() -> None:
    model = RewardModel(tiny_model("qwen3"), "varlen")
    groups = awkward_groups()
    with torch.no_grad():
        together = model(collate(groups, kernel="varlen"))
        apart = torch.cat([model(collate([g], kernel="varlen")) for g in groups])
    assert torch.allclose(together, apart, atol=1e-5)


def test_a_single_sequence_is_an_ordinary_row_for_any_kernel() -> None:
    row = pack_row([grow([[5, 6, 7, 8]])]).batch()
    with torch.no_grad():
        found = [RewardModel(tiny_model("llama3"), kernel)(row).item() for kernel in ("varlen", "eager", PADDED)]
    assert found[0] == pytest.approx(found[2], abs=1e-5)
    assert found[1] == pytest.approx(found[2], abs=1e-5)
    with pytest.raises(ValueError, match="kernel 'padded' takes padded lines, not a packed row of several sequences"):
        RewardModel(tiny_model("llama3"), PADDED)(collate(awkward_groups(), kernel="varlen"))


def test_kernels_can_be_switched_between_steps() -> None:
    model = RewardModel(tiny_model("llama3"), "varlen")
    first = rewards(model)
    model.use_kernel(PADDED)
    assert model.hf.config._attn_implementation == "sdpa"
    assert torch.allclose(rewards(model, PADDED), first, atol=1e-5)
    model.use_kernel("eager")
    assert torch.allclose(rewards(model, "eager"), first, atol=1e-5)
    with model.own_attention():
        assert model.hf.config._attn_implementation == "eager"
    assert model.kernel == "eager"
    assert model.hf.config._attn_implementation == "btrm_eager"


def test_softcapped_models_never_run_padded_through_fused_attention() -> None:
    assert RewardModel(tiny_model("gemma2"), PADDED).hf.config._attn_implementation == "eager"
    with pytest.raises(NotImplementedError, match="kernel 'varlen' cannot compute this model's attention soft-capping"):
        rewards(RewardModel(tiny_model("gemma2"), "varlen"))


def test_rewards_depend_on_positions_not_on_ids() -> None:
    """A sequence that ends in the pad token is scored at its end; transformers would look further left."""
    hf = tiny_model("llama3")
    ids = [5, 6, 7, 0]
    with torch.no_grad():
        expected = hf.score(hf.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()
        model = RewardModel(hf, "varlen")
        assert model(collate([grow([ids, [5, 9]])], kernel="varlen", pad_id=0))[0].item() == pytest.approx(
            expected, abs=1e-5
        )
        assert model(collate([grow([ids, [5, 9]])], kernel=PADDED, pad_id=0))[0].item() == pytest.approx(
            expected, abs=1e-5
        )


# --- an ordinary model remains -------------------------------------------------------------------


def test_the_model_saves_and_loads_as_without_btrm(tmp_path: Path) -> None:
    model = RewardModel(tiny_model("llama3"), "varlen")
    expected = rewards(model)
    model.hf.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "btrm" not in text
    assert "attn_implementation" not in json.loads(text)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again.score) is nn.Linear
    assert torch.allclose(rewards(RewardModel(again, "varlen")), expected)


def test_distributed_data_parallel_and_copies() -> None:
    model = RewardModel(tiny_model("llama3"), "varlen")
    twin = copy.deepcopy(model)
    assert torch.equal(rewards(twin), rewards(model))
    alone = not torch.distributed.is_initialized()  # a training run in this process has a group of one
    if alone:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(collate(awkward_groups(), kernel="varlen")).sum().backward()
    finally:
        if alone:
            torch.distributed.destroy_process_group()
    twin(collate(awkward_groups(), kernel="varlen")).sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad)


@pytest.mark.parametrize("head_first", [False, True])
def test_peft_models(head_first: bool) -> None:
    peft = pytest.importorskip("peft")
    hf = tiny_model("llama3")
    plain = rewards(RewardModel(copy.deepcopy(hf), "varlen"))
    if head_first:
        RewardModel(hf, "varlen")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["score"], lora_dropout=0.0
    )
    model = RewardModel(peft.get_peft_model(hf, config), "varlen")
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    assert heads
    assert all(isinstance(head, RewardHead) for head in heads)
    assert torch.allclose(rewards(model), plain, atol=1e-5)
    model(collate(awkward_groups(), kernel="varlen")).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("score.modules_to_save.default.weight") for name in trained)
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    assert self_check(model, awkward_groups()).ok


# --- kernel choice and self-check ----------------------------------------------------------------


def test_the_kernel_for_a_model() -> None:
    assert choose_for(tiny_model("llama3"), "auto", "cpu") == "varlen"
    assert choose_for(tiny_model("gemma2"), "auto", "cpu", ("flex", "eager")) == "eager"
    assert choose_for(tiny_model("llama3"), "sdpa", "cpu") == "sdpa"
    with pytest.raises(ConfigError, match="would silently drop this model's attention soft-capping"):
        choose_for(tiny_model("gemma2"), "sdpa", "cpu")


def test_a_model_that_cannot_change_its_attention_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_model("llama3")
    monkeypatch.setattr(type(hf), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert choose_for(hf, "auto", "cpu") == PADDED
    with pytest.raises(ConfigError, match="cannot change its attention to 'btrm_varlen'"):
        RewardModel(hf, "varlen")


@pytest.mark.parametrize("name", CONFIGS)
def test_self_check_passes(name: str) -> None:
    model = RewardModel(tiny_model(name), "eager" if name == "gemma2" else "varlen").train()
    check = self_check(model, awkward_groups())
    assert check.ok
    assert check.difference < 1e-5
    assert check.reason.startswith("packed rewards of 3 groups equal separate ones (difference ")
    assert model.training
    assert model.kernel != PADDED


def test_self_check_notices_a_difference() -> None:
    class Skewed(RewardModel):
        def hidden(self, batch: Any) -> torch.Tensor:
            hidden = super().hidden(batch)
            return hidden * 1.1 if batch.visibility is not None else hidden

    check = self_check(Skewed(tiny_model("llama3"), "varlen"), awkward_groups())
    assert not check.ok
    assert check.difference > 1e-2
    assert "differ from separate ones" in check.reason


def test_self_check_notices_nan() -> None:
    model = RewardModel(tiny_model("llama3"), "varlen")
    with torch.no_grad():
        model.hf.score.weight.fill_(float("nan"))
    assert not self_check(model, awkward_groups()).ok


def test_self_check_tells_why_a_model_cannot_be_packed() -> None:
    model = RewardModel(tiny_model("llama3", is_causal=False), "varlen")
    check = self_check(model, awkward_groups())
    assert not check.ok
    assert check.reason == ("the model cannot be packed: only causal and sliding-window attention can be packed")
    model.use_kernel(PADDED)
    assert rewards(model, PADDED).isfinite().all()
    assert self_check(model, awkward_groups()).reason == ("the model's own attention is in use, which cannot pack")


def test_attention_dropout_cannot_be_packed_in_training() -> None:
    model = RewardModel(tiny_model("llama3", attention_dropout=0.5), "varlen").train()
    with pytest.raises(NotImplementedError, match="set attention_dropout to 0"):
        model(collate([group(3, 2, 2)], kernel="varlen"))
    check = self_check(model, awkward_groups())
    assert not check.ok
    assert check.reason == "the model cannot be packed: its config asks for attention dropout (0.5)"


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gemma3"])
def test_the_last_layers_are_found_whatever_their_list_is_called(name: str) -> None:
    base = tiny_reward_model(name).base_model
    with pytest.raises(ConfigError, match=r"model.train_last_layers = 3: the model has 2 layers"):
        freeze(base, ModelConfig(train_last_layers=3))
    freeze(base, ModelConfig(train_last_layers=1))
    trained = {key for key, parameter in base.named_parameters() if parameter.requires_grad}
    assert any(".1." in key for key in trained)
    assert not any(".0." in key or "wpe" in key or "embed_" in key for key in trained)
    assert "score.weight" in trained
