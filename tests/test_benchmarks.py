"""The benchmark's own machinery: the form of results, the table, and that peers get what they are said to get."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import environment, harness, quality_vs_trl, results, serve_load, table
from benchmarks.gate import Gate
from benchmarks.harness import ArmRun
from benchmarks.quality_arms import TRL_BATCH, Experiment, btrm_command, freeze, trl_arguments
from benchmarks.workload import (
    Settings,
    Workload,
    by_prompt,
    common_prefix,
    plan_steps,
    store_of,
    taken_of,
    token_counts,
    tree_entries,
)
from btrm_core.model import causal_entries
from btrm_core.packing import grow

PAIRS = [([5, 6, 7, 8, 9], [5, 6, 7, 3]), ([5, 6, 4], [5, 6, 4, 4, 4, 4, 2]), ([9, 9], [9, 8]), ([7, 3], [7, 2, 1])]
PAD = 0


@pytest.fixture
def work(tmp_path: Path) -> Workload:
    pairs = [tuple(np.array(ids, dtype=np.int32) for ids in pair) for pair in PAIRS]
    settings = Settings(
        model="tiny", data=("pairs.jsonl",), pairs_per_step=2, micro_batch=2, steps=2, passes=2, threads=1
    )
    made = Workload(settings, tmp_path, pairs, [1, 1, 1, 1], [[0, 1], [2, 3], [3, 0], [1, 2], [1, 0], [3, 2]], PAD)
    made.facts = {
        "layers": 1,
        "parameters": {"backbone": 10, "backbone_without_embeddings": 6},
        "measured": token_counts(pairs, 2),
        "flops_minimal": 1e6,
    }
    return made


def runs_of(seconds: dict[str, float]) -> dict[str, ArmRun]:
    def run(each: float) -> ArmRun:
        steps = [{"wall": each, "cpu": 2 * each, "tokens": 40}, {"wall": 2 * each, "cpu": 4 * each, "tokens": 20}]
        return ArmRun(passes=[steps, steps], peak_memory=2**30, base_memory=2**29, losses={"1": 0.7}, load=[0.1])

    return {name: run(each) for name, each in seconds.items()}


def result_of(work: Workload, **seconds: float) -> dict[str, Any]:
    names = {name.replace("_", "-"): value for name, value in seconds.items()}
    out = results.header("train_throughput", "tiny-run", work.settings, {"commit": "a" * 40, "dirty": False})
    out.update(results.summarise(work, runs_of(names)))
    return out


def test_tokens_are_counted_for_each_layout(work: Workload) -> None:
    assert [common_prefix(pair) for pair in work.pairs] == [3, 3, 1, 1]
    assert token_counts(work.pairs, 2) == {
        "pairs": 4,
        "conversations": 28,
        "minimal": 20,
        "trie": 20,
        "prompts": 4,
        "padded": 2 * 2 * 7 + 2 * 2 * 3,
        "longest": 7,
    }


def test_the_pairs_of_a_prompt_share_their_trie(work: Workload) -> None:
    counts = token_counts(work.pairs, 2, [2, 2])
    assert (counts["prompts"], counts["trie"], counts["minimal"]) == (2, 11 + 7, 20)
    groups = by_prompt(range(4), ["a", "b", "a", "b"], 0)
    assert sorted(map(tuple, groups)) == [(0, 2), (1, 3)]
    assert [len(group) for group in taken_of(groups, 3)] == [2, 1]
    store = store_of(work.pairs, [2, 2])
    assert [store.pair(i).sequences[1].tolist() for i in range(4)] == [rejected.tolist() for _, rejected in work.pairs]


def test_tree_entries_are_those_of_the_mask() -> None:
    full = tree_entries(grow([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8, 9]]))
    assert full == causal_entries(5) + causal_entries(7) - causal_entries(3)
    brute = sum(1 for q in range(9) for k in range(q + 1) if q - k < 4)
    assert causal_entries(9, window=4) == brute


def test_a_workload_survives_saving(work: Workload) -> None:
    work.save()
    again = Workload.load(work.directory)
    assert again.settings == work.settings
    assert again.steps == work.steps
    assert all((a == b).all() for p, q in zip(work.pairs, again.pairs, strict=True) for a, b in zip(p, q, strict=True))


def test_ratios_are_taken_pass_by_pass(work: Workload) -> None:
    made = result_of(work, trl=4.0, btrm_shared=1.0, backbone=0.8)
    assert made["comparisons"]["speedup"]["btrm-shared"]["wall"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert made["comparisons"]["overhead"]["backbone"]["cpu"]["median"] == pytest.approx(25.0)
    assert made["comparisons"]["loss_difference"] == {"btrm-shared": 0.0}
    assert made["arms"]["trl"]["pairs_per_second"]["median"] == pytest.approx(4 / 12)
    assert made["arms"]["trl"]["padding_percent"] == pytest.approx(100 * (1 - 28 / 60))
    assert made["arms"]["btrm-shared"]["computed_per_trie_token"] == pytest.approx(60 / 20)


def test_results_are_checked_and_read_back(work: Workload, tmp_path: Path) -> None:
    made = result_of(work, trl=2.0, btrm_shared=1.0)
    path = results.write(made, tmp_path / "results")
    assert json.loads(path.read_text()) == made
    (tmp_path / "results" / "other.json").write_text('{"benchmark": "something else"}')
    assert [found["name"] for found in results.load_all(tmp_path / "results")] == ["tiny-run"]
    del made["arms"]["trl"]["wall"]
    with pytest.raises(ValueError, match="tiny-run: arm trl: 'wall' is missing"):
        results.check(made)


def test_the_table_says_what_was_measured(work: Workload) -> None:
    text = table.render([result_of(work, trl=2.0, btrm_shared=0.5)])
    assert "| trl | 0.667 |" in text
    assert "| btrm-shared | 2.667 |" in text
    assert "4.00" in text
    assert "commit aaaaaaaaaa" in text
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.put(readme, "new") == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the markers"):
        table.put("nothing", "new")


def test_the_readme_shows_the_recorded_results() -> None:
    assert table.main(["--check"]) == 0


def test_no_result_is_written_for_uncommitted_code(tmp_path: Path) -> None:
    with pytest.raises(environment.DirtyTreeError, match="not a git checkout"):
        environment.require_clean(False, tmp_path)
    assert environment.require_clean(True, tmp_path) == {"commit": None, "dirty": True}
    assert environment.require_clean(False, tmp_path, vouched="a" * 40) == {"commit": "a" * 40, "dirty": False}


def test_arms_take_turns() -> None:
    assert [harness.rotated(["a", "b", "c"], i) for i in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_one_arm_after_another_has_the_device(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one waits with its imports done; one that ends early is named, and the others are measured."""
    told: list[str] = []

    class Worker:
        base_memory = 5

        def __init__(self, work: Workload, arm: str, first: int, last: int) -> None:
            self.arm = arm
            told.append(f"{arm} starts")

        def load(self) -> Worker:
            told.append(f"{self.arm} loads")
            if self.arm == "b":
                raise harness.ArmError("arm b ended with code 1:\nno room")
            return self

        def run(self, steps: int) -> dict[str, Any]:
            return {"steps": [{"wall": 1.0, "cpu": 1.0, "tokens": 1}] * steps, "peak_memory": 9, "graphs": 2}

        def stop(self) -> dict[str, Any]:
            return {"losses": {"1": 0.5}}

        def kill(self) -> None:
            told.append(f"{self.arm} is gone")

    monkeypatch.setattr(harness, "Worker", Worker)
    runs = harness.measure(work, ["a", "b", "c"], schedule="whole", block=1, say=told.append)
    assert [runs[arm].failed for arm in "abc"] == ["", "no room", ""]
    assert [len(steps) for steps in runs["c"].passes] == [work.settings.steps] * work.settings.passes
    assert (runs["a"].base_memory, runs["a"].peak_memory, set(runs["a"].graphs)) == (5, 9, {2})
    assert told.index("b starts") < told.index("a is gone") < told.index("b loads") < told.index("c loads")
    assert all(f"{arm} is gone" in told for arm in "abc")


def test_the_gate_stops_after_the_steps_it_was_told(tmp_path: Path) -> None:
    commands, answers = tmp_path / "in", tmp_path / "out"
    commands.write_text('{"run": 2}\n{"stop": true}\n')
    with commands.open() as reader, answers.open("w") as writer:
        gate = Gate(reader, writer, "cpu")
        assert gate.open()
        gate.tokens += 7
        assert gate.step_done()
        assert not gate.step_done()
        gate.close()
    ready, block, last = map(json.loads, answers.read_text().splitlines())
    assert ready["ready"]
    assert [step["tokens"] for step in block["steps"]] == [7, 0]
    assert block["peak_memory"] >= ready["base_memory"] > 0
    assert last == {"losses": {}}


@pytest.fixture
def clean_state() -> Iterator[None]:
    """Trainers leave accelerate's process-wide state behind, in which DeepSpeed of later tests would not start."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def _tiny_model(work: Workload) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<unk>": 1, **{str(i): i for i in range(2, 12)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="2"
    )
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=12, num_labels=1, pad_token_id=PAD, **shape)
    LlamaForSequenceClassification(config).save_pretrained(work.model_dir)
    tokenizer.save_pretrained(work.model_dir)
    work.save()


def _first_loss(work: Workload, run: Any, tmp_path: Path) -> tuple[float, list[int]]:
    lines = _answers(work, run, tmp_path)
    return lines[-1]["losses"]["1"], [step["tokens"] for step in lines[1]["steps"]]


def _answers(work: Workload, run: Any, tmp_path: Path) -> list[dict[str, Any]]:
    commands, answers = tmp_path / "in", tmp_path / "out"
    commands.write_text('{"run": 2}\n{"stop": true}\n')
    with commands.open() as reader, answers.open("w") as writer:
        gate = Gate(reader, writer, "cpu")
        run(work, gate, range(0, 2))
        gate.close()
    return list(map(json.loads, answers.read_text().splitlines()))


def _expected_loss(work: Workload) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(work.model_dir, dtype=torch.float32).eval()
    losses = []
    for i in work.steps[0]:
        r = [model(input_ids=torch.tensor(ids.astype(np.int64))[None]).logits[0, 0].double() for ids in work.pairs[i]]
        losses.append(-torch.nn.functional.logsigmoid(r[0] - r[1]).item())
    return float(np.mean(losses))


def test_trl_trains_on_the_same_pairs_in_its_own_batches(work: Workload, tmp_path: Path, clean_state: None) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'btrm[bench]'")
    from benchmarks.arms import run_trl

    _tiny_model(work)
    loss, tokens = _first_loss(work, run_trl, tmp_path)
    assert loss == pytest.approx(_expected_loss(work), abs=1e-5)
    assert tokens == [4 * 7, 4 * 3]


def test_the_seed_recipe_pads_each_pair_by_itself(work: Workload, tmp_path: Path, clean_state: None) -> None:
    from benchmarks.arms import run_seed

    _tiny_model(work)
    loss, tokens = _first_loss(work, run_seed, tmp_path)
    assert loss == pytest.approx(_expected_loss(work), abs=1e-5)
    assert tokens == [2 * 5 + 2 * 7, 2 * 2 + 2 * 3]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded", "selective"])
def test_btrm_trains_on_the_same_pairs(work: Workload, tmp_path: Path, layout: str, clean_state: None) -> None:
    from benchmarks.btrm_arms import OURS

    work.steps = plan_steps(work.settings, work.pairs, work.prompts)
    _tiny_model(work)
    loss, tokens = _first_loss(work, OURS[f"btrm-{layout}"], tmp_path)
    assert loss == pytest.approx(_expected_loss(work), abs=1e-5)
    key = {"packed": "conversations", "padded": "padded"}.get(layout, "minimal")
    assert tokens == [token_counts([work.pairs[i] for i in step], 2)[key] for step in work.steps[:2]]


def test_the_ceiling_computes_the_rows_of_btrm_shared(work: Workload, tmp_path: Path) -> None:
    from benchmarks.btrm_arms import OURS

    work.steps = plan_steps(work.settings, work.pairs, work.prompts)
    _tiny_model(work)
    for arm in ("backbone", "backbone-causal"):
        tokens = _answers(work, OURS[arm], tmp_path)[1]["steps"]
        wanted = [token_counts([work.pairs[i] for i in step], 1)["minimal"] for step in work.steps[:2]]
        assert [step["tokens"] for step in tokens] == wanted


def test_scoring_arms_give_the_same_rewards_and_a_table(work: Workload) -> None:
    from benchmarks import score_best_of_n as scoring

    _tiny_model(work)
    words = ["--name", "tiny", "--model", str(work.model_dir), "--responses", "5", "--prompt-tokens", "9"]
    arguments = scoring.parser().parse_args([*words, "--response-tokens", "3", "--repeats", "1", "--threads", "1"])
    sequences, _ = scoring.random_sequences(arguments)
    arms, layers = scoring.build_arms(arguments, sequences)
    runs, rewards = scoring.measure(arms, arguments.repeats, "cpu")
    assert all(np.abs(rewards[name] - rewards["alone"]).max() < 1e-5 for name in arms)
    made = scoring.summarise(arguments, {"commit": "b" * 40, "dirty": True}, runs, rewards, layers)
    results.check(made)
    assert made["arms"]["shared"]["tokens_computed"] == 9 + 5 * 3
    assert made["arms"]["alone"]["tokens_computed"] == 5 * (9 + 3)
    text = table.render([made])
    assert "**with uncommitted changes**" in text
    assert "one prompt of 9 tokens, 5 responses of 3" in text


def test_scoring_a_window_gives_the_rewards_of_padded_batches(work: Workload) -> None:
    from benchmarks import score_throughput as scoring
    from benchmarks.score_best_of_n import measure

    work.prompts = [2, 2]
    _tiny_model(work)
    work.facts["measured"] = token_counts(work.pairs, 2, work.prompts)
    arms, tokens = scoring.build_arms(work, ["btrm", "btrm-pairs", "sorted", "in-order"])
    runs, rewards = measure(arms, 1, "cpu")
    made = results.header("score_throughput", "tiny", work.settings, {"commit": "b" * 40, "dirty": True})
    made.update(scoring.summarise(work, runs, rewards, tokens))
    results.check(made)
    assert made["largest_difference"] < 1e-5
    assert np.std(rewards["btrm"]) > 0
    assert (tokens["btrm"], tokens["btrm-pairs"], tokens["in-order"]) == (18, 20, token_counts(work.pairs, 2)["padded"])
    assert made["arms"]["btrm"]["computed_per_trie_token"] == 1.0
    assert "| btrm |" in table.render([made])


def experiment_in(directory: Path, **values: Any) -> Experiment:
    chosen = {"model": "m", "train": ("t.jsonl",), "pairs": 32, "pairs_per_step": 16, "seeds": (0, 1), **values}
    return Experiment(**chosen, directory=str(directory))


def test_both_arms_are_told_the_same_experiment(tmp_path: Path) -> None:
    experiment = experiment_in(tmp_path, train_last_layers=2, precision="bf16", weight_decay=0.01)
    assert Experiment.load(experiment.save()) == experiment
    command, theirs = btrm_command(experiment, 1), trl_arguments(experiment, 1)
    flags = dict(zip(command[4::2], command[5::2], strict=True))
    settings = dict(word.split("=", 1) for word in command if "=" in word)
    assert float(flags["--learning-rate"]) == theirs["learning_rate"]
    assert int(flags["--pairs-per-step"]) == TRL_BATCH * theirs["gradient_accumulation_steps"] == 16
    assert int(flags["--max-length"]) == theirs["max_length"]
    assert (flags["--dtype"], theirs["bf16"], flags["--seed"], theirs["seed"]) == ("bf16", True, "1", 1)
    assert int(settings["train.max_steps"]) == theirs["max_steps"] == experiment.steps == 2
    assert float(settings["train.warmup_ratio"]) == theirs["warmup_steps"]
    assert float(settings["train.weight_decay"]) == theirs["weight_decay"]
    assert float(settings["train.max_grad_norm"]) == theirs["max_grad_norm"]
    assert (settings["model.train_last_layers"], settings["data.held_out_fraction"]) == ("2", "0")
    assert experiment.refusal() is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pairs-per-step", "12"), "--pairs-per-step 12: expected a multiple of TRL's micro-batches of 8"),
        (("--pairs", "8"), "--pairs 8: expected at least the 16 of one step"),
        (("--held-out", "8"), "--held-out 8: expected a share of the prompts, between 0 and 1"),
    ],
)
def test_quality_is_refused_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, str], message: str
) -> None:
    assert quality_vs_trl.main(["--name", "x", "--allow-dirty", "--model", "m", "--train", "t", *flags]) == 2
    assert capsys.readouterr().err.strip() == f"error: {message}"


def test_the_same_parameters_are_frozen() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from btrm_core.model import base
    from btrm_core.settings import ModelConfig

    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=12, num_labels=1, pad_token_id=PAD, **shape)
    ours, theirs = LlamaForSequenceClassification(config), LlamaForSequenceClassification(config)
    base.freeze(ours, ModelConfig(train_last_layers=1))
    freeze(theirs, 1)
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert {p.requires_grad for p in theirs.parameters()} == {True, False}


def test_no_held_out_prompt_is_trained_on(tmp_path: Path) -> None:
    def row(prompt: int, answer: int) -> dict[str, Any]:
        said = [{"role": "user", "content": f"p{prompt}"}]
        return {side: [*said, {"role": "assistant", "content": f"{side} {answer}"}] for side in ("chosen", "rejected")}

    rows = [row(n % 20, n) for n in range(60)]
    train, held = quality_vs_trl.split(experiment_in(tmp_path, held_out=0.25), rows, [])
    prompts = [{quality_vs_trl.prompt_of(one) for one in part} for part in (train, held)]
    assert (len(train), len(held), len(prompts[1])) == (45, 15, 5)
    assert not prompts[0] & prompts[1]
    assert quality_vs_trl.split(experiment_in(tmp_path, held_out=0.25), rows, []) == (train, held)
    train, held = quality_vs_trl.split(experiment_in(tmp_path, evaluation=("e",)), rows, rows[:2])
    assert (len(train), len(held)) == (54, 2)


def test_quality_is_judged_per_seed_and_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from btrm_core import scoring
    from btrm_core.evaluation import PairRewards

    right = {"btrm-0": 30, "trl-0": 24, "btrm-1": 28, "trl-1": 26}

    class Judge:
        """Gives the first pairs the right order."""

        def __init__(self, model: str, dtype: str) -> None:
            self.run = Path(model).parent.name

    def rewards(judge: Judge, data: str) -> Any:
        margin = np.where(np.arange(40) < right[judge.run], 1.0, -1.0)
        found = PairRewards(
            "", data, [str(n) for n in range(40)], [""] * 40, np.arange(40, dtype=np.uint64),
            np.stack([margin, np.zeros(40)], axis=1), np.full((40, 2), [3, 2]), np.full((40, 2), [3, 2]),
            np.ones(40), np.full(40, np.nan),
        )  # fmt: skip
        return type("Found", (), {"rewards": found})

    monkeypatch.setattr(scoring, "Scorer", Judge)
    monkeypatch.setattr(scoring, "source_rewards", rewards)
    experiment = experiment_in(tmp_path)
    seconds = {"wall": 4.0, "cpu": 2.0, "training": 1.0}
    runs = {
        arm: [{"seed": s, **{k: v * (1 + (arm == "trl")) for k, v in seconds.items()}} for s in (0, 1)]
        for arm in ("btrm", "trl")
    }
    found = quality_vs_trl.judge(experiment, runs)
    assert [run["accuracy"] for run in found["arms"]["btrm"]["runs"]] == [30 / 40, 28 / 40]
    pooled = found["comparisons"]["pooled"]
    assert pooled["difference"] == pytest.approx((30 + 28 - 24 - 26) / 80)
    assert "p_value" not in pooled
    assert pooled["interval"]["high"] > 0.1 > pooled["interval"]["low"]
    assert [one["p_value"] for one in found["comparisons"]["seeds"]] == pytest.approx([2 / 2**6, 2 / 2**2])
    facts = {"layers": 6, "train_pairs": 32, "steps": 2, "evaluation_pairs": 40, "evaluation_prompts": 40}
    made = quality_vs_trl.header(experiment, "tiny-quality", {"commit": "c" * 40, "dirty": False})
    made = {**made, "workload": facts, **found}
    results.check(made)
    text = table.render([made])
    assert "| btrm | 0.725 (" in text
    assert "0.750, 0.700" in text
    assert "btrm minus TRL: +0.100 (" in text
    assert "2.00 times as fast" in text


def test_a_server_is_compared_round_by_round() -> None:
    served = {"p50_seconds": 0.5, "p99_seconds": 0.9, "largest_difference": 1e-7, "cpu_seconds": 1.0}
    rounds = [
        {
            "offline": {"rows_per_second": 10.0 * k, "cpu_seconds": 1.0},
            "served": {"rows_per_second": 9.0 * k, **served},
            "one-at-a-time": {"rows_per_second": 1.5, "cpu_seconds": 2.0},
        }
        for k in (1.0, 2.0, 1.0)
    ]
    keys = ("prompts", "responses", "clients", "rounds", "threads")
    settings = {"model": "/nowhere/tiny", "device": "cpu", "dtype": "auto", **dict.fromkeys(keys, 2)}
    result = results.header("serve_load", "serve", settings, {"commit": "a" * 40, "dirty": False})
    result.update(serve_load.summarise(rounds), workload={"layers": 1})
    results.check(result)
    text = table.render([result])
    assert "| served | 9.0 (9.0 to 18.0) | 1.00 |  |" in text
    assert "| offline | 10.0 (10.0 to 20.0) | 1.00 | 0.90 |" in text
    assert "| one-at-a-time | 1.5 | 2.00 | 6.00 (6.00 to 12.00) |" in text
    assert "0.50 s (p50), 0.90 s (p99)" in text
    assert "nowhere" not in json.dumps(result["config"])
