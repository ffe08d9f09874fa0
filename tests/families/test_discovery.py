"""Finding, loading, isolating and choosing families; the plugins here are laid out on disk as pip installs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

import btrm_core
from btrm_core.errors import CheckpointError, ConfigError, FamilyError
from btrm_core.families import view
from btrm_core.families.discovery import detect, discover, list_families, load, require_claim
from btrm_core.families.family import Family
from btrm_core.families.hookspecs import HOOKS, PadToken, Recipe, TinyShape
from btrm_core.model.toy import toy_tokenizer

BUILT_IN = ["checkpoint", "gemma", "gemma2", "gemma3", "llama3", "mistral", "qwen3"]
LISTED = ", ".join(BUILT_IN)
TAKES_ANY = "; or try --family checkpoint, which takes any that passes its checks"
FORCE = "; --force-family uses it nevertheless"
GOOD = """
    '''Foo: a family for tests.

    More about it.
    '''
    from btrm_core import PadToken, Recipe, hookimpl

    @hookimpl
    def claims(config):
        return config.model_type == "foo"

    @hookimpl
    def recipe():
        return Recipe(learning_rate=1e-4)
"""


LISTING_MODULES = 400


def entry(name):
    found = [e for e in list_families() if e.name == name]
    assert len(found) == 1
    return found[0]


def broken(name="foo"):
    """The cause shown in the list, after checking that naming the family fails with it and that the others work."""
    found = entry(name)
    assert found.status == "broken"
    assert found.summary == ""
    assert "\n" not in found.cause
    with pytest.raises(FamilyError) as caught:
        load(name)
    assert str(caught.value) == (
        f"family '{name}' ({found.origin}) is broken: {found.cause}. Update, repair or uninstall {found.distribution}"
    )
    assert [e.name for e in list_families() if e.status == "ok"] == BUILT_IN
    assert load("llama3").recipe().learning_rate == 2e-6
    return found.cause, caught.value.__cause__


def config(model_type="foo", **values):
    return SimpleNamespace(model_type=model_type, **{"architectures": None, "vocab_size": 100, **values})


# finding


def test_discover_reads_metadata_only(install):
    install("raise SystemExit('must not be imported')")
    found = {e.name: e for e in discover()}
    assert sorted(found) == sorted([*BUILT_IN, "foo"])
    assert found["foo"].origin == "btrm-foo 1.0"
    assert found["foo"].value == "btrm_foo"
    assert found["llama3"].distribution == "btrm"


def test_list_families_gives_origin_status_and_summary(install):
    install(GOOD)
    assert [e.name for e in list_families()] == sorted([*BUILT_IN, "foo"])
    found = entry("foo")
    assert (found.status, found.cause, found.summary) == ("ok", None, "Foo: a family for tests.")
    assert all(e.status == "ok" and e.summary.endswith(".") for e in list_families())


def test_an_uninstalled_family_vanishes(install, tmp_path, monkeypatch):
    install(GOOD)
    assert load("foo").origin == "btrm-foo 1.0"
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    with pytest.raises(FamilyError, match="unknown family 'foo'"):
        load("foo")


def test_listing_loads_little(install):
    """What makes `btrm families` quick is what it does not load; seconds would measure the machine."""
    install(GOOD)
    code = (
        "import sys; before = set(sys.modules)\n"
        "from btrm_core import families as f; print(f.format_families(f.list_families()))\n"
        "print(len(set(sys.modules) - before), file=sys.stderr)\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'datasets', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Foo: a family for tests." in done.stdout
    assert int(done.stderr.splitlines()[-1]) < LISTING_MODULES


def test_what_a_plugin_prints_while_it_is_imported_stays_off_stdout(install, capsys):
    install("print('hello from the plugin')\n" + textwrap.dedent(GOOD))
    assert entry("foo").status == "ok"
    assert capsys.readouterr() == ("", "")
    load("foo")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hello from the plugin" in captured.err


# naming


def test_unknown_family_is_an_error_with_a_suggestion():
    with pytest.raises(FamilyError) as caught:
        load("lama3")
    assert str(caught.value) == (f"unknown family 'lama3'. Did you mean 'llama3'? Installed: {LISTED}")
    with pytest.raises(FamilyError) as caught:
        load("zzz")
    assert str(caught.value) == f"unknown family 'zzz'. Installed: {LISTED}"


def test_an_instance_can_be_a_family(install):
    install(
        """
        from btrm_core import Recipe, hookimpl

        class Foo:
            '''A family as an object.'''

            def __init__(self, rate):
                self.rate = rate

            @hookimpl
            def recipe(self):
                return Recipe(learning_rate=self.rate)

        family = Foo(3e-5)
        """,
        value="btrm_foo:family",
    )
    assert entry("foo").summary == "A family as an object."
    assert load("foo").recipe().learning_rate == 3e-5
    assert load("foo").hooks == ("recipe",)


# isolation


def test_import_error_is_isolated(install):
    install("raise RuntimeError('first line\\nsecond line')")
    cause, original = broken()
    assert cause == "RuntimeError: first line"
    assert isinstance(original, RuntimeError)


def test_syntax_error_is_isolated(install):
    install("def broken(:\n")
    cause, original = broken()
    assert cause == "SyntaxError: invalid syntax (btrm_foo.py, line 1)"
    assert isinstance(original, SyntaxError)


def test_missing_dependency_is_isolated(install):
    install("import a_module_that_nobody_has")
    cause, original = broken()
    assert cause == "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"
    assert isinstance(original, ModuleNotFoundError)


def test_missing_attribute_is_isolated(install):
    install("", value="btrm_foo:family")
    cause, _ = broken()
    assert cause == "AttributeError: module 'btrm_foo' has no attribute 'family'"


def test_a_plugin_that_exits_is_isolated(install):
    install("import sys; sys.exit(3)")
    assert broken()[0] == "SystemExit: 3"


def test_a_class_is_refused(install):
    install(
        "from btrm_core import hookimpl\nclass Foo:\n    @hookimpl\n    def recipe(self): ...\n", value="btrm_foo:Foo"
    )
    assert broken()[0] == "btrm_foo:Foo is a class; the entry point must name a module or an instance"


def test_one_name_from_two_distributions_is_refused_and_both_are_named(install):
    install(GOOD)
    install(GOOD, distribution="btrm-bar", version="2.0")
    found = [e for e in list_families() if e.name == "foo"]
    cause = "its name is offered by btrm-bar 2.0 and by btrm-foo 1.0"
    assert [(e.status, e.cause) for e in found] == [("broken", cause)] * 2
    with pytest.raises(FamilyError, match=r"is broken: its name is offered by btrm-bar 2.0 and by btrm-foo 1.0"):
        load("foo")
    assert [e.name for e in list_families() if e.status == "ok"] == BUILT_IN


def test_a_built_in_name_can_be_taken_from_nobody(install):
    install(GOOD, name="llama3", distribution="btrm-better-llama")
    with pytest.raises(FamilyError, match=r"offered by btrm 0.*and by btrm-better-llama 1.0"):
        load("llama3")
    assert load("gemma").name == "gemma"


def test_a_misspelt_hook_is_refused_with_a_suggestion(install):
    install("from btrm_core import hookimpl\n@hookimpl\ndef pad_tokn(tokenizer): ...\n")
    assert broken()[0] == "it implements 'pad_tokn', which is no hook. Did you mean 'pad_token'?"


def test_a_hook_of_a_later_btrm_may_be_marked_optional(install):
    install(textwrap.dedent(GOOD) + "\n@hookimpl(optionalhook=True)\ndef not_yet(x): ...\n")
    assert load("foo").recipe().learning_rate == 1e-4


def test_an_unknown_argument_is_refused(install):
    install("from btrm_core import hookimpl\n@hookimpl\ndef pad_token(tok): ...\n")
    cause, _ = broken()
    assert "for hook 'pad_token'" in cause
    assert "Argument(s) {'tok'} are declared in the hookimpl but can not be found in the hookspec" in cause


def test_an_undecorated_function_with_the_name_of_a_hook_is_refused(install):
    install(textwrap.dedent(GOOD) + "\ndef chat_template(tokenizer): return 'x'\n")
    assert broken()[0] == "'chat_template' has the name of a hook but no @hookimpl, so it would never be asked"


def test_a_plugin_without_hooks_is_refused(install):
    install("x = 1")
    assert broken()[0] == "it implements no hook: mark its functions with @hookimpl"


@pytest.mark.parametrize("option", ["tryfirst=True", "trylast=True", "wrapper=True"])
def test_a_family_cannot_jump_the_queue(install, option):
    install(f"from btrm_core import hookimpl\n@hookimpl({option})\ndef recipe():\n    yield\n")
    assert broken()[0] == "its hook recipe asks for a place in the order or wraps others; a family only answers"


def test_an_incompatible_btrm_is_refused_before_import(install):
    install("raise RuntimeError('imported')", requires=["torch", "btrm>=99", "not a requirement !"])
    assert broken()[0] == f"it needs btrm>=99, but btrm {btrm_core.__version__} is installed"


@pytest.mark.parametrize("requirement", ["btrm>=0.1", "btrm", "btrm>=99; extra == 'dev'", "btrm-other>=99"])
def test_a_compatible_btrm_is_accepted(install, requirement):
    install(GOOD, requires=[requirement])
    assert entry("foo").status == "ok"


# asking

TOKENIZER = toy_tokenizer(
    TinyShape("x", special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, control_tokens=("<pad>",)), [], 300
)
ARGUMENTS = {
    "claims": {"config": config()},
    "setup_tokenizer": {"tokenizer": TOKENIZER, "config": config()},
    "pad_token": {"tokenizer": TOKENIZER},
    "chat_template": {"tokenizer": TOKENIZER},
    "init_head": {"hidden_size": 8},
    "recipe": {},
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_is_named_with_its_family_and_origin(install, hook):
    install(f"from btrm_core import hookimpl\n@hookimpl\ndef {hook}():\n    raise ValueError('no idea')\n")
    with pytest.raises(FamilyError) as caught:
        load("foo").ask(hook, **ARGUMENTS[hook])
    assert str(caught.value) == f"family 'foo' (btrm-foo 1.0): hook {hook} failed: ValueError: no idea"
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        ("claims", "True, False or None"),
        ("setup_tokenizer", "a tokenizer"),
        ("pad_token", "a PadToken"),
        ("chat_template", "a template that is not empty"),
        ("init_head", "a function of one tensor"),
        ("recipe", "a Recipe"),
    ],
)
def test_an_answer_of_the_wrong_type_is_refused(install, hook, expected):
    install(f"from btrm_core import hookimpl\n@hookimpl\ndef {hook}(): return 17\n")
    with pytest.raises(FamilyError) as caught:
        load("foo").ask(hook, **ARGUMENTS[hook])
    assert str(caught.value) == f"family 'foo' (btrm-foo 1.0): hook {hook} answered with 17 (int); expected {expected}"


@pytest.mark.parametrize("hook", HOOKS)
def test_none_is_no_opinion_and_the_default_answers(install, hook):
    install(f"from btrm_core import hookimpl\n@hookimpl\ndef {hook}(): return None\n")
    family = load("foo")
    assert family.hooks == (hook,)
    assert family.ask(hook, **ARGUMENTS[hook]).given_by == "btrm default"


def test_no_other_installed_family_answers(install):
    install(GOOD)
    install(
        "from btrm_core import PadToken, hookimpl\n@hookimpl\ndef pad_token(): return PadToken('</s>')\n", name="bar"
    )
    answer = load("foo").pad_answer(TOKENIZER)
    assert (answer.value.token, answer.given_by) == ("<pad>", "btrm default")


def test_asking_for_an_unknown_hook_is_an_error():
    with pytest.raises(FamilyError) as caught:
        load("llama3").ask("pad_tokn")
    assert str(caught.value) == f"unknown hook 'pad_tokn'. Did you mean 'pad_token'? Hooks: {', '.join(HOOKS)}"


def test_an_implementation_may_take_fewer_arguments_or_one_with_a_default(install):
    install(
        """
        from btrm_core import PadToken, hookimpl

        @hookimpl
        def setup_tokenizer(tokenizer):
            return tokenizer

        @hookimpl
        def pad_token(tokenizer=None):
            return PadToken("<pad>", reason="given a tokenizer" if tokenizer is not None else "given none")
        """
    )
    family = load("foo")
    assert family.setup_tokenizer(TOKENIZER, config()) is TOKENIZER
    assert family.pad_token(TOKENIZER) == PadToken("<pad>", reason="given a tokenizer")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("'</s>'", "hook pad_token answered with '</s>', which is the tokenizer's end-of-sequence token"),
        ("'<s>'", "hook pad_token answered with '<s>', which is the tokenizer's beginning-of-sequence token"),
        ("'<nope>'", "hook pad_token answered with '<nope>', which is not in the vocabulary: set new=True"),
        (
            "'<pad>', new=True",
            "hook pad_token answered with '<pad>', which is in the vocabulary already: drop new=True",
        ),
    ],
)
def test_a_pad_token_that_cannot_be_one_is_refused(install, answer, message):
    install(f"from btrm_core import PadToken, hookimpl\n@hookimpl\ndef pad_token(): return PadToken({answer})\n")
    with pytest.raises(FamilyError) as caught:
        load("foo").pad_token(TOKENIZER)
    assert str(caught.value).startswith(f"family 'foo' (btrm-foo 1.0): {message}")


def test_no_chat_template_anywhere_is_an_error(install):
    install(GOOD)
    with pytest.raises(FamilyError) as caught:
        load("foo").chat_template(TOKENIZER)
    assert str(caught.value) == (
        "there is no chat template: family 'foo' (btrm-foo 1.0) gives none and neither does the checkpoint's "
        "tokenizer. Set tokenizer.chat_template to a Jinja file"
    )


def test_what_a_familys_initialiser_raises_names_the_family(install):
    install(
        """
        from btrm_core import hookimpl

        @hookimpl
        def init_head(hidden_size):
            return lambda weight: weight / "x"
        """
    )
    fill = load("foo").init_head(8)
    with pytest.raises(
        FamilyError, match=r"^family 'foo' \(btrm-foo 1.0\): hook init_head gave a function that failed: "
    ):
        fill(1.0)


def test_recipe_is_filled_from_the_defaults(install):
    install(GOOD)
    assert load("foo").recipe() == Recipe(
        learning_rate=1e-4, pairs_per_step=64, max_length=2048, epochs=1.0, warmup_ratio=0.03, weight_decay=0.001
    )
    assert load("foo").ask("recipe").given_by == "family foo"


# detecting


def test_the_only_claimant_is_detected(install):
    install(GOOD)
    family = detect(config("foo"))
    assert isinstance(family, Family)
    assert (family.name, family.origin) == ("foo", "btrm-foo 1.0")
    assert detect(config("gemma")).name == "gemma"


def test_settings_go_with_the_detected_family(install):
    install(GOOD)
    settings = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token="</s>", chat_template=None), head=SimpleNamespace(init_std=None)
    )
    with pytest.raises(ConfigError, match=r"tokenizer\.pad_token '</s>'"):
        detect(config("foo"), settings).pad_token(TOKENIZER)


def test_no_claimant_is_an_error_that_lists_the_families(install):
    install("raise RuntimeError('boom')", name="bad")
    with pytest.raises(FamilyError) as caught:
        detect(config("bar", architectures=["BarForCausalLM"], rope_theta=10000))
    assert str(caught.value) == (
        "no installed family claims this checkpoint (model_type 'bar', architectures BarForCausalLM, vocab_size 100, "
        f"rope_theta 10000). Installed: bad, {LISTED}. Broken, and so not asked: bad. "
        f"Install a family for it, or write one: see CONTRIBUTING.md{TAKES_ANY}"
    )


def test_several_claimants_are_an_error_that_names_them(install):
    install(GOOD)
    install(GOOD, name="bar", version="2.0")
    with pytest.raises(FamilyError) as caught:
        detect(config("foo"))
    assert str(caught.value) == (
        "families 'bar' (btrm-bar 2.0) and 'foo' (btrm-foo 1.0) all claim this checkpoint (model_type 'foo', "
        "vocab_size 100); name one with --family"
    )


def test_a_broken_or_failing_family_does_not_disturb_detection(install):
    install("import a_module_that_nobody_has", name="bad")
    install("from btrm_core import hookimpl\n@hookimpl\ndef claims(config): return 1 / 0\n", name="worse")
    assert detect(config("gemma2")).name == "gemma2"


def test_require_claim_says_what_the_checkpoint_is_and_whose():
    require_claim(load("gemma"), config("gemma"))
    with pytest.raises(FamilyError) as caught:
        require_claim(load("gemma"), config("gemma2", architectures=["Gemma2ForCausalLM"]))
    origin = load("gemma").origin
    assert str(caught.value) == (
        f"family 'gemma' ({origin}) is not made for this checkpoint (model_type 'gemma2', architectures "
        f"Gemma2ForCausalLM, vocab_size 100): use --family gemma2{FORCE}"
    )
    with pytest.raises(FamilyError) as caught:
        require_claim(load("gemma"), config("bar"))
    assert str(caught.value).endswith(f": no installed family claims it{TAKES_ANY}{FORCE}")


def test_a_named_family_can_be_forced_on_a_checkpoint_that_it_does_not_claim():
    family = load("gemma")
    assert require_claim(family, config("gemma"), force=True) is None
    assert require_claim(family, config("bar"), force=True) == (
        f"family 'gemma' ({family.origin}) does not claim this checkpoint (model_type 'bar', vocab_size 100) and was "
        "forced on it"
    )


def test_a_family_without_claims_takes_any_checkpoint_but_is_never_detected(install):
    install("from btrm_core import Recipe, hookimpl\n@hookimpl\ndef recipe(): return Recipe()\n")
    family = load("foo")
    assert family.claims(config("foo")) is False
    require_claim(family, config("foo"))
    with pytest.raises(FamilyError, match="no installed family claims"):
        detect(config("foo"))


# showing


def test_the_list_as_a_table(install):
    install("import a_module_that_nobody_has")
    lines = view.format_families(list_families()).splitlines()
    assert lines[0].split() == ["NAME", "ORIGIN", "STATUS", "SUMMARY"]
    broken_line = next(line for line in lines if line.startswith("foo "))
    assert broken_line.endswith("broken  ModuleNotFoundError: No module named 'a_module_that_nobody_has'")
    order = ["STATUS", *("broken" if line.startswith("foo ") else "ok" for line in lines[1:])]
    assert len({line.index(f"  {word}  ") for line, word in zip(lines, order, strict=True)}) == 1
    assert "no families are installed" in view.format_families([])


def test_a_family_without_a_model(install):
    install(GOOD)
    shown = view.describe("foo")
    assert json.loads(json.dumps(shown)) == shown
    assert shown["hooks"] == ["claims", "recipe"]
    assert (shown["name"], shown["origin"], shown["status"]) == ("foo", "btrm-foo 1.0", "ok")
    assert shown["summary"] == "Foo: a family for tests."
    assert shown["recipe"]["learning_rate"] == 1e-4
    assert shown["recipe"]["given_by"] == "family foo"
    assert "answers" not in shown
    text = view.format_description(shown)
    assert "foo  (btrm-foo 1.0, btrm_foo)" in text
    assert "  learning_rate   0.0001" in text


@pytest.fixture
def model_dir(tmp_path):
    from transformers import LlamaConfig

    tiny = load("llama3").recipe().tiny
    toy_tokenizer(tiny, ["hello"], 400).save_pretrained(tmp_path / "model")
    LlamaConfig(hidden_size=64, vocab_size=400, **tiny.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_family_with_a_model_shows_every_answer_and_who_gave_it(model_dir):
    shown = view.describe("llama3", str(model_dir))
    assert json.loads(json.dumps(shown)) == shown
    answers = shown["answers"]
    assert set(answers) == set(HOOKS) - {"recipe"}
    assert {hook: answer["given_by"] for hook, answer in answers.items()} == {
        "claims": "family llama3",
        "setup_tokenizer": "family llama3",
        "pad_token": "family llama3",
        "chat_template": "family llama3",
        "init_head": "btrm default",
    }
    assert answers["claims"]["value"] is True
    assert answers["pad_token"]["token"] == "<|reserved_special_token_0|>"
    assert answers["pad_token"]["id"] == TOKENIZER.convert_tokens_to_ids("<s>") + 3
    assert answers["chat_template"]["terminal_token"] == "<|eot_id|>"
    assert len(answers["chat_template"]["sha256"]) == 64
    assert answers["init_head"]["std"] == pytest.approx(65**-0.5, rel=0.05)
    text = view.format_description(shown)
    assert "  terminal token  <|eot_id|>  [family llama3]" in text
    assert f"answers for {model_dir}" in text


def test_the_view_shows_what_the_runs_settings_override(model_dir):
    settings = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token="<|my_pad|>", chat_template=None), head=SimpleNamespace(init_std=0.25)
    )
    answers = view.describe("llama3", str(model_dir), settings)["answers"]
    assert answers["pad_token"]["given_by"] == answers["init_head"]["given_by"] == "run settings"
    assert answers["pad_token"]["new"] is True
    assert answers["init_head"]["std"] == pytest.approx(0.25, rel=0.05)


def test_the_view_of_a_model_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match=f"cannot read the config and tokenizer of {tmp_path}"):
        view.describe("llama3", str(tmp_path))
