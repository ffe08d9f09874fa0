"""The contract: every hook is documented in full, asked first-result, and cheap to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import btrm_core
from btrm_core.errors import FamilyError
from btrm_core.families import hookspecs
from btrm_core.families.hookspecs import HOOKS, PadToken, Recipe, TinyShape, require_tokens, rope_theta, text_config

SPECS = {name: getattr(hookspecs, name) for name in HOOKS}

SIGNATURES = {
    "claims": ["config"],
    "setup_tokenizer": ["tokenizer", "config"],
    "pad_token": ["tokenizer"],
    "chat_template": ["tokenizer"],
    "init_head": ["hidden_size"],
    "recipe": [],
}


def test_hooks_lists_every_spec_and_no_other_name():
    marked = {name for name, value in vars(hookspecs).items() if hasattr(value, "btrm_spec")}
    assert set(HOOKS) == marked
    assert len(HOOKS) == len(marked)


def test_every_hook_stops_at_the_first_answer():
    assert all(spec.btrm_spec["firstresult"] for spec in SPECS.values())


def test_signatures_are_the_published_ones():
    # A change here changes the contract: it belongs in CHANGELOG.md under "Hooks".
    assert {name: list(inspect.signature(spec).parameters) for name, spec in SPECS.items()} == SIGNATURES


@pytest.mark.parametrize("name", HOOKS)
def test_docstring_has_its_sections_in_order(name):
    text = inspect.getdoc(SPECS[name])
    first, blank, *_ = text.splitlines()
    assert first.endswith("?")
    assert blank == ""
    wanted = (
        ["Asked", "Args", "Returns", "Default", "Since"]
        if SIGNATURES[name]
        else ["Asked", "Returns", "Default", "Since"]
    )
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == wanted
    assert "None" in text.split("Returns:")[1].split("Default:")[0], "says what None means"
    assert "Since: 0.1" in text


@pytest.mark.parametrize("name", [name for name in HOOKS if SIGNATURES[name]])
def test_docstring_describes_every_argument(name):
    args = inspect.getdoc(SPECS[name]).split("Args:")[1].split("Returns:")[0]
    assert re.findall(r"^    (\w+):", args, re.MULTILINE) == SIGNATURES[name]


def test_answers_are_frozen_values():
    for value in (PadToken("<pad>"), Recipe(), TinyShape("llama")):
        with pytest.raises(AttributeError):
            value.token = "x"
    assert PadToken("<pad>") == PadToken("<pad>", new=False, reason="")
    assert set(vars(Recipe()).values()) == {None, ()}


def test_package_exports_what_a_plugin_needs():
    from importlib.metadata import version

    assert btrm_core.hookimpl is hookspecs.hookimpl
    assert (btrm_core.PadToken, btrm_core.Recipe, btrm_core.TinyShape) == (PadToken, Recipe, TinyShape)
    assert btrm_core.__version__ == version("btrm")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = btrm_core.nothing


def test_importing_the_machinery_imports_neither_torch_nor_transformers():
    code = (
        "import sys, btrm_core, btrm_core.families.view, btrm_core.families.overrides\n"
        "btrm_core.families.list_families()\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'packaging'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        (SimpleNamespace(rope_theta=5e5), 5e5),
        (SimpleNamespace(rope_theta=500_000), 5e5),
        (SimpleNamespace(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), 5e5),
        (SimpleNamespace(rope_parameters={"rope_type": "default"}, rope_theta=1e4), 1e4),
        (SimpleNamespace(rope_parameters=None, rope_theta=1e4), 1e4),
        (
            SimpleNamespace(
                rope_parameters={"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
            ),
            1e6,
        ),
        (SimpleNamespace(text_config=SimpleNamespace(rope_theta=5e5)), 5e5),
        (SimpleNamespace(), None),
    ],
)
def test_rope_theta_is_found_wherever_it_is_kept(config, theta):
    assert rope_theta(config) == theta


def test_rope_theta_of_a_transformers_config():
    from transformers import LlamaConfig

    assert rope_theta(LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})) == 5e5
    assert rope_theta(LlamaConfig(rope_theta=1e5)) == 1e5


def test_text_config_is_the_nested_one_or_the_whole():
    nested = SimpleNamespace(vocab_size=7)
    plain = SimpleNamespace(vocab_size=8)
    assert text_config(SimpleNamespace(text_config=nested)) is nested
    assert text_config(plain) is plain


def test_require_tokens_names_what_is_missing():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"<s>": 0}, name_or_path="some/model")
    require_tokens(tokenizer, ["<s>"], "the format")
    with pytest.raises(FamilyError) as caught:
        require_tokens(tokenizer, ["<s>", "[INST]", "[/INST]"], "the format")
    assert str(caught.value) == (
        "the tokenizer of some/model has no [INST], [/INST], which the format needs: the checkpoint's vocabulary is "
        "not this family's. Choose the family that the checkpoint was made for, or write one"
    )
