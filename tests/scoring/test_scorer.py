from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.scorer_samples import CONVERSATIONS, FAMILIES, PROMPT, RESPONSES, change_json, reference, reward_model, say

from btrm_core.errors import CheckpointError, ConfigError, DataError
from btrm_core.scoring.scorer import Scorer

EXACT = 1e-5


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: reward_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def scorer(models: dict[str, Path]) -> Scorer:
    return Scorer(str(models["llama3"]), device="cpu")


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model directory that a test may change."""
    return Path(shutil.copytree(models["llama3"], tmp_path / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_every_conversation_alone(models: dict[str, Path], family: str) -> None:
    expected = None
    for tokens_per_batch in (1, 150, 8192):
        scorer = Scorer(str(models[family]), device="cpu", tokens_per_batch=tokens_per_batch)
        assert scorer.model.kernel != "padded"
        if expected is None:
            expected = reference(models[family], scorer.chat, CONVERSATIONS)
            assert np.std(expected) > 0.05
        rewards = scorer.rewards(CONVERSATIONS)
        assert rewards.dtype == np.float32
        np.testing.assert_allclose(rewards, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("kernel", ["varlen", "padded"])
def test_pairs_and_groups_get_the_rewards_of_each_alone(scorer: Scorer, kernel: str) -> None:
    alone = [scorer.rewards([[*PROMPT, {"role": "assistant", "content": r}]])[0] for r in RESPONSES]
    other = scorer.rewards([CONVERSATIONS[0]])[0]
    try:
        scorer.model.use_kernel(kernel)
        groups = scorer.group_rewards([(PROMPT, RESPONSES), (CONVERSATIONS[0][:1], ["4"]), (PROMPT, RESPONSES[::-1])])
        pairs = scorer.pair_rewards([PROMPT, PROMPT], RESPONSES[:2], RESPONSES[2:])
    finally:
        scorer.model.use_kernel("varlen")
    np.testing.assert_allclose(groups[0], alone, atol=EXACT)
    np.testing.assert_allclose(groups[1], [other], atol=EXACT)
    np.testing.assert_allclose(groups[2], alone[::-1], atol=EXACT)
    assert pairs.shape == (2, 2)
    np.testing.assert_allclose(pairs, [[alone[0], alone[2]], [alone[1], alone[3]]], atol=EXACT)


def test_nothing_gives_nothing(scorer: Scorer) -> None:
    assert scorer.rewards([]).shape == (0,)
    assert scorer.pair_rewards([], [], []).shape == (0, 2)
    assert scorer.group_rewards([]) == []
    assert list(scorer.stream(iter([[], []]))) == [[], []]


def test_best_of_16_computes_the_prompt_once(tmp_path: Path) -> None:
    scorer = Scorer(str(reward_model(tmp_path / "model", max_length=1024)), device="cpu")
    ids = scorer.chat.tokenizer("word " * 500, add_special_tokens=False)["input_ids"]
    prompt = [{"role": "user", "content": scorer.chat.tokenizer.decode(ids[:500])}]
    responses = [f"{n} " + "and so on " * 14 for n in range(16)]
    lengths = [len(ids) for ids in scorer.chat.encode_group(prompt, responses).sequences]
    assert 540 <= min(lengths) <= max(lengths) <= 600
    together = scorer.group_rewards([(prompt, responses)])[0]
    assert scorer.tokens.useful == sum(lengths)
    assert scorer.tokens.computed * 4 < scorer.tokens.useful
    # conversations that happen to have one prompt profit as well
    before = scorer.tokens.computed
    listed = scorer.rewards([[*prompt, {"role": "assistant", "content": r}] for r in responses])
    assert (scorer.tokens.computed - before) * 4 < sum(lengths)
    alone = [scorer.rewards([[*prompt, {"role": "assistant", "content": r}]])[0] for r in responses]
    np.testing.assert_allclose(together, alone, atol=EXACT)
    np.testing.assert_allclose(listed, alone, atol=EXACT)


def test_a_group_larger_than_the_budget_is_split(models: dict[str, Path], scorer: Scorer) -> None:
    small = Scorer(str(models["llama3"]), device="cpu", tokens_per_batch=80)
    responses = [f"{number} is a number." for number in range(20)]
    np.testing.assert_allclose(
        small.group_rewards([(PROMPT, responses)])[0], scorer.group_rewards([(PROMPT, responses)])[0], atol=EXACT
    )


def test_over_long_conversations_are_cut_as_in_training(scorer: Scorer) -> None:
    long = [*say("Once upon a time. " * 60, "Go on."), {"role": "user", "content": "And then?"}]
    cut, whole = scorer.score([(long, ["The end.", "They lived on."]), (long[-1:], ["The end.", "They lived on."])])
    assert cut.truncated
    assert not whole.truncated
    assert cut.errors == (None, None)
    np.testing.assert_allclose(cut.rewards, whole.rewards, atol=EXACT)


def test_a_response_that_cannot_fit_costs_the_others_nothing(scorer: Scorer) -> None:
    endless = "word " * 400
    (result,) = scorer.score([(PROMPT, ["Paris.", endless, "Lyon."])])
    assert result.errors == (None, "answer longer than max_length 256", None)
    assert result.rewards[1] is None
    kept = [result.rewards[0], result.rewards[2]]
    np.testing.assert_allclose(kept, scorer.group_rewards([(PROMPT, ["Paris.", "Lyon."])])[0], atol=EXACT)
    with pytest.raises(DataError, match=r"^group 1 of 1, response 2: answer longer than max_length 256$"):
        scorer.group_rewards([(PROMPT, ["Paris.", endless])])
    with pytest.raises(DataError, match=r"^conversation 2 of 2: answer longer than max_length 256$"):
        scorer.rewards([CONVERSATIONS[0], say("Hm?", endless)])


def test_what_the_template_refuses_is_an_error_of_that_group_alone(scorer: Scorer) -> None:
    wrong = [{"role": "narrator", "content": "It was night."}]
    good, bad = scorer.score([(PROMPT, RESPONSES), (wrong, ["Yes."])])
    assert good.errors == (None,) * 4
    assert bad.rewards == (None,)
    assert "narrator" in str(bad.errors[0])


def test_wrong_arguments_are_named(scorer: Scorer, models: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"^conversation 1: expected a list of messages that ends with the assistant's"):
        scorer.rewards([PROMPT])
    with pytest.raises(DataError, match="1 prompts, 2 chosen and 1 rejected do not make pairs"):
        scorer.pair_rewards([PROMPT], ["a", "b"], ["c"])
    with pytest.raises(ConfigError, match=r"dtype 'pf32' is unknown; .* Did you mean 'fp32'\?"):
        Scorer(str(models["llama3"]), dtype="pf32")
    with pytest.raises(ConfigError, match="tokens_per_batch is 0"):
        Scorer(str(models["llama3"]), tokens_per_batch=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (say("Hi", "Ho"), r"conversation 1 is .*one conversation alone stands in a list, too"),
        (["Hi"], "conversation 1 is 'Hi', expected a list of messages"),
        (
            [say("Hi", "Ho"), [{"role": "user"}, say("", "Ho")[1]]],
            r"conversation 2: missing key 'content' in 'messages",
        ),
        ([[say("Hi", "")[0], {"role": "assistant"}]], r"conversation 1: missing key 'content' in 'messages\[1\]'"),
        ([[say("Hi", "")[0], {"role": "assistant", "content": None}]], r"messages\[1\].content' is None"),
    ],
)
def test_what_is_no_list_of_conversations_is_named(scorer: Scorer, arguments: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        scorer.rewards(arguments)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([(PROMPT, "Paris")], "group 1: the responses are 'Paris', expected a list of texts"),
        (
            [(PROMPT, ["a"]), {"prompt": PROMPT, "responses": ["a"]}],
            "group 2 is .*, expected a prompt and a list",
        ),
        ([PROMPT], "group 1 is .*, expected a prompt"),
        ([([{"role": "user", "said": "Hi"}], ["a"])], r"group 1: missing key 'content' in 'prompt\[0\]'"),
        ([(PROMPT, [{"role": "assistant", "content": "a"}])], "group 1 of 1: a message is not text"),
    ],
)
def test_what_is_no_prompt_with_responses_is_named(scorer: Scorer, groups: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        scorer.group_rewards(groups)


def test_messages_may_have_any_form_that_rows_of_training_may_have(scorer: Scorer) -> None:
    expected = scorer.rewards([say("Hi", "Ho")])[0]
    parts = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("user", "Hi"), ("assistant", "Ho"))]
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    more = [{**message, "name": None, "tool_calls": None} for message in say("Hi", "Ho")]
    np.testing.assert_allclose(scorer.rewards([parts, share, more]), [expected] * 3, atol=1e-5)
    np.testing.assert_allclose(scorer.group_rewards([("Hi", ["Ho"])])[0], [expected], atol=1e-5)
    np.testing.assert_allclose(scorer.pair_rewards(["Hi"], ["Ho"], ["Ho"]), [[expected] * 2], atol=1e-5)


def test_a_device_that_is_not_there_and_columns_that_are_texts(scorer: Scorer, models: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="chosen is the text 'abc'; expected a list"):
        scorer.pair_rewards([PROMPT] * 3, "abc", "def")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=rf"device '{device}' cannot be used: .*; leave it out"):
            Scorer(str(models["llama3"]), device=device)


def test_dtype_auto_on_a_cpu_is_fp32_and_bf16_is_bf16(models: dict[str, Path], scorer: Scorer, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    change_json(copy / "config.json", dtype="bfloat16")
    assert Scorer(str(copy), device="cpu").model.hf.dtype == torch.float32
    half = Scorer(str(copy), dtype="bf16", device="cpu")
    assert half.model.hf.dtype == torch.bfloat16
    np.testing.assert_allclose(half.rewards(CONVERSATIONS), scorer.rewards(CONVERSATIONS), atol=0.1)


def test_the_self_test_notices_other_weights(scorer: Scorer, copy: Path) -> None:
    assert scorer.self_test() < EXACT
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] + 0.1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert Scorer(str(copy), device="cpu").self_test() > 0.01
    change_json(copy / "btrm.json", self_test=[])
    with pytest.raises(CheckpointError, match="holds no self-test vectors"):
        Scorer(str(copy), device="cpu").self_test()


def test_a_reward_that_is_not_finite_is_an_error(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    broken = Scorer(str(copy), device="cpu")
    assert np.isnan(broken.self_test())
    (result,) = broken.score([(PROMPT, ["Paris."])])
    assert result.rewards == (None,)
    assert result.errors == ("the model's reward is nan, not a finite number",)


def test_a_run_directory_and_a_model_of_another_trainer_will_do(scorer: Scorer, copy: Path, tmp_path: Path) -> None:
    (copy / "btrm.json").unlink()
    change_json(copy / "tokenizer_config.json", model_max_length=None)
    other = Scorer(str(tmp_path), device="cpu")  # tmp_path/model is the model
    assert other.directory == copy
    assert other.max_length == 1024  # what its positions allow
    change_json(copy / "tokenizer_config.json", model_max_length=128)
    assert Scorer(str(copy), device="cpu").max_length == 128
    np.testing.assert_allclose(other.rewards(CONVERSATIONS), scorer.rewards(CONVERSATIONS), atol=EXACT)


def test_padded_batches_where_packing_is_not_understood(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-OSS has attention sinks, which packed rows do not know."""
    from transformers import AutoModelForSequenceClassification, GptOssConfig

    source = reward_model(tmp_path / "llama")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GptOssConfig(
        vocab_size=2048, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, **sizes
    )
    reward = {"id2label": {0: "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
    own = Scorer(str(source), device="cpu")
    config.update({**reward, "pad_token_id": own.chat.pad_id})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(source)
    change_json(source / "btrm.json", self_test=[])
    with caplog.at_level(logging.WARNING, "btrm"):
        scorer = Scorer(str(source), device="cpu", tokens_per_batch=150)
    assert scorer.model.kernel == "padded"
    assert "packed rows cannot be used for this model" in caplog.text
    assert "s_aux" in caplog.text
    expected = reference(source, scorer.chat, CONVERSATIONS)
    np.testing.assert_allclose(scorer.rewards(CONVERSATIONS), expected, atol=EXACT)


def test_the_identity_follows_what_changes_rewards(scorer: Scorer, copy: Path) -> None:
    same = Scorer(str(copy), device="cpu", tokens_per_batch=100)
    assert same.identity == scorer.identity
    assert Scorer(str(copy), device="cpu", dtype="bf16").identity != scorer.identity
    change_json(copy / "btrm.json", max_length=128)
    assert Scorer(str(copy), device="cpu").identity != scorer.identity


def test_values_of_numpy_and_pandas_are_scored_alike(scorer: Scorer) -> None:
    import pandas as pd

    prompts = [PROMPT, say("Is ice cold?", "Yes")[:1]]
    frame = pd.DataFrame(
        {"prompt": [np.array(p, dtype=object) for p in prompts], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    )
    expected = scorer.pair_rewards(prompts, ["a", "b"], ["c", "d"])
    found = scorer.pair_rewards(frame["prompt"], frame["chosen"], frame["rejected"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    whole = [np.array([*p, {"role": "assistant", "content": "a"}], dtype=object) for p in prompts[:1]]
    np.testing.assert_allclose(scorer.rewards(whole), expected[:1, 0], atol=1e-5)
