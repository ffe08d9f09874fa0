"""Plugins that end the process, hang, print, or bear no fit name: one line names them, nobody else is harmed."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import processes

from btrm_core.errors import FamilyError
from btrm_core.families import HOOKS, guard, probe
from btrm_core.families.discovery import detect, discover, list_families, load
from btrm_core.families.new_family import package_files

ENDINGS = {
    "sys.exit(0)": "SystemExit: 0",
    "raise KeyboardInterrupt": "KeyboardInterrupt: KeyboardInterrupt",
    "os._exit(0)": "it tries to end the process with os._exit(0)",
    "os.abort()": "it tries to end the process with os.abort()",
    "raise GeneratorExit": "GeneratorExit: GeneratorExit",
}
# What not even a guard can catch, as `btrm families` sees it.
DEATHS = {
    "import posix; posix._exit(7)": "importing it ends the process (exit code 7)",
    "os.kill(os.getpid(), 9)": "importing it ends the process (signal 9)",
}
ARGUMENTS = {
    "claims": {"config": None},
    "setup_tokenizer": {"tokenizer": None, "config": None},
    "pad_token": {"tokenizer": None},
    "chat_template": {"tokenizer": None},
    "init_head": {"hidden_size": 8},
    "recipe": {},
}
ASKED = "import os, sys\nfrom btrm_core import hookimpl\n\n@hookimpl\ndef {hook}():\n    {ending}\n"
PLAIN = "from btrm_core import Recipe, hookimpl\n\n@hookimpl\ndef recipe():\n    return Recipe()\n"


def config(model_type):
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type)


def btrm(*arguments):
    """The command as a user calls it, from its first import on, with the plugins of this test installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "btrm_core", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_hook_that_ends_the_process_is_an_error_that_names_it(install, hook, ending):
    install(ASKED.format(hook=hook, ending=ending))
    with pytest.raises(FamilyError) as caught:
        load("foo").ask(hook, **ARGUMENTS[hook])
    assert str(caught.value) == f"family 'foo' (btrm-foo 1.0): hook {hook} failed: {ENDINGS[ending]}"


@pytest.mark.parametrize("ending", ENDINGS)
def test_so_is_an_import_and_a_function_that_fills_the_head(install, ending):
    install(f"import os, sys\n{ending}\n")
    with pytest.raises(FamilyError, match=r"^family 'foo' \(btrm-foo 1.0\) is broken: ") as caught:
        load("foo")
    assert ENDINGS[ending] in str(caught.value)
    install(ASKED.format(hook="init_head", ending=f"def fill(weight):\n        {ending}\n    return fill"), name="bar")
    with pytest.raises(FamilyError) as caught:
        load("bar").init_head(8)(None)
    where = "family 'bar' (btrm-bar 1.0): hook init_head gave a function that failed"
    assert str(caught.value) == f"{where}: {ENDINGS[ending]}"


@pytest.mark.parametrize("ending", [*ENDINGS, *DEATHS])
def test_listing_and_detection_outlive_an_import_that_ends_the_process(install, ending):
    install(f"import os, sys\n{ending}\n")
    found = {entry.name: entry for entry in list_families()}
    assert found["foo"].status == "broken"
    assert found["foo"].cause == {**ENDINGS, **DEATHS}[ending]
    assert found["llama3"].status == "ok"
    assert detect(config("gemma2")).name == "gemma2"


def test_another_familys_claims_that_exits_does_not_end_a_run(install, tmp_path):
    install(ASKED.format(hook="claims", ending="sys.exit(0)"))
    (tmp_path / "model").mkdir()
    config("mistral").save_pretrained(tmp_path / "model")
    done = processes.btrm("train", "--model", str(tmp_path / "model"), "--data", "nothing.jsonl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "holds no tokenizer" in done.stderr  # mistral was found, and the run went on


def test_a_named_family_that_exits_is_an_error_of_the_user(install):
    install(ASKED.format(hook="recipe", ending="os._exit(0)"))
    done = processes.btrm("train", "--family", "foo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "btrm: family 'foo' (btrm-foo 1.0): hook recipe failed: it tries to end the process with os._exit(0)\n"
    )


@pytest.mark.parametrize("line", ["import os, sys; sys.exit(0)", "import os; os._exit(7)", "raise KeyboardInterrupt"])
def test_the_checks_of_a_family_that_exits_say_so(install, line):
    code = package_files("foo")["btrm_foo/__init__.py"]
    install(code.replace("from __future__ import annotations\n", f"from __future__ import annotations\n{line}\n"))
    done = processes.btrm("families", "foo", "--check", "--json")
    assert done.returncode == 1
    first = json.loads(done.stdout)[0]
    assert (first["name"], first["verdict"]) == ("entry point resolves", "fail")
    assert "family 'foo' (btrm-foo 1.0) is broken: " in first["what"]


def test_what_strangers_do_while_all_are_asked_stays_with_them(install, tmp_path):
    mischief = [
        "import json, os, threading, time",
        "os.write(1, b'not json')",
        "print('nor this')",
        f"os.chdir({str(tmp_path)!r})",
        "json.dumps = None",
        "threading.Thread(target=time.sleep, args=(600,)).start()",
    ]
    install("\n".join([*mischief, PLAIN]))
    done = btrm("families", "--json")
    assert done.returncode == 0, done.stderr
    assert {entry["name"]: entry["status"] for entry in json.loads(done.stdout)}["foo"] == "ok"


def test_an_import_that_hangs_is_broken_after_a_while(install, monkeypatch):
    monkeypatch.setattr(probe, "LIMIT_SECONDS", 3.0)
    install("import time; time.sleep(600)")
    install(ASKED.format(hook="recipe", ending="import time; time.sleep(600)"), name="bar")
    before = time.monotonic()
    found = {entry.name: entry.cause for entry in list_families()}
    assert found["foo"] == "importing it takes longer than 3 seconds"
    assert found["bar"] == "its hook recipe takes longer than 3 seconds"
    assert time.monotonic() - before < 60


def test_a_slow_import_says_who_is_waited_for(install, monkeypatch, capfd):
    monkeypatch.setattr(guard, "SLOW_SECONDS", 0.05)
    install(f"import time; time.sleep(0.5)\n{PLAIN}")
    load("foo")
    assert capfd.readouterr().err == "btrm: still waiting for the import of family 'foo' (btrm-foo 1.0)\n"


def test_the_users_own_ctrl_c_stays_what_it_is():
    def press():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    handler = signal.getsignal(signal.SIGINT)
    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt), guard.guarded("nobody"):
        time.sleep(10)
    presser.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert os._exit.__module__ == "posix"
    signal.signal(signal.SIGINT, before)


def test_claims_may_look_at_the_config_as_transformers_gives_it(install):
    for name, tests in {
        "plain": "config.get_text_config().vocab_size == 32000, config.rope_parameters['rope_theta'] == 10000.0",
        "whole": "config.use_return_dict is True, config.to_diff_dict()['model_type'] == 'olmo'",
    }.items():
        found = f"import btrm_core\n@btrm_core.hookimpl\ndef claims(config): return all([{tests}])\n"
        install(found, name=name)
    from transformers import OlmoConfig

    with pytest.raises(FamilyError) as caught:
        detect(OlmoConfig(vocab_size=32000))
    for name in ("plain", "whole"):
        assert f"'{name}' (btrm-{name} 1.0)" in str(caught.value)


CHANGES = {
    "os.chdir('/')": "the current directory",
    "import json; json.dumps = None": "json.dumps",
    "import builtins; builtins.open = None": "builtins.open",
    "os.replace = os.rename = None": "os.rename, os.replace",
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)": "the handling of signals",
    "os.environ.update(RANK='3', HOME='/nowhere')": "the variable HOME, the variable RANK",
    "os.umask(0o777)": "the umask",
    "sys.setrecursionlimit(500)": "the recursion limit",
    "sys.stderr = None": "standard error",
    "sys.excepthook = None": "sys.excepthook",
    "sys.modules['tabnanny'] = None": "sys.modules['tabnanny']",
    "import torch; torch.set_default_dtype(torch.float64)": "torch's defaults",
    "import torch; torch.set_grad_enabled(False)": "torch's defaults",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_named_family_changes_of_the_process_is_put_back_and_said(install, capfd, change):
    import torch

    def process():
        defaults = torch.get_default_dtype(), torch.is_grad_enabled(), sys.getrecursionlimit(), sys.stderr
        functions = json.dumps, open, os.rename, os.replace, sys.excepthook, signal.getsignal(signal.SIGINT)
        return os.getcwd(), dict(os.environ), defaults, functions  # noqa: PTH109

    before = process()
    install(f"import os, sys\n{change}\n{PLAIN}")
    install(ASKED.format(hook="recipe", ending=change), name="bar")
    load("foo")
    load("bar").ask("recipe")
    assert process() == before
    foo, bar, again = capfd.readouterr().err.splitlines()
    end = f" changes {CHANGES[change]}, which is no plugin's to change; put back"
    assert foo == f"btrm: the import of family 'foo' (btrm-foo 1.0){end}"
    assert bar == again == f"btrm: family 'bar' (btrm-bar 1.0): hook recipe{end}"


def test_what_a_library_adds_to_the_environment_stays(install, monkeypatch, capfd):
    monkeypatch.delenv("A_LIBRARYS_OWN", raising=False)
    install(f"import os\nos.environ['A_LIBRARYS_OWN'] = '1'\n{PLAIN}")
    load("foo")
    assert os.environ.pop("A_LIBRARYS_OWN") == "1"
    assert capfd.readouterr().err == ""


def test_a_copy_of_the_process_that_a_plugin_makes_goes_no_further(install, tmp_path):
    install(f"import os\nos.fork()\n{PLAIN}")
    load("foo")
    with (tmp_path / "once").open("a") as file:
        file.write("x")
    assert (tmp_path / "once").read_text() == "x"


@pytest.mark.parametrize("ending", DEATHS)
def test_a_named_family_that_nobody_can_catch_is_looked_at_aside(install, ending):
    from btrm_core.families import describe
    from btrm_core.preflight.conformance import run_checks

    install(f"import os\n{ending}\n")
    said = f"family 'foo' (btrm-foo 1.0) is broken: {DEATHS[ending]}. Update, repair or uninstall btrm-foo"
    with pytest.raises(FamilyError) as caught:
        describe("foo")
    assert str(caught.value) == said
    first = run_checks("foo")[0]
    assert (first.verdict, first.what) == ("fail", said)


def test_what_nobody_foresaw_names_the_stranger_that_was_there(install, capsys, monkeypatch):
    from btrm_core import cli, families

    install("import btrm_core.families.family as core\ncore.Family.recipe = lambda self: None\n" + PLAIN)
    monkeypatch.setattr(families.Family, "recipe", families.Family.recipe)  # put back afterwards
    families.strangers_here.clear()  # those of other tests
    with pytest.raises(SystemExit) as ended:
        cli.main(["families", "foo"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith(
        "btrm: this is a bug, of btrm or of family 'foo' (btrm-foo 1.0), whose code runs in the same process; please "
        "report it with the lines above\n"
    )


# names


@pytest.mark.parametrize(
    "name", ["../../etc", "a/b", ".hidden", "dot.", "-flag", "two words", "a\x1b[31m", "x" * 65, "a\u202eb", "..", "~"]
)
def test_a_name_that_is_no_folders_name_is_refused_by_distribution(install, name):
    install("raise RuntimeError('imported')", name=name, distribution="btrm-odd")
    (entry,) = [entry for entry in list_families() if entry.distribution == "btrm-odd"]
    assert (entry.status, entry.version) == ("broken", "1.0")
    assert entry.cause.startswith("its name '")
    assert entry.cause.isprintable()
    assert entry.name.isprintable()
    assert entry in discover()
    with pytest.raises(FamilyError) as caught:
        load(name)
    assert str(caught.value).startswith("btrm-odd 1.0 is broken: its name '")
    assert str(caught.value).isprintable()
    assert detect(config("gemma")).name == "gemma"


@pytest.mark.parametrize("name", ["qwen-2.5_x", "_mine", "3b", "größe", "x" * 64, "a..b"])
def test_a_name_that_a_folder_may_have_is_taken(install, name):
    install(PLAIN, name=name, distribution="btrm-fine")
    assert load(name).origin == "btrm-fine 1.0"
    assert {entry.name: entry.status for entry in list_families()}[name] == "ok"


def test_what_strangers_write_cannot_command_a_terminal(install):
    install(f"'A \\x1b[2J family.'\n{PLAIN}")
    install("raise ValueError('\\x1b]0;title\\x07')", name="bar")
    found = {entry.name: entry for entry in list_families()}
    assert found["foo"].summary == "A \\x1b[2J family."
    assert found["bar"].cause == "ValueError: \\x1b]0;title\\x07"


def test_neither_can_what_they_answer(install):
    from btrm_core.families import describe, format_description

    install(
        "from btrm_core import Recipe, hookimpl\n@hookimpl\ndef recipe(): return Recipe(example_model='\\x1b[2J')\n"
    )
    text = format_description(describe("foo"))
    assert "example_model   \\x1b[2J" in text
    assert text.replace("\n", "").isprintable()


def test_what_strangers_write_without_end_is_cut(install):
    install(f"{'A family ' * 10**5!r}\n{PLAIN}")
    install(f"raise ValueError({'no ' * 10**5!r})", name="bar")
    found = {entry.name: entry for entry in list_families()}
    assert (found["foo"].status, len(found["foo"].summary)) == ("ok", 200)
    assert len(found["bar"].cause) < 1100


@pytest.mark.parametrize(
    "fault",
    ["def __getattr__(self, name): raise RuntimeError('odd')", "def __dir__(self): raise RuntimeError('odd')",
     "__hash__ = None\n    def __eq__(self, other): raise RuntimeError('odd')"],
)  # fmt: skip
def test_an_object_that_fails_at_being_looked_at_is_broken(install, fault):
    hook = "@hookimpl\n    def recipe(self): return None"
    install(f"from btrm_core import hookimpl\nclass Odd:\n    {fault}\n    {hook}\nodd = Odd()\n", value="btrm_foo:odd")
    cause = "it fails when its hooks are looked for: RuntimeError: odd"
    assert {entry.name: entry.cause for entry in list_families()}["foo"] == cause
    with pytest.raises(FamilyError) as caught:
        load("foo")
    assert str(caught.value) == f"family 'foo' (btrm-foo 1.0) is broken: {cause}. Update, repair or uninstall btrm-foo"


@pytest.mark.parametrize("value", ["btrm foo !!", "a-b", "-"])
def test_an_entry_point_that_names_nothing_says_so(install, value):
    install(PLAIN, value=value)
    with pytest.raises(
        FamilyError, match=r"is broken: its entry point names '.*'; expected a module, or MODULE:INSTANCE"
    ):
        load("foo")


# metadata that cannot be read


def test_entry_points_that_are_no_text_are_said_of_their_package_alone(install):
    install("", name="foo", files={"entry_points.txt": b"[btrm.families]\nfoo = \xff\n"})
    install("", name="bar", files={"entry_points.txt": b"[console_scripts]\nbar = \xff\n"})
    importlib.invalidate_caches()
    (entry,) = [entry for entry in list_families() if entry.status == "broken"]
    assert (entry.origin, entry.cause) == ("btrm-foo 1.0", "its entry_points.txt cannot be read (it is not UTF-8)")
    assert detect(config("gemma")).name == "gemma"


def test_a_package_beside_which_torch_cannot_be_imported_is_named(install):
    install("", name="bar", files={"entry_points.txt": b"[console_scripts]\nbar = \xff\n"})
    assert btrm("families", "llama3").returncode == 0
    done = btrm("train", "--family", "llama3")
    assert done.returncode == 2
    assert done.stderr == (
        "btrm: the entry_points.txt of the installed package btrm-bar 1.0 is not UTF-8, and torch and other libraries "
        "cannot be imported beside it; repair or uninstall btrm-bar\n"
    )


def test_what_an_interrupted_pip_leaves_is_no_second_package(install):
    install(PLAIN)
    install(PLAIN, distribution="~trm-foo")
    assert load("foo").origin == "btrm-foo 1.0"
    assert [entry.status for entry in list_families() if entry.name == "foo"] == ["ok"]


def test_metadata_that_is_no_text_does_not_hide_a_family(install):
    install(PLAIN, files={"METADATA": b"Name: \xff\n"})
    assert load("foo").origin == "btrm-foo unknown"
