"""The conformance checks catch what they say they catch: a good family, spoilt in one place at a time."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from btrm_core.families.new_family import package_files
from btrm_core.preflight import Check
from btrm_core.preflight.conformance import runner
from btrm_core.preflight.conformance.runner import FamilyConformance, format_checks, run_checks

Install = Callable[..., None]

CODE, TEMPLATE = "btrm_foo/__init__.py", "btrm_foo/chat_template.jinja"
WRITE_TURN = "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>' }}"
READ = 'return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")'
DOCSTRING_END = "from __future__ import annotations\n"
HEAD = "@hookimpl\ndef recipe() -> Recipe:"


def head(body: str) -> tuple[str, str, str]:
    """A fault: an init_head hook whose function does this."""
    return CODE, HEAD, f"@hookimpl\ndef init_head(hidden_size):\n    import torch\n\n    return {body}\n\n\n{HEAD}"


def imports(line: str) -> tuple[str, str, str]:
    return CODE, DOCSTRING_END, f"{DOCSTRING_END}{line}\n"


# (check, fault as (file, old text, new text), a part of what the failure says is wrong)
FAULTS = [
    ("entry_point_resolves", imports("raise ImportError('gone')"), "family 'foo' (btrm-foo 0.1.0) is broken: Import"),
    ("only_known_hooks", (CODE, "def pad_token()", "def pad_tokn()"), "'pad_tokn' is marked @hookimpl but is no hook"),
    ("only_known_hooks", (CODE, "def pad_token()", "def pad_token(token)"), "hook pad_token takes 'token'"),
    ("only_known_hooks", (CODE, "def pad_token()", "def pad_token(tokenizer=1)"), "takes 'tokenizer=1'"),
    ("no_unmarked_hooks", (CODE, "@hookimpl\ndef pad_token", "def pad_token"), "function 'pad_token' has the name of"),
    ("says_what_it_is", (CODE, "ChatML turns", "ChatML turns" + " and more" * 12), "docstring begins with"),
    ("import_is_light", imports("import transformers"), "importing the plugin imports transformers"),
    ("import_is_light", imports("import socket; socket.socket().close()"), "does this: socket.__new__"),
    ("import_is_light", imports("open('/etc/passwd').close()"), "reads /etc/passwd"),
    ("import_is_light", imports("open('/dev/null', 'w').close()"), "opens /dev/null for writing"),
    ("import_is_light", imports("import os; os.system('true')"), "os.system"),
    ("answers_are_steady", (CODE, "learning_rate=5e-6", "learning_rate=hash('foo') % 97 + 1"), "in another process"),
    (
        "answers_are_steady",
        (CODE, READ, "import time; return str(time.perf_counter())"),
        "hook chat_template answers differently when asked a second time",
    ),
    (
        "answers_are_steady",
        (CODE, READ, "return {}"),
        "hook chat_template answered with {} (dict); expected a template",
    ),
    ("answers_go_together", (TEMPLATE, "{{- bos_token }}", "{{- bos_token ~ bos_token }}"), "writes the BOS token"),
    ("pad_token_is_safe", (CODE, "PadToken(PAD,", "PadToken('<|im_end|>',"), "pad token '<|im_end|>' is the EOS token"),
    ("pad_token_is_safe", (CODE, "PadToken(PAD,", "PadToken(BOS,"), "pad token '<s>' is the BOS token"),
    ("pad_token_is_safe", (CODE, "PadToken(PAD,", "PadToken('<nil>',"), "pad token '<nil>' is not in the vocabulary"),
    (
        "pad_token_is_safe",
        (CODE, "PadToken(PAD,", "PadToken('<|im_start|>',"),
        "'<|im_start|>' occurs in a conversation",
    ),
    ("template_compiles", (TEMPLATE, "{%- endfor %}", ""), "the template fails on the roles (user, assistant)"),
    ("exactly_one_bos", (TEMPLATE, "{{- bos_token }}", "{{- bos_token ~ bos_token }}"), "BOS '<s>' occurs 2 times"),
    ("exactly_one_bos", (TEMPLATE, "{{- bos_token }}", ""), "BOS '<s>' occurs 0 times"),
    (
        "system_message_is_kept",
        (TEMPLATE, WRITE_TURN, "{% if message['role'] != 'system' %}" + WRITE_TURN + "{% endif %}"),
        "the system message occurs 0 times in a conversation of 3 messages that ends with the assistant's",
    ),
    (
        "content_is_verbatim",
        (TEMPLATE, "message['content']", "message['content'].split('</think>')[-1]"),
        "the assistant message '<think>",
    ),
    ("terminal_token_is_fixed", (TEMPLATE, "<|im_end|>' }}", "<|im_end|>\\n' }}"), "conversations end in '\\n', which"),
    (
        "terminal_token_is_fixed",
        (TEMPLATE, "'<|im_end|>' }}", "('<|im_end|>' if messages | length < 4 else eos_token ~ bos_token) }}"),
        "conversations end in different tokens: '<s>', '<|im_end|>'",
    ),
    (
        "prompt_begins_the_conversation",
        (TEMPLATE, "<|im_start|>assistant\\n", "<|im_start|>model\\n"),
        "begin the whole conversation",
    ),
    (
        "rendering_is_date_free",
        (TEMPLATE, "{{- bos_token }}", "{{- bos_token }}{% if date_string is defined %}{{ date_string }}{% endif %}"),
        "the template writes the date",
    ),
    (
        "rendering_is_date_free",
        (TEMPLATE, "{{- bos_token }}", "{{- bos_token ~ strftime_now('%d %b %Y') }}"),
        "the template writes the date",
    ),
    (
        "unknown_role_is_refused",
        (TEMPLATE, "not in ['system', 'user', 'assistant']", "== 'nobody'"),
        "a message of role 'gizmo' is rendered as",
    ),
    ("claims_its_own_only", (CODE, "and rope_theta(config) == ROPE_THETA", ""), "also claims checkpoints of 'llama3'"),
    (
        "claims_its_own_only",
        (CODE, '== "llama"', '== "lama"'),
        "does not claim its own checkpoint (model_type 'llama')",
    ),
    (
        "head_is_initialised",
        head("lambda weight_1H: weight_1H[:, 1:].zero_()"),
        "1 of the 64 values of the head are not",
    ),
    ("head_is_initialised", head("torch.nn.init.zeros_"), "the head has norm 0 at hidden size 64"),
    ("head_is_initialised", head("lambda w: w.normal_(0, 1)"), "at hidden size 64 (btrm's default has 1)"),
    ("head_is_initialised", head("lambda w: w.normal_(0, 0.1, generator=GENERATOR)"), "hook init_head gave a function"),
    (
        "head_is_initialised",
        head("lambda w, g=__import__('random').Random(): w.fill_(0.05 + g.random() / 100)"),
        "the head differs between two draws with the same seed",
    ),
    ("recipe_is_sane", (CODE, "learning_rate=5e-6", "learning_rate=5"), "recipe: learning_rate is 5"),
    ("recipe_is_sane", (CODE, "max_length=4096", "max_length=4096.5"), "recipe: max_length is 4096.5"),
    ("recipe_is_sane", (CODE, "max_length=4096", "attention=('fa2',)"), "recipe: attention names 'fa2'"),
    ("tiny_model_is_built", (CODE, "tiny=TinyShape(", "tiny=None and TinyShape("), "the recipe gives no `tiny` shape"),
    ("tiny_model_is_built", (CODE, 'model_type="llama"', 'model_type="lama"'), "the tiny model cannot be built"),
    (
        "tiny_model_is_built",
        (CODE, "max_length=4096", "attention=('flash',)"),
        "the tiny model cannot be given a reward",
    ),
]
# What an earlier check, or btrm itself, refuses first: these can only fail through a fault in btrm or transformers.
SHIELDED = {
    "plugin_is_no_class",  # has a test of its own below
    "pad_token_survives_saving",
    "ids_survive_saving",
    "ids_equal_apply_chat_template",
    "control_tokens_in_content_stay_text",
    "training_lowers_the_loss",
    "packed_equals_separate",
    "saved_model_scores_alike",
    "pipeline_scores_alike",
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Lay the generated package out as pip leaves it, with one text of it replaced; child processes see it too."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def add(fault: tuple[str, str, str] | None = None, value: str = "btrm_foo") -> None:
        files = package_files("foo")
        if fault is not None:
            path, old, new = fault
            assert old in files[path], f"{old!r} is not in {path}"
            files[path] = files[path].replace(old, new)
        info = "btrm_foo-0.1.0.dist-info"
        files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: btrm-foo\nVersion: 0.1.0\n"
        files[f"{info}/entry_points.txt"] = f"[btrm.families]\nfoo = {value}\n"
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, encoding="utf-8")
        importlib.invalidate_caches()

    yield add
    sys.modules.pop("btrm_foo", None)


def check(name: str, **attributes: object) -> Check:
    """Run one check on family foo."""
    tested = type("Tested", (FamilyConformance,), {"family": "foo", **attributes})
    try:
        return runner._run(tested(), f"test_{name}")
    finally:
        tested.teardown_class()


@pytest.mark.parametrize(("name", "fault", "what"), FAULTS, ids=[f"{n}-{f[2][:40]!r}" for n, f, _ in FAULTS])
def test_a_fault_is_found_and_explained(install, name, fault, what):
    install(fault)
    result = check(name)
    assert result.verdict == "fail"
    assert what in result.what
    assert result.why
    assert result.what_to_do


def test_a_class_is_refused(install):
    install(
        (CODE, HEAD, f"class Foo:\n    @hookimpl\n    def init_head(self):\n        return None\n\n\n{HEAD}"),
        "btrm_foo:Foo",
    )
    assert "is broken: btrm_foo:Foo is a class" in check("entry_point_resolves").what
    assert check("plugin_is_no_class").what == "the entry point 'btrm_foo:Foo' names a class"


def test_a_file_found_only_from_the_current_directory_is_a_fault(install, tmp_path, monkeypatch):
    install((CODE, READ, 'return Path("btrm_foo/chat_template.jinja").read_text()'))
    monkeypatch.chdir(tmp_path)
    result = check("answers_are_steady")
    assert result.verdict == "fail"
    assert result.what.startswith("the plugin fails in another process, started in another directory: ")
    assert "No such file or directory: 'btrm_foo/chat_template.jinja'" in result.what


def test_every_check_has_a_fault_or_a_shield():
    names = {name.removeprefix("test_") for name in runner._checks()}
    assert {name for name, _, _ in FAULTS} | SHIELDED == names
    assert len(names) >= 20


def test_every_check_says_what_it_proves():
    for name in runner._checks():
        text = inspect.getdoc(getattr(FamilyConformance, name)) or ""
        assert text.endswith("."), name
        assert len(text.splitlines()) == 1, name


def test_the_good_package_passes_and_what_cannot_be_checked_is_skipped(install):
    install()
    assert check("exactly_one_bos").verdict == "ok"
    assert check("recipe_is_sane").verdict == "ok"
    skipped = check("exactly_one_bos", special_tokens={"eos_token": "<|im_end|>", "pad_token": "<pad>"})
    assert skipped.verdict == "skip"
    assert skipped.what.startswith("hook setup_tokenizer fails: family 'foo' (btrm-foo 0.1.0): hook setup_tokenizer ")
    assert "has no <s>, which the Foo chat format needs" in skipped.what


def test_a_family_without_claims_is_not_asked_for_one(install):
    install((CODE, "@hookimpl\ndef claims", "def _claims"))
    result = check("claims_its_own_only")
    assert (result.verdict, result.what) == (
        "skip",
        "the family has no claims hook: it is never detected, but can be named",
    )


def test_config_values_and_tokens_can_be_given_where_the_recipe_has_no_tiny_shape(install):
    install((CODE, "tiny=TinyShape(", "tiny=None and TinyShape("))
    given = {
        "model": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
        "special_tokens": {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        "control_tokens": ("<|im_start|>",),
    }
    for name in ("tiny_model_is_built", "claims_its_own_only", "training_lowers_the_loss", "exactly_one_bos"):
        assert check(name, **given).verdict == "ok", name


def test_a_tokenizer_directory_and_a_checkpoint_can_be_given(install, tmp_path):
    from btrm_core.families.discovery import load
    from btrm_core.model.toy import build_toy

    install()
    build_toy(load("foo").recipe().tiny, tmp_path / "model", hidden_size=96, num_attention_heads=6)
    for given in ({"tokenizer": tmp_path / "model"}, {"model": tmp_path / "model"}):
        for name in ("answers_go_together", "claims_its_own_only", "training_lowers_the_loss", "pipeline_scores_alike"):
            assert check(name, **given) == Check(
                name.replace("_", " "), "ok", inspect.getdoc(getattr(FamilyConformance, f"test_{name}"))
            )


def test_checks_of_a_family_that_is_not_there():
    first, *others = run_checks("lama3")
    assert (first.verdict, first.what) == (
        "fail",
        "unknown family 'lama3'. Did you mean 'llama3'? Installed: "
        "checkpoint, gemma, gemma2, gemma3, llama3, mistral, qwen3",
    )
    assert first.what_to_do.startswith('add [project.entry-points."btrm.families"] lama3 = ')
    assert {result.verdict for result in others} == {"skip"}


def test_the_report_can_be_read():
    results = [
        Check("template compiles", "ok", "It compiles."),
        Check("exactly one bos", "fail", "BOS occurs twice", "it is wrong", "write it once"),
        Check("claims its own only", "skip", "the family has no claims hook"),
    ]
    assert format_checks(results).splitlines() == [
        "PASS  template compiles",
        "FAIL  exactly one bos: BOS occurs twice",
        "      why it matters: it is wrong",
        "      what to do: write it once",
        "SKIP  claims its own only: the family has no claims hook",
        "",
        "1 passed, 1 failed, 1 skipped",
    ]


def run_pytest(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in another process and directory, with the plugin but without those of this environment."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "btrm_core.pytest_plugin")


@pytest.mark.usefixtures("plugin")
def test_pytest_option_runs_the_checks_and_nothing_else(tmp_path):
    (tmp_path / "test_other.py").write_text("def test_other():\n    assert False\n", encoding="utf-8")
    done = run_pytest(tmp_path, "--btrm-family=llama3", "-v", "-k", "hook or other or class")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed, 26 deselected" in done.stdout
    done = run_pytest(tmp_path, "--btrm-family=llama3", "-k", "hook or other", "test_other.py")
    assert "1 failed, 2 passed" in done.stdout


@pytest.mark.usefixtures("plugin")
def test_pytest_shows_what_is_wrong_why_and_what_to_do(tmp_path):
    done = run_pytest(tmp_path, "--btrm-family=lama3", "-k", "entry_point or unmarked", "-rs")
    assert done.returncode == 1
    assert "unknown family 'lama3'. Did you mean 'llama3'?" in done.stdout
    assert "what to do: add [project.entry-points" in done.stdout
    assert "no family 'lama3' is installed" in done.stdout
    assert "1 failed, 1 skipped" in done.stdout


@pytest.mark.usefixtures("plugin")
def test_pytest_is_left_alone_without_the_option(tmp_path):
    (tmp_path / "test_other.py").write_text(
        "import sys\n\n\ndef test_other():\n    assert 'torch' not in sys.modules\n"
        "    assert 'btrm_core.testing' not in sys.modules\n",
        encoding="utf-8",
    )
    done = run_pytest(tmp_path)
    assert "1 passed" in done.stdout, done.stdout


def test_importing_the_kit_imports_no_torch():
    code = (
        "import sys, btrm_core.testing, btrm_core.pytest_plugin; print('torch' in sys.modules, 'pytest' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_command_line_reports_and_fails():
    from click.testing import CliRunner

    from btrm_core.cli import main

    done = CliRunner().invoke(main, ["families", "lama3", "--check"])
    assert done.exit_code == 1
    assert done.stdout.startswith("FAIL  entry point resolves: unknown family 'lama3'. Did you mean 'llama3'?")
    assert "0 passed, 1 failed, 28 skipped" in done.stdout
