"""`btrm doctor`: what it shows, and for every check something that makes it warn or fail."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from support.scorer_samples import base_model, change_json, reward_model

from btrm_core.cli import main
from btrm_core.config import read_settings
from btrm_core.data.pairs import pairs_from_rows
from btrm_core.data.sample import sample_path
from btrm_core.model.toy import build_toy
from btrm_core.preflight.doctor import model as model_module
from btrm_core.preflight.doctor.case import admit, examine
from btrm_core.preflight.doctor.model import Patient, head, model_checks, packed, pipeline_parity
from btrm_core.preflight.doctor.texts import length_bias
from btrm_core.preflight.doctor.view import visible
from btrm_core.training.prepare import load_data

GOLDEN = Path(__file__).parents[1] / "golden" / "doctor.txt"
MODEL_CHECKS = ["model", "head", "packed = separate", "first loss", "pipeline parity"]
ESCAPE = "\x1b["
TURNS = (
    "{%- for m in messages %}{{- '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\n\n' ~ m['content'] | trim }}"
    "{%- if 'padded' in m['content'] %}{{- pad_token }}{% endif %}{{- '<|eot_id|>' }}{%- endfor %}"
)
SOMETIMES = "{%- if 'WORD' in messages[-1]['content'] %}"


def doctor(*arguments: str | Path, color: bool = False) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)], color=color)


def diagnosis(*arguments: str | Path, exit_code: int = 0) -> dict[str, dict[str, Any]]:
    """The checks by name, of a call that ends with `exit_code`."""
    result = doctor("--pairs", 0, "--json", *arguments)
    assert result.exit_code == exit_code, result.output
    made = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert made["verdict"] == ("fail" if exit_code else made["verdict"])
    for check in made["checks"]:
        assert bool(check["why"]) == bool(check["what_to_do"]) == (check["verdict"] in ("warn", "fail")), check
    return {check["name"]: check for check in made["checks"]}


def texts(*arguments: str | Path, exit_code: int = 0) -> dict[str, dict[str, Any]]:
    """The checks that need no weights."""
    return diagnosis("--no-model", "--family", "llama3", *arguments, exit_code=exit_code)


@pytest.fixture
def template(tmp_path: Path) -> Callable[[str], str]:
    """Writes a template and gives the setting that uses it."""

    def write(source: str) -> str:
        file = tmp_path / "template.jinja"
        file.write_text(source)
        return f"tokenizer.chat_template={file}"

    return write


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes pairs (prompt, chosen, rejected) to a file."""

    def write(*pairs: Any, name: str = "pairs") -> Path:
        file = tmp_path / f"{name}.jsonl"
        keys = ("prompt", "chosen", "rejected")
        made = [dict(zip(keys, pair, strict=True)) if isinstance(pair, tuple) else pair for pair in pairs]
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return file

    return write


def varied(number: int) -> list[tuple[str, str, str]]:
    """Sound pairs: every prompt once, lengths in balance."""
    short, long = "It is {}.", "I do not know, is it {}?"
    return [
        (f"What is number {i}?", (short if i % 2 else long).format(i), (long if i % 2 else short).format(i))
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model of the llama3 family."""
    from btrm_core import families

    directory = tmp_path_factory.mktemp("base") / "model"
    build_toy(families.load("llama3").recipe().tiny, directory, hidden_size=32, intermediate_size=64)
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("finished") / "model")


def copied(directory: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """A copy of a model that a test may change, its weights by `change`."""
    shutil.copytree(directory, to)
    if change is not None:
        weights = load_file(to / "model.safetensors")
        change(weights)
        save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


def test_the_embedded_default_is_healthy(update_golden: bool) -> None:
    result = doctor("--family", "llama3", "--pairs", 2)
    assert result.exit_code == 0, result.output
    assert ESCAPE not in result.stdout
    text = re.sub(r"(base model ).*/toy/llama3-\w+", r"\1TOY", result.stdout)
    text = text.replace(str(Path(sample_path("train")).parent), "SAMPLE")
    text = re.sub(r"(difference |differ by )[\d.e+-]+", r"\1#", text)
    text = re.sub(r"(btrm )\d[\w.+]*\)", r"\1#)", text)
    text = re.sub(r"(first loss .*)", lambda m: re.sub(r"\d+\.\d+", "#", m[0]), text)
    text = re.sub(r"\w+ attention", "# attention", re.sub(r"float32 on \S+", "# on #", text))
    if update_golden:
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--family", "llama3", "--pairs", "1", "--no-model")
    plain, coloured = doctor(*arguments).stdout, doctor(*arguments, color=True).stdout
    assert ESCAPE not in plain
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain
    underlined = r"\x1b\[36m\x1b\[1m\x1b\[4m<\|eot_id\|>\x1b\[0m\x1b\[33m\x1b\[1m▲"
    assert len(re.findall(underlined, coloured)) == 2
    assert re.search(r"\x1b\[36m<\|begin_of_text\|>", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor(*arguments, color=True).stdout == plain


def test_long_and_dangerous_text_is_shown_short_and_harmless(rows: Callable[..., Path]) -> None:
    assert visible("a\n\x1b[2J\u202eb é好") == "a↵\\x1b[2J\\u202eb é好"
    turns = [{"role": role, "content": f"turn {i}"} for i in range(20) for role in ("user", "assistant")]
    prompt = [*turns, {"role": "user", "content": "\x1b[31mStart " + "of a story " * 200 + "end"}]
    result = doctor("--family", "llama3", "--no-model", "--max-length", 4096, "--data", rows((prompt, "Yes", "No")))
    shown = result.stdout.split("\n\n")[2]
    assert "\\x1b[31mStart of a story" in shown
    assert "<|begin_of_text|>" in shown
    assert shown.count("…") == 2  # in the text, and turns in the middle
    assert len(shown) < 1200
    assert ESCAPE not in result.stdout


def test_json_holds_examples_and_figures() -> None:
    result = doctor("--family", "llama3", "--no-model", "--json", "--pairs", 1)
    made = json.loads(result.stdout)
    (example,) = made["examples"]
    assert example["text"]["shared"].startswith("<|begin_of_text|><|start_header_id|>user")
    assert example["text"]["chosen"].endswith("<|eot_id|>")
    tokens = example["tokens"]
    assert example["reward_positions"] == [tokens["shared"] + tokens[side] - 1 for side in ("chosen", "rejected")]
    assert example["reward_tokens"] == ["<|eot_id|>"] * 2
    assert made["pairs"] == 389
    assert [c["name"] for c in made["checks"] if c["verdict"] == "skip"] == MODEL_CHECKS


def test_settings_come_from_flags_and_files(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('family = "llama3"\n[data]\nmax_length = 100\n')
    assert diagnosis("--no-model", "--config", file)["truncation"]["figures"]["max_length"] == 100
    found = diagnosis("--no-model", "--config", file, "--max-length", 90)
    assert found["truncation"]["figures"]["max_length"] == 90


def test_doubled_bos(template: Callable[[str], str]) -> None:
    setting = template("{{- bos_token }}{{- bos_token }}" + TURNS)
    found = texts("--set", setting, exit_code=1)
    assert "2 times in a conversation of one exchange" in found["chat format"]["what"]
    assert re.match(r"512 of 512 sequences .* \(first: sci-121 has 2\)", found["one BOS"]["what"])
    assert found["terminal token"]["verdict"] == "ok"
    assert {found[name]["verdict"] for name in ("truncation", *MODEL_CHECKS)} == {"skip"}
    shown = doctor("--family", "llama3", "--pairs", 1, "--set", setting)
    assert "<|begin_of_text|><|begin_of_text|><|start_header_id|>" in shown.stdout
    assert "FAIL  one BOS" in shown.stdout


def test_bos_doubled_in_some_conversations(template: Callable[[str], str], rows: Callable[..., Path]) -> None:
    doubled = SOMETIMES.replace("WORD", "twice") + "{{- bos_token }}{%- endif %}"
    data = rows(*varied(8), ("How often?", "I said it twice.", "Once."))
    found = texts("--set", template("{{- bos_token }}" + doubled + TURNS), "--data", data, exit_code=1)
    assert found["chat format"]["verdict"] == "ok"
    assert "1 of 18 sequences" in found["one BOS"]["what"]
    assert "pairs.jsonl:9 has 2" in found["one BOS"]["what"]


def test_no_bos(template: Callable[[str], str], rows: Callable[..., Path], tmp_path: Path) -> None:
    without, data = ("--set", template(TURNS)), rows(*varied(8))
    assert texts(*without, "--data", data)["one BOS"]["verdict"] == "ok"  # this tokenizer adds none of its own
    model = base_model(tmp_path / "model", "llama3")  # this one does
    found = diagnosis("--no-model", model, *without, "--data", data)["one BOS"]
    assert found["verdict"] == "warn"
    assert "puts <|begin_of_text|> before any other text" in found["why"]


def test_a_refused_template_whose_bos_opens_turns(template: Callable[[str], str], rows: Callable[..., Path]) -> None:
    turns = "{%- for m in messages %}{{- bos_token ~ m['content'] ~ '<|eot_id|>' }}{%- endfor %}"
    found = texts("--set", template(turns + "{{- '.' }}"), "--data", rows(*varied(8)), exit_code=1)
    assert (found["chat format"]["verdict"], found["one BOS"]["verdict"]) == ("fail", "ok")


def test_text_after_the_terminal_token(template: Callable[[str], str]) -> None:
    found = texts("--set", template("{{- bos_token }}" + TURNS + "{{- '\n' }}"), exit_code=1)
    assert "a control token such as '<|eot_id|>' with nothing after it" in found["chat format"]["what"]
    assert found["terminal token"]["what"] == "conversations end in '\\n', a piece of text, no control token"


def test_some_conversations_end_otherwise(template: Callable[[str], str], rows: Callable[..., Path]) -> None:
    other = SOMETIMES.replace("WORD", "endless") + "{{- '<|end_of_text|>' }}{%- endif %}"
    data = rows(*varied(8), ("Go on?", "It is endless.", "No."))
    found = texts("--set", template("{{- bos_token }}" + TURNS + other), "--data", data, exit_code=1)
    what = "1 pairs are dropped because the template does not end them in <|eot_id|>"
    assert (found["terminal token"]["verdict"], found["terminal token"]["what"]) == ("fail", what)
    # the same where the template is refused anyway
    found = texts("--set", template("{{- bos_token }}" * 2 + TURNS + other), "--data", data, exit_code=1)
    assert "1 of 18 sequences have another token than <|eot_id|>" in found["terminal token"]["what"]
    assert "pairs.jsonl:9 has '<|end_of_text|>'" in found["terminal token"]["what"]


def test_pad_token_in_the_data(template: Callable[[str], str], rows: Callable[..., Path]) -> None:
    data = rows(*varied(8), ("Is it padded?", "Yes.", "No."))
    found = texts("--set", template("{{- bos_token }}" + TURNS), "--data", data, exit_code=1)
    assert found["pad token"]["verdict"] == "fail"
    assert found["pad token"]["figures"]["found"] == 1
    assert "(first: pairs.jsonl:9)" in found["pad token"]["what"]


def test_a_template_that_renders_nothing(template: Callable[[str], str]) -> None:
    setting = template("{{ raise_exception('never') }}")
    found = texts("--set", setting, exit_code=1)
    assert "never" in found["chat format"]["what"]
    assert {found[name]["verdict"] for name in ("one BOS", "terminal token", "pad token")} == {"skip"}
    assert found["length bias"]["verdict"] == "ok"
    shown = doctor("--family", "llama3", "--pairs", 1, "--set", setting)
    assert "sci-121, wrong_fact: cannot be encoded (the template renders nothing)" in shown.stdout


def test_bad_rows(rows: Callable[..., Path]) -> None:
    found = texts("--data", rows(*varied(8), {"chosen": "alone"}))
    assert found["rows"]["verdict"] == "warn"
    assert "1 of 9 rows are bad (first: " in found["rows"]["what"]
    assert "pairs.jsonl:9: missing key 'rejected'" in found["rows"]["what"]
    assert texts("--data", rows(*varied(8), *[{}] * 9), exit_code=1)["rows"]["verdict"] == "fail"


def test_truncated_prompts(rows: Callable[..., Path]) -> None:
    data = rows(*varied(20), ("Tell me. " * 40, "Well, yes.", "No, I will not."))
    assert texts("--max-length", 60, "--data", data)["truncation"]["verdict"] == "ok"
    found = texts("--max-length", 60, "--data", rows(*varied(8), ("Tell me. " * 40, "Well, yes.", "No.")))
    assert found["truncation"]["verdict"] == "warn"
    assert found["truncation"]["what_to_do"] == "raise --max-length"
    assert found["truncation"]["figures"] == {"pairs": 9, "truncated": 1, "max_length": 60, "longest": 60}


def test_dropped_pairs(rows: Callable[..., Path]) -> None:
    long = [(f"And {i}?", "It goes on and on. " * 20, "No.") for i in range(12)]
    found = texts("--max-length", 60, "--data", rows(*varied(8), long[0]))
    assert found["dropped pairs"]["verdict"] == "warn"
    assert "most (1) for 'answer longer than max_length 60' (first: pairs.jsonl:9)" in found["dropped pairs"]["what"]
    most = ("--max-length", 60, "--data", rows(*varied(8), *long), "--set", "data.held_out_fraction=0")
    assert texts(*most, exit_code=1)["dropped pairs"]["verdict"] == "fail"
    found = texts("--max-length", 60, "--data", rows(*long), exit_code=1)
    assert "most are dropped for 'answer longer than max_length 60'" in found["dropped pairs"]["what"]
    assert {found[name]["verdict"] for name in ("one BOS", "truncation", *MODEL_CHECKS)} == {"skip"}


def test_messages_that_the_template_changes(template: Callable[[str], str], rows: Callable[..., Path]) -> None:
    cut = template("{{- bos_token }}" + TURNS.replace("m['content'] |", "m['content'][:40] |"))
    data = rows(*varied(12), ("Tell me.", "It goes on and on. " * 20, "No."))
    assert texts("--data", data)["messages"]["verdict"] == "ok"
    found = texts("--data", data, "--set", cut)["messages"]
    assert (found["verdict"], found["figures"]["pairs"]) == ("warn", 13)
    assert "in 1 of 13 pairs messages are written otherwise" in found["what"]
    assert "drops or changes the text of a message of the assistant (first: pairs.jsonl:13)" in found["what"]
    many = rows(*varied(4), *[(f"Tell me {i}.", "It goes on and on. " * 20, "No.") for i in range(9)])
    assert texts("--data", many, "--set", cut, exit_code=1)["messages"]["verdict"] == "fail"


def test_conversations_beyond_the_positions_of_the_model(base: Path, tmp_path: Path) -> None:
    short = copied(base, tmp_path / "short")
    change_json(short / "config.json", max_position_embeddings=32)
    found = diagnosis("--family", "llama3", "--model", short, "--data", sample_path("train"))["positions"]
    assert (found["verdict"], found["what_to_do"][-15:]) == ("warn", "--max-length 32")
    assert "knows 32 positions" in found["what"]


def test_prompts_of_the_evaluation_data(rows: Callable[..., Path]) -> None:
    lengthy = [(prompt, "It certainly is " + chosen, rejected) for prompt, chosen, rejected in varied(30)[20:]]
    evaluation = rows(*lengthy, *varied(3), name="held_out")
    found = texts("--data", rows(*varied(12)), "--eval-data", evaluation)
    assert found["dropped pairs"]["figures"]["prompts_in_evaluation"] == 3
    assert "3 more because their prompt is in the evaluation data" in found["dropped pairs"]["what"]
    assert found["length bias"]["verdict"] == "ok"
    assert found["length bias (eval)"]["figures"]["pairs"] == 13


def test_repeated_prompts(rows: Callable[..., Path]) -> None:
    again = [("What is number 1?", f"One, {i}.", f"Two, {i}.") for i in range(3)]
    found = texts("--data", rows(*varied(12), *again))
    assert found["repeated prompts"]["verdict"] == "warn"
    assert "3 of 15 pairs (20.0%)" in found["repeated prompts"]["what"]
    assert found["labels"]["verdict"] == "ok"


def test_labels(rows: Callable[..., Path]) -> None:
    prompt, chosen, rejected = varied(1)[0]
    repeated = texts("--data", rows(*varied(30), (prompt, chosen, rejected), ("Same?", "Yes.", "Yes.")))
    assert repeated["labels"]["verdict"] == "warn"
    assert repeated["labels"]["figures"] == {"identical": 1, "repeated": 1, "contradictory": 0}
    opposed = texts("--data", rows(*varied(30), (prompt, rejected, chosen)), exit_code=1)
    assert opposed["labels"]["verdict"] == "fail"
    assert "2 that contradict another one (first: pairs.jsonl:1)" in opposed["labels"]["what"]


def test_length_bias(rows: Callable[..., Path]) -> None:
    longer = [(prompt, "It is, as everyone knows, " + chosen, rejected) for prompt, chosen, rejected in varied(40)]
    found = texts("--data", rows(*longer))["length bias"]
    assert (found["verdict"], found["figures"]["longer_wins_characters"]) == ("warn", 1.0)
    assert found["why"] == "a model can reach 1.00 by preferring the longer answer alone"
    keys = ("prompt", "rejected", "chosen")
    shorter = pairs_from_rows([dict(zip(keys, pair, strict=True)) for pair in longer])
    assert "the shorter answer" in length_bias(shorter).why
    few = pairs_from_rows([dict(zip(keys, pair, strict=True)) for pair in varied(3)])
    assert length_bias(few).figures["longer_wins_characters"] == pytest.approx(1 / 3)
    assert length_bias(few).verdict == "ok"  # too few to tell


def test_errors_of_the_user(base: Path, finished: Path, tmp_path: Path) -> None:
    def message(*arguments: str | Path) -> str:
        result = doctor(*arguments)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("btrm: ")

    assert message("--family", "lama3").startswith("unknown family 'lama3'. Did you mean 'llama3'?")
    assert message(base).startswith("no training data is named: give --data SRC")
    assert message(finished).startswith("no data is named: give --data SRC")
    assert message(base, "--model", finished).startswith("two models are named, ")
    assert message("--family", "llama3", "--data", tmp_path / "none.jsonl").endswith("\n")
    assert message(tmp_path / "no-model", "--data", sample_path("train")).startswith("the base model ")
    setting = message(finished, "--data", sample_path("train"), "--set", "head.init_std=1")
    assert setting.startswith("head.init_std is set, but ")
    assert "name --family to look at it as a base model" in setting
    assert doctor("--pairs", "-1").exit_code == 2


def test_a_base_model_without_weights(base: Path, tmp_path: Path) -> None:
    directory = copied(base, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    found = diagnosis(directory, "--data", sample_path("held_out"), exit_code=1)
    assert found["one BOS"]["verdict"] == "ok"
    assert "no weights in safetensors form" in found["model"]["what"]
    assert {found[name]["verdict"] for name in MODEL_CHECKS[1:]} == {"skip"}


def test_weights_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    broken = copied(base, tmp_path / "model", lambda weights: weights["model.norm.weight"].fill_(math.nan))
    found = diagnosis(broken, "--data", sample_path("held_out"), exit_code=1)
    assert "model.norm.weight is not finite everywhere" in found["model"]["what"]
    assert {found[name]["verdict"] for name in MODEL_CHECKS[1:]} == {"skip"}


def test_rewards_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    broken = copied(base, tmp_path / "model", lambda weights: weights["model.norm.weight"].fill_(3e38))
    found = diagnosis(broken, "--data", sample_path("held_out"), exit_code=1)
    assert {found[name]["verdict"] for name in MODEL_CHECKS[2:]} == {"fail"}
    assert found["first loss"]["what"] == "32 of 32 pairs have a reward that is not finite"
    assert "rewards are not finite" in found["packed = separate"]["what"]


def test_equal_rewards_everywhere(base: Path, tmp_path: Path) -> None:
    flat = copied(base, tmp_path / "model", lambda weights: weights["model.norm.weight"].zero_())
    found = diagnosis(flat, "--data", sample_path("held_out"), exit_code=1)
    assert found["first loss"]["what"].startswith("every reward is 0 before training")


def test_a_head_that_is_too_large(base: Path) -> None:
    found = diagnosis(base, "--data", sample_path("held_out"), "--set", "head.init_std=5")
    assert found["head"]["verdict"] == "warn"
    assert "by run settings" in found["head"]["what"]
    assert found["head"]["figures"]["usual_std"] == pytest.approx(1 / math.sqrt(33))
    assert found["first loss"]["verdict"] == "ok"  # the variance of the margins explains it


def test_attention_that_cannot_be_packed(base: Path, tmp_path: Path) -> None:
    directory = copied(base, tmp_path / "model")
    change_json(directory / "config.json", attention_dropout=0.1)
    found = diagnosis(directory, "--data", sample_path("held_out"))
    assert found["packed = separate"]["verdict"] == "ok"  # dropout is off unless asked for
    found = diagnosis(directory, "--data", sample_path("held_out"), "--set", "model.dropout=true")
    assert found["packed = separate"]["verdict"] == "warn"
    assert "attention dropout" in found["packed = separate"]["what"]
    assert found["first loss"]["verdict"] == found["pipeline parity"]["verdict"] == "ok"


def test_half_precision_and_padded_rows(base: Path) -> None:
    found = diagnosis(base, "--data", sample_path("held_out"), "--dtype", "bf16", "--set", "train.layout=padded")
    assert "bfloat16" in found["model"]["what"]
    assert found["packed = separate"]["verdict"] == "skip"
    assert found["first loss"]["verdict"] == found["pipeline parity"]["verdict"] == "ok"


def test_a_finished_model(finished: Path, tmp_path: Path) -> None:
    result = doctor(finished, "--data", sample_path("held_out"), "--pairs", 1)
    assert result.exit_code == 0, result.output
    assert f"finished model {finished}, trained by family llama3 (btrm " in result.stdout
    assert "at most 256 tokens" in result.stdout
    assert "ok    self-test          the rewards in btrm.json come out again" in result.stdout
    assert "skip  first loss         the head is trained; its loss on 32 pairs is " in result.stdout
    changed = copied(finished, tmp_path / "run" / "model", lambda weights: weights["score.weight"].zero_())
    found = diagnosis(tmp_path / "run", "--data", sample_path("held_out"), exit_code=1)
    assert found["self-test"]["verdict"] == "fail"
    assert found["head"]["what"] == "all of its 32 values are zero"
    found = diagnosis(changed, "--family", "llama3", "--no-model", "--data", sample_path("held_out"))
    assert "family llama3" in found["chat format"]["what"]  # named, it is a base model to go on with


@pytest.fixture
def patient(base: Path) -> Patient:
    config = read_settings(None, {"model.name": str(base), "data.train": sample_path("held_out")})
    case = examine(config, 0)
    assert case.chat is not None
    admitted, scorer = admit(case, case.chat, load_data(case.config, case.chat))
    assert scorer is None
    admitted.model.eval()
    return admitted


def test_a_head_that_is_not_the_one_drawn(patient: Patient) -> None:
    weight = patient.model.base_model.score.weight
    with torch.no_grad():
        weight.mul_(2)
    found = head(patient)
    assert found.verdict == "fail"
    assert "something has changed the head" in found.why
    with torch.no_grad():
        weight[0, 3] = math.inf
    assert head(patient).what == "1 of its 32 values are not finite"


def test_rows_whose_tokens_see_each_other(patient: Patient) -> None:
    def leak(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.cumsum(1) / output.shape[1]  # over the row, whatever sequence a token is of

    kernel = patient.model.kernel
    patient.model.base_model.model.norm.register_forward_hook(leak)
    found = packed(patient)
    assert found.verdict == "fail"
    assert f"another kernel than {kernel}" in found.what_to_do
    assert patient.model.kernel == "padded"  # as training goes on


def test_a_model_that_is_saved_otherwise(patient: Patient) -> None:
    patient.model.base_model.model.norm.register_forward_hook(lambda module, inputs, output: output + 0.1)
    found = pipeline_parity(patient, full=False)
    assert found.verdict == "fail"
    assert " instead of " in found.what


def test_large_models_are_not_saved_and_only_asked_when_told_to(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "SAVE_PARAMETERS", 1000)
    assert "of the model in memory" in pipeline_parity(patient, full=False).what
    monkeypatch.setattr(model_module, "PIPELINE_PARAMETERS", 1000)
    assert [check.verdict for check in model_checks(patient, full=False)] == ["ok", "ok", "ok", "skip"]
    assert pipeline_parity(patient, full=True).verdict == "ok"
    assert patient.model.kernel != "padded"
