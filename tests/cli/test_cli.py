"""The command line as a user meets it: every mistake gets one line and exit code 2."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support import processes

from btrm_core.cli import main
from btrm_core.cli.preflight import _echo, doctor
from btrm_core.cli.train import train
from btrm_core.data.sample import sample_path
from btrm_core.settings import declared

GOLDEN = Path(__file__).parent.parent / "golden"


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def fails(*arguments):
    """Run a command that must fail for a reason of the user's; return its one line."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("btrm: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("btrm: ")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama-3-shaped causal language model, as it would come from a hub."""
    from btrm_core.families.discovery import load
    from btrm_core.model.toy import build_toy

    directory = tmp_path_factory.mktemp("base") / "tiny-llama3"
    build_toy(load("llama3").recipe().tiny, directory, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    return directory


def changed_config(base, target, **changes):
    target.mkdir()
    for path in base.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_help_and_families_answer_without_torch():
    code = "import sys; from btrm_core.cli import main; main(standalone_mode=False); sys.exit('torch' in sys.modules)"
    for arguments in (["families"], ["--help"], ["train", "--help"], ["families", "--json"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    names = [entry["name"] for entry in json.loads(done.stdout)]
    assert {"checkpoint", "gemma", "gemma2", "gemma3", "llama3", "mistral", "qwen3"} <= set(names)


def test_every_flag_is_made_from_its_setting_once():
    flagged = [setting for setting in declared().values() if setting.flag]
    own = {"gpus", "processes", "config_file", "assignments", "dry_run"}
    assert len(train.params) == len(flagged) + len(own)
    assert len({parameter.name for parameter in train.params}) == len(train.params)
    assert {parameter.name for parameter in doctor.params} - {"subject", "pairs", "no_model", "full", "as_json"} == {
        *(
            "family",
            "force_family",
            "model",
            "revision",
            "trust_remote_code",
            "data",
            "eval_data",
            "map",
            "max_length",
            "dtype",
            "attention",
        ),
        *("config_file", "assignments"),
    }


@pytest.mark.parametrize("command", ["train", "doctor", "cache", "cache info", "cache prune"])
def test_the_help_is_as_written_down(command, update_golden):
    result = CliRunner().invoke(main, [*command.split(), "--help"], prog_name="btrm", terminal_width=78)
    golden = GOLDEN / f"help_{command.replace(' ', '_')}.txt"
    if update_golden:
        golden.write_text(result.output, "utf-8")
    assert result.output == golden.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "train.seed = -1: expected 0 or more"),
        (["--seed", "1e999"], "train.seed = '1e999': expected a whole number"),
        (["--seed", "9" * 30], f"train.seed = {'9' * 30}: expected a whole number below 2^63"),
        (["--learning-rate", "inf"], "train.learning_rate = inf: expected a finite number"),
        (["--learning-rate", "1e999"], "train.learning_rate = inf: expected a finite number"),
        (["--epochs", "nan"], "train.epochs = nan: expected a finite number"),
        (["--epochs", "1e300"], "train.epochs = 1e+300: expected at most 1,000,000"),
        (["--max-steps", "0"], "train.max_steps = 0: expected a number above 0"),
        (["--max-hours", "two"], "train.max_hours = 'two': expected a number"),
        (["--set", "train.adam_beta2=1"], "train.adam_beta2 = 1.0: expected at least 0 and below 1"),
        (["--set", "train.adam_eps=0"], "train.adam_eps = 0.0: expected a number above 0"),
        (["--set", "train.adam_eps=-inf"], "train.adam_eps = -inf: expected a finite number"),
        (["--set", "train.warmup_ratio=2"], "train.warmup_ratio = 2.0: expected at most 1"),
    ],
)
def test_an_absurd_number_is_one_line(arguments, message):
    assert fails("train", "--family", "llama3", *arguments) == message


def test_unknown_family():
    line = fails("train", "--family", "lama3")
    assert line.startswith(
        "unknown family 'lama3'. Did you mean 'llama3'? Installed: "
        "checkpoint, gemma, gemma2, gemma3, llama3, mistral, qwen3"
    )


def test_a_family_that_does_not_claim_the_checkpoint(base):
    line = fails("train", "--family", "gemma", "--model", base, "--data", sample_path("train"))
    assert "gemma" in line
    assert "llama3" in line


def test_detection_finds_the_family(base, tmp_path):
    result = invoke("train", "--model", base, "--data", sample_path("train"), "--dry-run", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "family: llama3 (btrm " in result.stdout


def test_no_family_claims_it(base, tmp_path):
    other = changed_config(base, tmp_path / "other", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    line = fails("train", "--model", other, "--data", sample_path("train"))
    assert "checkpoint, gemma, gemma2, gemma3, llama3, mistral, qwen3" in line


def test_pad_equal_to_eos_is_refused(base):
    line = fails(
        "train",
        "--family",
        "llama3",
        "--model",
        base,
        "--data",
        sample_path("train"),
        "--set",
        "tokenizer.pad_token=<|eot_id|>",
    )
    assert "tokenizer.pad_token" in line


def test_no_weights(base, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in base.iterdir():
        if "safetensors" not in path.name:
            (empty / path.name).write_bytes(path.read_bytes())
    line = fails(
        "train", "--family", "llama3", "--model", empty, "--data", sample_path("train"), "--output", tmp_path / "o"
    )
    assert line == (
        f"the base model directory {empty} has no weights in safetensors form (found none); expected model.safetensors "
        "or model.safetensors.index.json"
    )
    assert not (tmp_path / "o" / "model").exists()


def test_weights_that_are_not_safetensors(base, tmp_path):
    pickled = changed_config(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    line = fails(
        "train", "--family", "llama3", "--model", pickled, "--data", sample_path("train"), "--output", tmp_path / "o"
    )
    assert "found only pytorch_model.bin, which may run code or lose precision" in line


def test_there_is_no_such_model():
    assert fails("train", "--model", "./nowhere", "--data", "x.jsonl") == (
        "the base model ./nowhere is neither a directory nor a hub id of the form owner/name"
    )


def test_a_base_model_cannot_score(base, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    line = fails("score", base, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert "head" in line
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_to_train():
    assert fails("train") == ("nothing says what to train: give --family NAME for the demo, or --model ID|DIR")


def test_no_data(base):
    assert fails("train", "--family", "llama3", "--model", base) == (
        "no training data is named: give --data SRC (a file, a dataset directory or a hub id)"
    )


def test_no_data_left(base, tmp_path):
    row = {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "a"}]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    line = fails(
        "train", "--family", "llama3", "--model", base, "--data", tmp_path / "bad.jsonl", "--output", tmp_path / "o"
    )
    assert "bad.jsonl:1" in line


def test_everything_is_too_long(base, tmp_path):
    line = fails(
        "train",
        "--family",
        "llama3",
        "--model",
        base,
        "--data",
        sample_path("train"),
        "--max-length",
        4,
        "--output",
        tmp_path,
    )
    assert "no pair" in line or "no training pairs" in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "train.lr=1"], "unknown setting 'train.lr'."),
        (["--set", "train.seed"], "--set 'train.seed' is not of the form section.key=value, e.g. --set train.seed=1"),
        (["--deepspeed", "zero9"], "--deepspeed 'zero9': expected one of zero1, zero2, zero2-offload, zero3"),
        (["--report-to", "wandbb"], "--report-to 'wandbb': expected none or one of wandb, tensorboard"),
        (["--config", "none.toml"], "cannot read the configuration file none.toml: No such file or directory"),
        (["--gpus", "2"], "--gpus 2: torch sees no GPU on this machine; on a CPU use --processes N"),
        (["--kernels", "liger"], "--kernels liger needs a GPU, and torch sees none; use --kernels torch"),
    ],
)
def test_settings(arguments, line, tmp_path):
    import torch

    if torch.cuda.is_available() and arguments[0] in ("--gpus", "--kernels"):
        pytest.skip("this machine has a GPU")
    assert fails("train", "--family", "llama3", "--output", tmp_path / "o", *arguments).startswith(line)


def test_dry_run_says_everything_and_writes_nothing(tmp_path):
    result = invoke("train", "--family", "mistral", "--dry-run", "--output", tmp_path / "o", "--seed", 7)
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "o").exists()
    for text in ("family: mistral (btrm ", "pad token '<unk>'", "seed = 7", "template sha256: ", '"stage": 1'):
        assert text in result.stdout


def test_a_file_that_is_no_model_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    line = fails("train", "--family", "llama3", "--output", tmp_path, "--overwrite")
    assert line == f"{tmp_path / 'model'} exists and is no btrm model; choose another --output or remove it"


def wait_for_steps(output: Path, count: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        path = output / "metrics.jsonl"
        if path.exists() and path.read_text().count('"split": "train"') >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get to its steps in time")


@pytest.mark.timeout(240)
def test_ctrl_c_keeps_the_work_and_says_how_to_go_on(tmp_path):
    arguments = ("train", "--family", "llama3", "--output", tmp_path, "--pairs-per-step", 4, "--eval-every", 10_000)
    log = tmp_path / "log"
    started = processes.start(processes.command, *map(str, arguments), log=log)
    wait_for_steps(tmp_path, 3)
    os.kill(started[0].pid, signal.SIGINT)
    assert processes.wait(started) == [130]
    errors = log.read_text()
    assert "go on with the same command and --resume" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "model").exists()
    assert list((tmp_path / "resume").glob("step-*/COMPLETE"))


def on_a_small_disk(*arguments):
    """`btrm` in a child that cannot write files larger than 300 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    processes.command(*arguments)


@pytest.mark.timeout(240)
def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path):
    warm = invoke("train", "--family", "llama3", "--dry-run")
    assert warm.exit_code == 0
    arguments = ["train", "--family", "llama3", "--output", str(tmp_path), "--max-steps", "1"]
    log = tmp_path / "log"
    assert processes.wait(processes.start(on_a_small_disk, *arguments, log=log)) == [2], log.read_text()
    assert f"the disk is full while saving {tmp_path / 'model'}; nothing was left behind" in log.read_text()
    assert not [p for p in tmp_path.iterdir() if "model" in p.name]


@pytest.mark.timeout(240)
def test_wandb_offline_and_tensorboard_get_the_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = ("--family", "llama3", "--output", str(tmp_path), "--max-steps", "2")
    done = processes.btrm("train", *arguments, "--report-to", "wandb,tensorboard")
    assert done.returncode == 0, done.stderr
    runs = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 1000
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents*"))
    assert b"eval/accuracy" in events
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    evaluation = next(line for line in lines if line["split"] == "eval")
    for subset in evaluation["subsets"]:
        assert f"eval/{subset['name']}/accuracy".encode() in events


DRY = ("train", "--family", "llama3", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["families", "--check"], "--check needs the NAME of a family; `btrm families` lists them"),
        (["plan", "--model", "M", "--pairs", "-5"], "--pairs -5: expected a number above 0"),
        (["plan", "--model", "M", "--epochs", "nan"], "--epochs nan: expected a number above 0"),
        ([*DRY, "--output", "x" * 300], "the system refuses 'x"),
        ([*DRY, "--output", "a\0b"], "output.dir holds a character of value 0"),
        ([*DRY, "--data", "a\0b"], "data.train holds a character of value 0"),
        (
            [*DRY, "--set", "data.cache_dir=/dev/null"],
            "cannot write the data cache '/dev/null",
        ),
        (
            [*DRY, "--attention", "flash"],
            "attention kernel 'flash' needs a CUDA device",
        ),
        ([*DRY, "--processes", "0"], "--processes 0: expected 1 or more"),
        (["train", "--family", "x" * 300, "--dry-run"], "unknown family 'x"),
    ],
)
def test_what_cannot_be_is_one_line_and_code_2(arguments, told):
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith(f"btrm: {told}")
    assert result.stderr.count("\n") == 1


def test_a_name_that_is_not_utf8_and_a_library_refuses_is_one_line(monkeypatch, capsys):
    name = "e\udce4"
    monkeypatch.setattr(sys, "argv", ["btrm", "data", "inspect", name])
    monkeypatch.setattr("btrm_core.data.load_pairs", lambda *_, **__: name.encode())
    with pytest.raises(SystemExit) as ended:
        main(["data", "inspect", name])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "btrm: 'e\\udce4' is no UTF-8, which libraries take alone; rename it\n"


def test_standard_output_that_is_full_or_closed_is_no_bug():
    command = [sys.executable, "-m", "btrm_core", "families"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "btrm: the system refuses: No space left on device\n")


ABSURD = (
    "",
    "-1",
    "0",
    "1e999",
    "nan",
    "\x1b[31m",
    "x" * 5000,
    "../../etc/passwd",
    "/dev/full",
    "'; rm -rf /",
    "\u202e",
    "[]",
)
"""Values that no option means."""


def fuzzed(command: click.Command, name: str, draw: random.Random) -> list[str]:
    """A command line with one option of a command set to something absurd, so that nothing long is started."""
    option = draw.choice([p for p in command.params if isinstance(p, click.Option) and not p.is_flag and not p.hidden])
    needed = ["MODEL"] * sum(isinstance(p, click.Argument) and p.required for p in command.params)
    must = [x for p in command.params if isinstance(p, click.Option) and p.required for x in (p.opts[-1], "MISSING")]
    dry = ["--dry-run"] if name == "train" else []
    return [name, *needed, *must, option.opts[-1], draw.choice(ABSURD), *dry]


def test_absurd_command_lines_are_refused_or_harmless(tmp_path, monkeypatch):
    """Exit code 0 or 2, and never a traceback; `BTRM_FUZZ=N` tries N of them, `BTRM_SEED` others."""
    draw = random.Random(int(os.environ.get("BTRM_SEED", "0")))
    monkeypatch.chdir(tmp_path)
    context = click.Context(main)
    names = [name for name in main.list_commands(context) if name not in ("cache", "data", "new-family", "serve")]
    for _ in range(int(os.environ.get("BTRM_FUZZ", 40))):
        name = draw.choice(names)
        command = main.get_command(context, name)
        assert command is not None
        arguments = fuzzed(command, name, draw)
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code in (0, 2), (arguments, result.output[-2000:])
        assert "this is a bug" not in result.stderr, (arguments, result.output[-2000:])
        assert "Traceback" not in result.stderr, arguments


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_a_terminal_without_colours_gets_none(monkeypatch, variable, value):
    said = io.StringIO()
    monkeypatch.setattr(said, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _echo(click.style("ok", fg="green"), said)
    assert said.getvalue() == "\x1b[32mok\x1b[0m\n"
    monkeypatch.setenv(variable, value)
    _echo(click.style("ok", fg="green"), said)
    assert said.getvalue().endswith("\nok\n")
