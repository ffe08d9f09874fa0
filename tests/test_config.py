"""Settings: every key and value is checked, and text survives the way through TOML."""

import pytest

from btrm_core.config import apply, check, flat, parse_assignments, read_settings, resolve, to_toml
from btrm_core.errors import ConfigError
from btrm_core.families.hookspecs import Recipe
from btrm_core.settings import LossConfig, RunConfig, TrainConfig, declared


def fails(values, message):
    with pytest.raises(ConfigError) as caught:
        read_settings(None, values)
    assert str(caught.value) == message


def test_unknown_key_is_an_error_with_a_suggestion():
    fails(
        {"train.lerning_rate": 1},
        "unknown setting 'train.lerning_rate'. Did you mean 'train.learning_rate'? Known sections: model, tokenizer, "
        "head, data, train, loss, lora, distributed, output",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train.seed": "x"}, "train.seed = 'x': expected a whole number"),
        ({"train.seed": 1.5}, "train.seed = 1.5: expected a whole number"),
        ({"train.learning_rate": "fast"}, "train.learning_rate = 'fast': expected a number"),
        ({"train.learning_rate": 0}, "train.learning_rate = 0.0: expected a number above 0"),
        ({"train.weight_decay": -1}, "train.weight_decay = -1.0: expected 0 or more"),
        ({"output.dir": "o\udce4t"}, r"output.dir holds 'o\udce4t': expected UTF-8; rename the file or folder"),
        ({"data.strict": "perhaps"}, "data.strict = 'perhaps': expected true or false"),
        (
            {"model.attention": "flesh"},
            "model.attention = 'flesh': expected one of auto, flash, varlen, flex, sdpa, eager. Did you mean 'flash'?",
        ),
        ({"loss.label_smoothing": 0.5}, "loss.label_smoothing = 0.5: expected at least 0 and below 0.5"),
        ({"data.held_out_fraction": 1}, "data.held_out_fraction = 1.0: expected below 1"),
    ],
)
def test_bad_values_say_what_was_expected(values, message):
    fails(values, message)


def test_a_file_and_flags_and_what_wins(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('family = "llama3"\n[train]\nseed = 3\nepochs = 2\n[data]\ntrain = ["a", "b"]\n')
    config = read_settings(str(path), {"train.seed": "4"})
    assert (config.family, config.train.seed, config.train.epochs, config.data.train) == ("llama3", 4, 2.0, ("a", "b"))


def test_a_broken_file_is_one_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("family = \n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_settings(str(path))
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*: No such file or directory"):
        read_settings(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[train]\nmax_steps = [1]\n", "{path}: train.max_steps = [1]: expected a whole number"),
        (b"[trian]\nseed = 1\n", "{path}: unknown setting 'trian.seed'. Did you mean 'train.seed'? Known sections: "),
        (b"train = 5\n", "{path}: train is a section: write [train] on a line of its own, and its settings below"),
        (b"[[train]]\nseed = 5\n", "{path}: train is a section: write [train]"),
        ('family = "llama3"'.encode("utf-16"), "{path} is not UTF-8 text, as TOML must be: save it as UTF-8"),
        (b"family = 'caf\xe9'", "{path} is not UTF-8 text, as TOML must be: save it as UTF-8"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_of_that_file(tmp_path, text, message):
    path = tmp_path / "run ä.toml"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_settings(str(path), {"train.seed": 1})
    assert str(caught.value).startswith(message.format(path=path))


def test_a_file_as_editors_of_windows_write_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbffamily = "llama3"\r\n[train]\r\nseed = 3\r\n')
    config = read_settings(str(path))
    assert (config.family, config.train.seed) == ("llama3", 3)


def test_toml_round_trip(tmp_path):
    config = read_settings(None, {"train.learning_rate": "1e-5", "data.train": "a,b", "data.strict": "true"})
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config))
    assert read_settings(str(path)) == config


def test_assignments():
    assert parse_assignments(["a.b = 1", "c.d=x=y"]) == {"a.b": "1", "c.d": "x=y"}
    with pytest.raises(ConfigError, match=r"--set 'train\.seed' is not of the form section\.key=value"):
        parse_assignments(["train.seed"])


def test_a_recipe_fills_only_what_is_open():
    config = apply(RunConfig(), {"train.learning_rate": 3e-4})
    resolved = resolve(config, Recipe(learning_rate=1e-5, max_length=4096, pairs_per_step=512, epochs=1.0))
    assert resolved.train.learning_rate == 3e-4
    assert (resolved.data.max_length, resolved.train.pairs_per_step) == (4096, 512)
    assert config.data.max_length is None


def test_every_setting_is_declared_and_every_default_is_allowed():
    assert list(flat(RunConfig())) == list(declared())
    check(RunConfig())
    numbers = [s for s in declared().values() if s.kind in (int, float)]
    assert [s.key for s in numbers if not s.rules] == []


def test_settings_made_by_a_program_are_checked_as_those_of_a_file():
    with pytest.raises(ConfigError, match=r"^train\.tokens_per_batch = -1: expected a number above 0$"):
        check(RunConfig(train=TrainConfig(tokens_per_batch=-1)))
    with pytest.raises(ConfigError, match=r"^train\.seed = None: expected a whole number"):
        check(RunConfig(train=TrainConfig(seed=None)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^loss\.ranking=plackett-luce knows no loss\.margin: leave that out"):
        check(RunConfig(loss=LossConfig(ranking="plackett-luce", margin=True)))


def test_rules_between_settings_wait_until_all_are_said():
    first = apply(RunConfig(), {"lora.alpha": 8})
    check(apply(first, {"lora.rank": 4}))
    with pytest.raises(ConfigError, match="there are no adapters"):
        check(first)


def test_every_setting_is_documented():
    import ast
    import inspect

    from btrm_core import settings

    tree = ast.parse(inspect.getsource(settings))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name != "RunConfig":
            for field, doc in zip(node.body[1::2], node.body[2::2], strict=True):
                assert isinstance(field, ast.AnnAssign), (
                    f"{node.name}: a setting without a docstring before {ast.dump(field)}"
                )
                assert isinstance(doc, ast.Expr)
                assert isinstance(doc.value, ast.Constant)


def test_names_of_the_data_are_a_table_or_texts(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[data.map]\nprompt = "question"\nrole.expert = "assistant"\n')
    expected = ("prompt=question", "role.expert=assistant")
    config = read_settings(str(file))
    assert config.data.map == expected
    assert apply(RunConfig(), {"data.map": "prompt=question,role.expert=assistant"}).data.map == expected
    assert apply(RunConfig(), {"data.map": expected}).data.map == expected
    file.write_text(to_toml(config))
    assert read_settings(str(file)) == config
