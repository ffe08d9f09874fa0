"""What the documents say a user can type can be typed."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from support.architectures import ARCHITECTURES
from support.scorer_samples import FAMILIES, reward_model
from support.serving import serving

from btrm_core.cli import main
from btrm_core.cli.flags import _docstrings
from btrm_core.config import check, flat, read_settings
from btrm_core.scoring import Scorer
from btrm_core.settings import RunConfig, declared
from btrm_core.training.processes.launch import SHUTDOWN_SECONDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for path in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md") if (ROOT / path).exists()]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
LAUNCHERS = ("torchrun", "accelerate", "deepspeed")


def settings_by_name():
    """The names that `--set` takes."""
    run = RunConfig()
    sections = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    return set(sections) | {
        f"{name}.{field.name}"
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for field in dataclasses.fields(section)
    }


def read(name):
    """A document as its site shows it: what it includes stands in it."""
    return re.sub(
        r'^--8<-- "(.+)"$', lambda found: (ROOT / found[1]).read_text().rstrip(), (ROOT / name).read_text(), flags=re.M
    )


def blocks(name, language):
    """The fenced blocks of a document, its lines joined where they end in a backslash."""
    found = re.findall(rf"```{language}\n(.*?)```", read(name), flags=re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands(*programs):
    for name in DOCUMENTS:
        for block in blocks(name, "(?:bash|sh)?"):
            for line in block.splitlines():
                if line.strip().startswith(tuple(f"{program} " for program in programs)):
                    yield pytest.param(line.strip(), id=f"{name}: {line.strip()[:60]}")


def parse(arguments):
    """Parse a command line of btrm without running it."""
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, name
        context = click.Context(command, parent=context)
    return command.make_context(command.name, arguments, resilient_parsing=False).params


def parse_launcher(words):
    """Parse a launcher's command line by the launcher's own parser; returns its options and what it passes on."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        assert options.module
        return options, [options.training_script, *options.training_script_args]
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        options = launch_command_parser().parse_args(words[2:])
        assert options.module
        return options, [options.training_script, *options.training_script_args]
    from deepspeed.launcher.runner import parse_args

    options = parse_args(words[1:])
    assert options.module
    return options, [options.user_script, *options.user_args]


def passed_on(words):
    """What btrm is asked to do, and the launcher's options."""
    options, rest = parse_launcher(words)
    assert rest[0] == "btrm_core"
    return options, parse(rest[1:])


@pytest.mark.parametrize("line", list(commands("btrm")))
def test_every_command_in_the_documents_parses(line):
    parse(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("line", list(commands(*LAUNCHERS)))
def test_every_launchers_command_parses(line):
    passed_on(shlex.split(line, comments=True))


def test_all_launchers_are_shown():
    shown = {shlex.split(item.values[0])[0] for item in commands(*LAUNCHERS)}
    assert shown == set(LAUNCHERS)
    with pytest.raises(click.UsageError):
        passed_on(shlex.split("torchrun --nproc-per-node 8 -m btrm_core train --familly llama3"))


def test_the_slurm_script():
    script = (ROOT / "examples/slurm.sh").read_text().replace("\\\n", " ")
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash", "or sbatch refuses it"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    given = dict(re.fullmatch(r"#SBATCH --([\w-]+)(?:=(\S+))?", x).groups() for x in lines if x.startswith("#SBATCH"))
    after = next(i for i, line in enumerate(lines[1:]) if not line.startswith("#SBATCH"))
    assert not any(line.startswith("#SBATCH") for line in lines[after + 1 :]), "Slurm does not read those"
    assert given["ntasks-per-node"] == "1", "one torchrun per machine"
    assert "requeue" in given
    seconds = int(re.fullmatch(r"B:SIGTERM@(\d+)", given["signal"]).group(1))
    (allowed,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script, re.MULTILINE)
    assert int(allowed) < seconds
    (run,) = [line for line in lines if line.startswith("srun ")]
    words = shlex.split(run.removesuffix("&"))
    options, btrm = passed_on(words[words.index("torchrun") :])
    assert options.nproc_per_node == given["gpus-per-node"]
    assert (btrm["resume"], int(btrm["save_every"])) == ("auto", 500)


def stand_ins(directory, srun):
    """Slurm's programs, as far as the script calls them; `srun` is the body of that one."""
    for name, body in {"scontrol": 'echo "scontrol $*" >> calls; echo host1', "srun": srun}.items():
        (directory / name).write_text(f"#!/bin/bash\n{body}\n")
        (directory / name).chmod(0o755)


@pytest.mark.parametrize("stopped", [True, False])
def test_the_slurm_script_passes_the_signal_on_and_queues_the_job_again(tmp_path, stopped):
    """Its shell is told to stop, as `--signal=B:` does; or the run ends by itself."""
    waits = (
        'trap "echo told >> calls; sleep 0.2; echo saved >> calls; exit 1" TERM; echo up; while :; do sleep 0.05; done'
    )
    stand_ins(tmp_path, waits if stopped else "echo up; exit 0")
    (tmp_path / "job").write_text((ROOT / "examples/slurm.sh").read_text())
    variables = {"SLURM_JOB_NODELIST": "host[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    shell = subprocess.Popen(
        ["/bin/bash", "job"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdout is not None
    assert shell.stdout.readline() == "up\n"
    if stopped:
        shell.terminate()
    code = shell.wait(120)
    shell.stdout.close()
    calls = (tmp_path / "calls").read_text().splitlines()
    requeued = ["told", "saved", "scontrol requeue 7"] if stopped else []
    assert calls == ["scontrol show hostnames host[1-2]", *requeued]
    assert (code == 0) == (not stopped)


def test_the_kubernetes_manifest():
    text = (ROOT / "examples/pytorchjob.yaml").read_text()
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    nodes = sum(replica["replicas"] for replica in replicas.values())
    for replica in replicas.values():
        assert replica["restartPolicy"] in ("OnFailure", "ExitCode"), "or a stopped run does not go on"
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        allowed = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert SHUTDOWN_SECONDS <= allowed < pod["terminationGracePeriodSeconds"]
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        claims = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: claims[mount["name"]] for mount in container["volumeMounts"]}
        assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
        assert "persistentVolumeClaim" in mounted["/output"]
        words = [re.sub(r"\$\((\w+)\)", r"1", word) for word in [*container["command"], *container["args"]]]
        assert all(isinstance(word, str) for word in [*container["command"], *container["args"]])
        options, btrm = passed_on(words)
        assert (options.nnodes, options.nproc_per_node) == (str(nodes), str(gpus))
        assert str(gpus) == job["spec"]["nprocPerNode"]
        assert (options.node_rank, options.rdzv_backend) == (1, "static"), "set by the operator's RANK"
        assert btrm["output"].startswith("/output/")
        assert btrm["resume"] == "auto"
        assert btrm["save_every"]
    variables = set(re.findall(r"\$\((\w+)\)", text))
    assert variables == {"RANK", "MASTER_ADDR", "MASTER_PORT"}, "all are set by the operator"


def test_links_exist():
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http") and "OWNER" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_examples_of_toml_can_be_read(name, tmp_path):
    """A file of settings is read as `--config` reads it; a package's description is TOML."""
    for block in re.findall(r"```toml\n(.*?)```", read(name), flags=re.DOTALL):
        if "project" not in tomllib.loads(block):
            (tmp_path / "run.toml").write_text(block)
            read_settings(str(tmp_path / "run.toml"))


def shorthands():
    """Commands and settings inside a sentence; what is in capitals stands for something."""
    for name in DOCUMENTS:
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
        for code in dict.fromkeys(re.findall(r"`((?:btrm |--set )[^`]+)`", text)):
            yield pytest.param(code, id=f"{name}: {code[:60]}")


@pytest.mark.parametrize("code", list(shorthands()))
def test_commands_and_settings_inside_a_sentence_exist(code):
    words = shlex.split(code)
    if words[0] == "btrm" and not words[1].startswith("-"):
        command, context = main, click.Context(main)
        while isinstance(command, click.Group) and len(words) > 1:
            command, words = command.get_command(context, words[1]), words[1:]
            assert command is not None, f"no command {words[0]}"
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known
    for word, value in itertools.pairwise(words):
        if word == "--set" and not value.startswith("section."):
            assert value.split("=")[0] in settings_by_name(), f"no setting {value}"


def test_the_landing_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def cell(text):
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def settings_page():
    """The reference of settings, from what is declared beside each of them."""
    defaults = flat(RunConfig())
    lines = ["# Settings", "", "Generated from `btrm_core/settings.py`. Each can be given with `--config RUN.toml` or"]
    lines += [
        "`--set section.key=value`; those with a flag, by it as well. A default of `none` is filled by the family's"
    ]
    lines += ["recipe or derived.", ""]
    section = None
    for key, setting in declared().items():
        name = key.rpartition(".")[0] or "run"
        if name != section:
            section = name
            lines += ["" if lines[-1] else None, f"## {name}", "", "| setting | flag | values | default | meaning |"]
            lines += ["|---|---|---|---|---|"]
        flag = f"`--{setting.flag.name or key.rpartition('.')[2].replace('_', '-')}`" if setting.flag else ""
        kind = getattr(setting.kind, "__name__", "list of texts") if not isinstance(setting.kind, tuple) else "list"
        values = ", ".join(str(rule).rstrip(".") for rule in setting.rules) or {
            "str": "text",
            "bool": "true, false",
        }.get(kind, kind)
        value = defaults[key]
        default = "none" if value is None else json.dumps(value)
        meaning = cell(" ".join(_docstrings()[key].split()))
        lines.append(f"| `{key}` | {flag} | {cell(values)} | `{cell(default)}` | {meaning} |")
    return "\n".join(line for line in lines if line is not None) + "\n"


def architectures_page():
    """What the sequences of each architecture get; test_leakage holds each line to the computation."""
    words = {"shared": "packed, prompts shared", "padded": "padded", "one by one": "computed one by one"}
    lines = [
        "# Architectures",
        "",
        "Generated from the tiny configurations with which the tests compare every reward and",
    ]
    lines += [
        "gradient with a separate pass, on a CPU.",
        "",
        "| configuration | model type | sequences are | because |",
    ]
    lines += ["|---|---|---|---|"]
    for name, of in sorted(ARCHITECTURES.items()):
        lines.append(f"| {name} | {of.model_type} | {words[of.form]} | {cell(of.reason)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("name", "page"), [("settings", settings_page), ("architectures", architectures_page)])
def test_a_generated_page_is_current(name, page, update_golden):
    file = ROOT / "docs" / f"{name}.md"
    if update_golden:
        file.write_text(page())
    assert file.read_text() == page(), "run pytest tests/docs/test_docs.py --update-golden"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A place to stand in where OUTPUT/model is a reward model."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "OUTPUT").mkdir()
    return reward_model(folder / "OUTPUT" / "model", "llama3")


def python_blocks():
    for name in DOCUMENTS:
        if name != "CONTRIBUTING.md":  # its package is written, installed and tested as a whole
            for number, block in enumerate(blocks(name, "python"), start=1):
                yield pytest.param(block, id=f"{name}: {number}")


@pytest.mark.parametrize("code", list(python_blocks()))
def test_every_python_block_runs(code, model, monkeypatch):
    monkeypatch.chdir(model.parents[1])
    with serving(Scorer(str(model), device="cpu")) as running:
        exec(compile(code.replace("http://127.0.0.1:8080", running.url), "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.toml")), ids=lambda file: file.stem)
def test_settings_of_the_examples(file):
    settings = read_settings(str(file))
    check(settings)
    assert settings.family in FAMILIES
    assert settings.model.name
    (line,) = [line[2:] for line in file.read_text().splitlines() if line.startswith("# btrm ")]
    words = shlex.split(line)
    parse(words[1:])
    assert words[words.index("--config") + 1] == f"examples/{file.name}"
    assert set(flat_keys(tomllib.loads(file.read_text()))) <= settings_by_name()


def flat_keys(table, before=""):
    for key, value in table.items():
        yield from flat_keys(value, f"{before}{key}.") if isinstance(value, dict) else [before + key]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_grpo_example_trains(model, tmp_path):
    prompt = {"prompt": [{"role": "user", "content": "Is tea hot?"}]}
    (tmp_path / "prompts.jsonl").write_text((json.dumps(prompt) + "\n") * 4)
    words = [
        "--policy",
        f"{model}-base",
        "--tokenizer",
        str(model),
        "--reward",
        str(model),
        "--prompts",
        "prompts.jsonl",
    ]
    alone = {
        name: value for name, value in os.environ.items() if name != "LOCAL_RANK"
    }  # an earlier test's DeepSpeed sets it
    words += ["--output", "policy", "--steps", "1", "--responses", "2", "--length", "4", "--cpu"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/grpo.py"), *words],
        cwd=tmp_path,
        env={**alone, "PYTHONPATH": f"{ROOT}:{ROOT / 'plugins'}", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rewards/btrm_reward/mean" in done.stdout
    assert (tmp_path / "policy" / "model.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed")
def test_the_site_builds_in_strict_mode(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "settings" / "index.html").exists()
