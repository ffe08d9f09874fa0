"""`btrm eval` from files of pairs to figures, comparisons and a report."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from support import processes
from support.scorer_samples import change_json, own_reward, reward_model
from transformers import AutoModelForSequenceClassification

from btrm_core.cli import main
from btrm_core.errors import CheckpointError, DataError
from btrm_core.evaluation import PROBES, assess, load_suite, read_scores
from btrm_core.scoring import evaluate
from btrm_core.scoring.evaluate import source_rewards
from btrm_core.scoring.judge import Request, best_of_source, invariance_of, judge, suite_items
from btrm_core.scoring.kept import Kept, Part
from btrm_core.scoring.results import from_scores, report_of
from btrm_core.scoring.scorer import Scorer
from btrm_core.serving.service import Calibration
from btrm_core.signals import Stopped


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("evaluate") / "first" / "model")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("evaluate") / "second" / "model", "gemma")


@pytest.fixture(scope="session")
def scorer(model: Path) -> Scorer:
    return Scorer(str(model), device="cpu", tokens_per_batch=64)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(number: int, lead: str = "") -> list[dict[str, Any]]:
    return [
        {"id": n, "prompt": f"{lead}Say {n // 2}.", "chosen": f"{n}", "rejected": f"Not {n}, never.", "margin": n % 3}
        for n in range(number)
    ]


def btrm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in ("eval", *arguments)])


def test_rewards_of_a_source_with_all_that_is_known_of_its_pairs(scorer: Scorer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*pairs(12), {"chosen": 1, "rejected": 2}])
    found = source_rewards(scorer, source)
    rewards = found.rewards
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in pairs(12)]
    expected = scorer.pair_rewards(prompts, [r["chosen"] for r in pairs(12)], [r["rejected"] for r in pairs(12)])
    np.testing.assert_allclose(rewards.reward_P2, expected, atol=1e-5)
    assert (found.bad_rows, len(rewards)) == (1, 12)
    assert any("in.jsonl:13: 'chosen' is 1 (int)" in note for note in found.notes)
    assert len(set(rewards.prompt_P.tolist())) == 6
    assert rewards.characters_P2[11].tolist() == [2, len("Not 11, never.")]
    ids = [
        scorer.chat.encode([[*prompts[11], {"role": "assistant", "content": pairs(12)[11][side]}]])[0]
        for side in ("chosen", "rejected")
    ]
    shared = next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert rewards.tokens_P2[11].tolist() == [len(one) - shared for one in ids]
    assert rewards.data_margin_P[:4].tolist() == [0, 1, 2, 0]
    assert rewards.text is not None
    assert rewards.text(3).prompt == (("user", "Say 1."),)
    assert rewards.text(3).rejected == "Not 3, never."
    figures = assess(rewards)
    assert [bias.longer_wins for bias in figures.length] == [0.0, 0.0]
    assert figures.accuracy.half == pytest.approx((expected[:, 0] > expected[:, 1]).mean())


def test_shared_prompts_are_computed_once(model: Path, tmp_path: Path) -> None:
    scorer = Scorer(str(model), device="cpu")
    long = "Tell me about it. " * 10
    source = write(
        tmp_path / "in.jsonl", [{"prompt": long, "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(5)]
    )
    before = scorer.tokens.computed, scorer.tokens.useful
    source_rewards(scorer, source)
    assert (scorer.tokens.computed - before[0]) < 0.7 * (scorer.tokens.useful - before[1])


def copied(model: Path, directory: Path) -> Path:
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def test_a_reward_that_is_no_number_stops_it(model: Path, tmp_path: Path) -> None:
    broken = copied(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][0, 0] = float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    source = write(tmp_path / "in.jsonl", pairs(3))
    with pytest.raises(CheckpointError, match=r"gives pair \d a reward that is not a finite number"):
        source_rewards(Scorer(str(broken), device="cpu"), source)


def test_several_sources_are_judged_alone_and_together(scorer: Scorer, tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", pairs(12))
    second = write(tmp_path / "second.jsonl", pairs(7, "And "))
    report = report_of([judge(scorer, Request((first, second, first)))])
    assert [(e.data, e.accuracy.pairs) for e, _ in report.evaluations] == [(first, 12), (second, 7), ("all", 19)]
    assert {part.name: part.accuracy.pairs for part in report.evaluations[2][0].subsets} == {"first": 12, "second": 7}


def test_kept_rewards_of_many_pairs_show_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(i), "scores_chosen": i % 7, "scores_rejected": i % 5} for i in range(5000)]
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("btrm_core.console.LINE_EVERY", 0.01)
    results = from_scores(read_scores(kept))
    report_of(results, results)
    said = capsys.readouterr().err
    assert re.search(rf"^reading {kept}: 00:00, 4,000 pairs$", said, re.MULTILINE), said
    assert re.search(r"^computing figures: 3 of 3 tables \(100%\), 00:0\d$", said, re.MULTILINE), said


def test_kept_rewards_give_the_same_figures(model: Path, tmp_path: Path) -> None:
    source, kept = write(tmp_path / "in.jsonl", pairs(20)), tmp_path / "kept.parquet"
    direct = btrm(model, "--data", source, "-o", kept, "--json")
    assert direct.exit_code == 0, direct.output
    again = btrm("--scores", kept, "--json")
    assert again.exit_code == 0
    first, second = (json.loads(result.stdout) for result in (direct, again))
    assert first["evaluations"] == second["evaluations"]
    assert first["models"][0]["family"] == "llama3"
    assert first["models"][0]["sources"][0]["rows"]["pairs"] == 20


def test_two_models_are_compared_and_reported(model: Path, other: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", pairs(30))
    result = btrm(model, "--data", source, "--against", other, "--report", tmp_path / "report", "--probes")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert re.search(r"^first 4?[\d.]+ % against second [\d.]+ % on the same 30 pairs: ", text, re.M)
    assert re.search(r"^first +in\.jsonl +30 +[\d.]+ % +[\d.]+ to [\d.]+ ", text, re.M)
    assert "the smallest difference this data would have shown" in text
    assert f"written: {tmp_path / 'report' / 'report.html'}" in result.stderr
    values = json.loads((tmp_path / "report" / "report.json").read_text())
    assert values["comparisons"][0]["overall"]["pairs"] == 30
    assert [row["name"] for row in values["models"][0]["probes"]] == list(PROBES)
    assert values["models"][1]["probes"] == []
    same = btrm("--scores", _kept(other, source, tmp_path), "--against", _kept(model, source, tmp_path))
    assert "on the same 30 pairs" in same.stdout


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        rows = [{"id": n, "scores_chosen": float(n), "scores_rejected": 1.0} for n in range(3)]
        files.append(write(tmp_path / folder / "scores.jsonl", rows))
    result = btrm("--scores", files[0], "--against", files[1])
    assert "scores.jsonl (first) 50.0 % against scores.jsonl (second) 50.0 % on the same 3 pairs" in result.stdout
    found = json.loads(btrm("--scores", files[0], "--scores", files[0], "--json").stdout)
    assert [one["model"] for one in found["evaluations"]] == ["scores.jsonl (1)", "scores.jsonl (2)"]
    assert json.loads(btrm("--scores", files[0], "--json").stdout)["models"][0]["model"] == files[0]


def _kept(model: Path, source: str, folder: Path) -> Path:
    file = folder / f"{model.parent.name}.jsonl"
    assert btrm(model, "--data", source, "-o", file).exit_code == 0
    return file


def test_a_suite_from_a_file_in_its_own_form(model: Path, tmp_path: Path) -> None:
    rows = [
        {"id": n, "subset": subset, "prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "No, never."}
        for n, subset in enumerate(["alpacaeval-easy", "math-prm", "hep-cpp", "donotanswer"] * 3)
    ]
    source = write(tmp_path / "rb.jsonl", rows)
    result = btrm(model, "--suite", f"rewardbench={source}", "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert re.search(r"^first +Reasoning +[\d.]+ % ", result.stdout, re.M)
    written = json.loads((tmp_path / "report" / "rewardbench.json").read_text())
    assert set(written) == {"model", "model_type", "chat_template", *(row["subset"] for row in rows)}
    found = judge(Scorer(str(model), device="cpu"), Request(suites=[f"rewardbench={source}"])).suites[0][0]
    assert found.scores.subsets["math-prm"] == written["math-prm"]
    parts = [write(tmp_path / f"{n}.jsonl", rows[n::2]) for n in range(2)]
    several = Request(suites=[f"rewardbench={part}" for part in (*parts, parts[0])])
    ((together, _),) = judge(Scorer(str(model), device="cpu"), several).suites
    assert together.scores == found.scores
    wrong = btrm(model, "--suite", f"rm-bench={source}")
    assert wrong.exit_code == 2
    assert "row 1 is none of suite rm-bench: 'chosen' is str, expected a list of texts" in wrong.stderr


def test_a_suite_from_files_in_the_folders_of_its_subsets(model: Path, tmp_path: Path) -> None:
    row = {"input": "i", "output_1": "first", "output_2": "second", "label": 1}
    for name in ("Natural", "Adversarial/GPTInst"):
        (tmp_path / "LLMBar" / name / "data").mkdir(parents=True)
        (tmp_path / "LLMBar" / name / "data" / "dataset.json").write_text(json.dumps([row]))
    suite = load_suite("llmbar")
    assert [item.subset for item in suite_items(suite, [str(tmp_path / "LLMBar" / "*" / "data" / "*.json")])] == [
        "Natural"
    ]
    assert {item.subset for item in suite_items(suite, [str(tmp_path / "LLMBar")])} == {"Natural", "GPTInst"}


def test_best_of_n_from_a_file(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Say {n}.", "responses": ["one", "two", "three words here"], "gold": [0.0, 1.0, 0.5]}
        for n in range(4)
    ]
    source = write(tmp_path / "bon.jsonl", rows)
    (found,) = (curve for _, curve in judge(scorer, Request(best_of_n=[source])).best_of_n)
    rewards = scorer.group_rewards([([{"role": "user", "content": r["prompt"]}], r["responses"]) for r in rows])
    best = np.mean([row["gold"][int(np.argmax(given))] for row, given in zip(rows, rewards, strict=True)])
    assert (found.prompts, len(found.curve)) == (4, 3)
    assert found.curve[2].gold == pytest.approx(best)
    assert "Best of N" in btrm(model, "--best-of-n", source).stdout
    found = best_of_source(scorer, write(tmp_path / "some.jsonl", [{**rows[0], "gold": [None, 1, 2]}, *rows[1:]]))
    assert (found.prompts, found.left_out) == (3, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"responses": ["a"]}, "expected 'responses' and as many numbers in 'gold'"),
        ({"responses": ["a", {"text": "b"}]}, "expected texts in 'responses'"),
        ({"gold": [10**400, 1]}, "'gold' holds '1000.*', expected a number or null"),
        ({"gold": ["1", 2]}, "'gold' holds '1', expected a number or null"),
        ({"gold": [1e308, -1e308]}, "no prompt has two answers with finite rewards and gold values"),
        ({"prompt": [3]}, "row 1: .*prompt"),
        ({"prompt": ""}, "row 1: 'prompt' holds nothing but space"),
    ],
)
def test_rows_that_are_no_best_of_n_are_one_line(scorer: Scorer, tmp_path: Path, row: Any, message: str) -> None:
    source = write(tmp_path / "bon.jsonl", [{"prompt": "p", "responses": ["a", "b"], "gold": [1, 2]} | row])
    with pytest.raises(DataError, match=message):
        best_of_source(scorer, source)


def test_rewards_do_not_depend_on_company_or_order(scorer: Scorer) -> None:
    groups = [([{"role": "user", "content": f"Say {n}."}], [f"{n}", "word " * n + "end"]) for n in range(1, 9)]
    found = invariance_of(scorer, groups)
    assert max(found.alone, found.order) < 1e-4 * found.spread
    assert invariance_of(scorer, [([{"role": "user", "content": "word " * 999}], ["a"])]).spread == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to evaluate; name a MODEL"),
        (("MODEL",), "nothing to evaluate on; give pairs with --data SRC"),
        (("MODEL", "--suite", "rewardbnch"), "there is no suite 'rewardbnch'"),
        (("MODEL", "--suite", "llmbar", "--probes"), "--probes edits the answers of pairs"),
        (("MODEL", "--suite", "llmbar", "--against", "x"), "--against compares on pairs"),
        (("MODEL", "--suite", "llmbar", "-o", "x"), "--output keeps the rewards of pairs"),
        (("MODEL", "--suite", "llmbar", "--save-calibration"), "--save-calibration measures a MODEL on pairs"),
        (("org/name", "--data", "x", "--save-calibration"), "org/name is none on this machine"),
        (("--scores", "none.jsonl"), "there is no file none.jsonl"),
        (("--scores", "SCORES", "--against", "MODEL"), "which needs the pairs"),
        (("--scores", "SCORES", "--suite", "llmbar"), "name a MODEL as well"),
        (("--scores", "SCORES", "--data", "x"), "name a MODEL as well"),
        (("--scores", "SCORES", "-o", "x.csv"), "a name that ends in .jsonl, .jsonl.gz or .parquet"),
        (("MODEL", "--data", "SCORES", "-o", "SCORES"), "kept.jsonl, which is read; name another file"),
    ],
)
def test_what_cannot_give_a_result_is_one_line(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    kept = write(tmp_path / "kept.jsonl", [{"id": 1, "scores_chosen": 1.0, "scores_rejected": 0.0}])
    result = btrm(*(str({"MODEL": model, "SCORES": kept}.get(a, a)) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_one_pair_all_ties_and_missing_rewards_give_figures(tmp_path: Path) -> None:
    rows = [{"id": n, "scores_chosen": 1.0, "scores_rejected": 1.0} for n in range(3)]
    rows.append({"id": 9, "scores_chosen": None, "scores_rejected": 1.0})
    result = btrm("--scores", write(tmp_path / "ties.jsonl", rows), "--report", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert "1 without two finite rewards left out" in result.stdout
    assert "accuracy 50.0 % with ties half, 0.0 % with ties wrong, – without ties" in result.stdout
    assert "NaN" not in (tmp_path / "report" / "report.json").read_text()
    nothing = btrm("--scores", write(tmp_path / "none.jsonl", rows[3:]))
    assert (nothing.exit_code, nothing.stdout) == (2, "")


def kept_files(cache: Path) -> list[Path]:
    return sorted((cache / "evaluations").glob("*.partial")) if (cache / "evaluations").is_dir() else []


def killed_while_scoring(tmp_path: Path, *arguments: str) -> int:
    """Start an evaluation in a process of its own and kill it when something is kept; returns the rewards kept."""
    started = processes.start(processes.command, "eval", *arguments, log=tmp_path / "log")
    processes.until(lambda: any(path.stat().st_size for path in kept_files(tmp_path / "cache")), started, timeout=120)
    started[0].kill()
    assert processes.wait(started) == [-signal.SIGKILL], (tmp_path / "log").read_text()
    whole = [line for path in kept_files(tmp_path / "cache") for line in path.read_text().splitlines(keepends=True)]
    return sum(len(chunk) for line in whole if line.endswith("\n") for chunk in json.loads(line)["rewards"])


def test_a_killed_evaluation_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", pairs(1200)), tmp_path / "out.jsonl"
    arguments = (str(model), "--data", source, "--output", str(out), "--tokens-per-batch", "64")
    number = killed_while_scoring(tmp_path, *arguments)
    assert 0 < number < 2400
    assert not list(tmp_path.glob("out.jsonl*"))
    again = btrm(*arguments)
    assert again.exit_code == 0, again.output
    assert f"evaluation of {model} on {source} goes on after {number:,} rewards" in again.stderr
    assert kept_files(tmp_path / "cache") == []
    rewards = read_scores(out)[0].reward_P2
    np.testing.assert_array_equal(
        rewards, source_rewards(Scorer(str(model), tokens_per_batch=64), source).rewards.reward_P2
    )


class Interrupted(Kept):
    """Ctrl-C, or what another process sent, after the second chunk."""

    def __init__(self, stop: BaseException | None = None) -> None:
        super().__init__()
        self.stop = stop or KeyboardInterrupt()

    @contextlib.contextmanager
    def part(self, scorer: Scorer, name: str, of: str) -> Iterator[Part]:
        with super().part(scorer, name, of) as part:
            add, part.add = part.add, lambda chunk: add(chunk) or self.count()
            yield part

    def count(self) -> None:
        self.number = getattr(self, "number", 0) + 1
        if self.number == 2:
            raise self.stop


def test_a_changed_model_or_other_data_is_noticed(
    model: Path, scorer: Scorer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_EVALUATED_TOGETHER", 32)
    made, source = copied(model, tmp_path / "model"), write(tmp_path / "in.jsonl", pairs(100))
    weights = load_file(made / "model.safetensors")

    def said() -> str:
        with pytest.raises(KeyboardInterrupt):
            judge(Scorer(str(made), device="cpu", tokens_per_batch=64), Request((source,)), Interrupted())
        return capsys.readouterr().err

    assert "keeps what is scored; the same command goes on from there" in said()
    save_file({**weights, "score.weight": -weights["score.weight"]}, made / "model.safetensors", {"format": "pt"})
    assert "is not of this input and model: starting anew" in said()
    write(tmp_path / "in.jsonl", [*pairs(100), *pairs(1, "Do not. ")])
    assert "is not of this input and model: starting anew" in said()
    with pytest.raises(KeyboardInterrupt):
        judge(Scorer(str(made), device="cpu", tokens_per_batch=32), Request((source,)), Interrupted())
    assert "starting anew" in capsys.readouterr().err
    found = judge(Scorer(str(made), device="cpu", tokens_per_batch=32), Request((source,)), Kept())
    assert "goes on after 128 rewards" in capsys.readouterr().err
    expected = judge(scorer, Request((source,)))
    np.testing.assert_allclose(found.sources[0].rewards.reward_P2, -expected.sources[0].rewards.reward_P2, atol=1e-5)


def test_best_of_n_goes_on_too(scorer: Scorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Say {n}.", "responses": [f"{n}", "no"], "gold": [1, 0]} for n in range(300)]
    request = Request(best_of_n=[write(tmp_path / "best.jsonl", rows)])
    with pytest.raises(Stopped):
        judge(scorer, request, Interrupted(Stopped(signal.SIGTERM)))
    found = judge(scorer, request, Kept())
    said = capsys.readouterr().err
    assert "keeps what is scored; the same command goes on from there" in said
    assert "goes on after 512 rewards" in said
    assert found.best_of_n[0][1] == judge(scorer, request).best_of_n[0][1]


def strangers(model: Path, directory: Path, **tokenizer: Any) -> Path:
    """The model as another trainer leaves it: no btrm.json."""
    made = copied(model, directory)
    (made / "btrm.json").unlink()
    change_json(made / "tokenizer_config.json", **tokenizer)
    return made


def test_a_model_of_another_trainer_is_read_at_its_own_last_token(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eos = json.loads((model / "tokenizer_config.json").read_text())["eos_token"]
    made = strangers(model, tmp_path / "stranger", pad_token=eos)
    found = Scorer(str(made), device="cpu")
    assert "the pad token" in caplog.text
    assert "btrm reads it at the last token of the conversation" in caplog.text
    conversation = [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "Yes."}]
    (ids,) = found.chat.encode([conversation])
    hf = AutoModelForSequenceClassification.from_pretrained(made, dtype=torch.float32).eval()
    hf.config.pad_token_id = None  # transformers then reads the last token, too
    assert found.rewards([conversation])[0] == pytest.approx(own_reward(hf, ids), abs=1e-5)
    several = found.rewards([conversation, [*conversation, *conversation], conversation[:1] + conversation[1:]])
    assert several[0] == several[2] == pytest.approx(own_reward(hf, ids), abs=1e-5)
    source = write(tmp_path / "in.jsonl", pairs(4))
    assert source_rewards(found, source).rewards.reward_P2.shape == (4, 2)


def test_a_stranger_without_pad_token_is_scored_alike(model: Path, tmp_path: Path) -> None:
    made = strangers(model, tmp_path / "stranger", pad_token=None)
    conversation = [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "Yes."}]
    expected = Scorer(str(model), device="cpu").rewards([conversation])
    np.testing.assert_allclose(Scorer(str(made), device="cpu").rewards([conversation]), expected, atol=1e-5)
    own = copied(model, tmp_path / "own")
    change_json(own / "tokenizer_config.json", pad_token=None)
    with pytest.raises(CheckpointError, match="names no pad token"):
        Scorer(str(own), device="cpu")


def test_a_stranger_whose_template_ends_in_a_line_break_is_read_there(model: Path, tmp_path: Path) -> None:
    made = strangers(model, tmp_path / "stranger")
    file = made / "chat_template.jinja"
    file.write_text(file.read_text() + "\n{{ '\\n' }}")  # as ChatML templates end, and those who train with them
    found = Scorer(str(made), device="cpu")
    conversation = [{"role": "user", "content": "Is ice cold?"}, {"role": "assistant", "content": "Yes."}]
    ids = found.chat.tokenizer.apply_chat_template(conversation, return_dict=False)
    assert found.chat.tokenizer.decode(ids[-1:]) == "\n"
    hf = AutoModelForSequenceClassification.from_pretrained(made, dtype=torch.float32).eval()
    assert found.rewards([conversation])[0] == pytest.approx(own_reward(hf, ids), abs=1e-5)
    assert found.rewards([conversation])[0] != Scorer(str(model), device="cpu").rewards([conversation])[0]
    (copied(model, tmp_path / "own") / "chat_template.jinja").write_text(file.read_text())
    with pytest.raises(CheckpointError, match="ends a conversation in"):
        Scorer(str(tmp_path / "own"), device="cpu")


def test_a_calibration_is_kept_in_btrm_json_and_used(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    made, source = copied(model, tmp_path / "model"), write(tmp_path / "in.jsonl", pairs(40))
    weights = (made / "model.safetensors").read_bytes()
    before = json.loads((made / "btrm.json").read_text())
    assert btrm(made, "--data", source).exit_code == 0
    assert json.loads((made / "btrm.json").read_text()) == before
    lines = write(tmp_path / "lines.jsonl", [{"prompt": "Say 3.", "responses": ["3", "no"]}])
    score = ["score", str(made), lines, "-o", str(tmp_path / "out.jsonl"), "--overwrite"]
    refused = CliRunner().invoke(main, [*score, "--normalize"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "btrm eval" in refused.stderr
    result = btrm(made, "--data", source, "--save-calibration")
    assert result.exit_code == 0, result.output
    assert "calibration saved (temperature" in result.stderr
    after = json.loads((made / "btrm.json").read_text())
    kept = after.pop("calibration")
    assert after == before
    assert (made / "model.safetensors").read_bytes() == weights
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in model.iterdir())
    rewards = source_rewards(scorer, source)
    assert kept["mean"] == pytest.approx(rewards.rewards.reward_P2.mean())
    assert kept["std"] == pytest.approx(rewards.rewards.reward_P2.std())
    assert kept["temperature"] == assess(rewards.rewards).calibration.temperature
    assert (kept["pairs"], kept["data"], kept["data_sha256"]) == (40, [source], [rewards.fingerprint])
    calibrated = Scorer(str(made), device="cpu")
    assert calibrated.identity == Scorer(str(model), device="cpu").identity  # the rewards are the same
    written = {}
    for flags in ((), ("--normalize",)):
        assert CliRunner().invoke(main, [*score, *flags]).exit_code == 0
        written[flags] = np.array(json.loads((tmp_path / "out.jsonl").read_text())["rewards"])
    np.testing.assert_allclose(
        written[("--normalize",)], (written[()] - kept["mean"]) / kept["std"], rtol=1e-4, atol=1e-6
    )
    assert Calibration.of(calibrated.manifest) == Calibration(kept["mean"], kept["std"], kept["temperature"] or 1.0)
    stranger = btrm(strangers(model, tmp_path / "stranger"), "--data", source, "--save-calibration")
    assert stranger.exit_code == 2
    assert "holds no btrm.json, in which a calibration is kept" in stranger.stderr


def test_a_source_without_pairs_is_said(scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pairs are left"):
        source_rewards(scorer, write(tmp_path / "bad.jsonl", [{"chosen": 1, "rejected": 2}]))
