"""One loaded family and how it is asked.

Decides the order of the chain (run settings, family, defaults) and what a plugin may look like; what an answer must be
is said in `answers`. Each family gets a plugin manager of its own, so that no other installed family can answer for it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from btrm_core.errors import BtrmError, ConfigError, FamilyError, did_you_mean, one_line
from btrm_core.families import defaults, hookspecs
from btrm_core.families.answers import difference, problem, same, state
from btrm_core.families.guard import guarded
from btrm_core.families.hookspecs import HOOKS, PROJECT, PadToken, Recipe
from btrm_core.families.overrides import Overrides

if TYPE_CHECKING:
    import torch

DEFAULT = "btrm default"


RUN_SETTINGS = "run settings"


@dataclass(frozen=True)
class Answer:
    """What a hook answered and who gave it: "run settings", "family llama3" or "btrm default"."""

    value: Any
    given_by: str


class Family:
    """A loaded family: asks the run's settings, then the plugin, then btrm's defaults.

    Attributes:
        name: the entry point's name.
        origin: distribution and version that provide it.
        plugin: the module or instance itself.
        hooks: the hooks that the plugin implements.
        warning: what is unusual about this family for this checkpoint; None if nothing is.
    """

    def __init__(self, name: str, origin: str, plugin: object, settings: object | None = None) -> None:
        self.name = name
        self.origin = origin
        self.plugin = plugin
        self.warning: str | None = None
        self._given_by = f"family {name}"
        self._manager = assemble(plugin, self._given_by, settings)
        self.hooks = tuple(
            hook
            for hook in HOOKS
            if any(impl.plugin_name == self._given_by for impl in getattr(self._manager.hook, hook).get_hookimpls())
        )

    def ask(self, hook: str, **arguments: Any) -> Answer:
        """Put one question; the first answer that is not None wins.

        pluggy's own call would give the answer without saying whose it is, so its list of implementations is walked
        here, most recently registered first as pluggy does.

        Args:
            hook: the hook's name.
            **arguments: what the hook takes, by name.

        Raises:
            FamilyError: the implementation raises, or answers with the wrong type; family, origin and hook are named.
        """
        if hook not in HOOKS:
            raise FamilyError(f"unknown hook '{hook}'.{did_you_mean(hook, HOOKS)} Hooks: {', '.join(HOOKS)}")
        for impl in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            wanted = {name: arguments[name] for name in (*impl.argnames, *impl.kwargnames) if name in arguments}
            own = impl.plugin_name == self._given_by
            value = self._asked(hook, impl.function, wanted) if own else impl.function(**wanted)
            if value is not None:
                return Answer(value, impl.plugin_name)
        return Answer(None, DEFAULT)

    def _asked(self, hook: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The plugin's answer, checked; whatever it was not given to change is as before."""
        tokenizer = arguments.get("tokenizer") if hook != "setup_tokenizer" else None

        def ask() -> Any:
            given = {k: _copied(v) if k == "config" else v for k, v in arguments.items()}
            before = state(tokenizer)
            value = self._guarded(hook, "failed", lambda: function(**given))
            if value is not None and (wrong := problem(hook, value)):
                raise FamilyError(f"{self._where(hook)}{wrong}")
            if state(tokenizer) != before:
                raise FamilyError(
                    f"{self._where(hook)} changes the tokenizer, which it is given to look at: change it in "
                    "setup_tokenizer"
                )
            return value

        value = ask()
        # A tokenizer costs seconds to copy: processes compare what it encodes. A head is compared when it is drawn.
        if hook not in ("setup_tokenizer", "init_head") and not same(value, again := ask()):
            first, second = difference(value, again)
            raise FamilyError(
                f"{self._where(hook)} answers differently when asked a second time: {first} and {second}; expected the "
                "same, as every process of a run asks for itself"
            )
        return value

    def claims(self, config: Any) -> bool:
        """Whether the family says that a checkpoint with this config is its own.

        Args:
            config: the checkpoint's transformers config.
        """
        return self.ask("claims", config=config).value is True

    def setup_tokenizer(self, tokenizer: Any, config: Any) -> Any:
        """The tokenizer to encode with.

        Args:
            tokenizer: of the checkpoint.
            config: the checkpoint's transformers config.
        """
        return self.ask("setup_tokenizer", tokenizer=tokenizer, config=config).value

    def pad_token(self, tokenizer: Any) -> PadToken:
        """The pad policy, checked against the tokenizer; see `pad_answer`.

        Args:
            tokenizer: of the checkpoint.
        """
        return self.pad_answer(tokenizer).value  # type: ignore[no-any-return]

    def pad_answer(self, tokenizer: Any) -> Answer:
        """The pad policy and who gave it.

        Args:
            tokenizer: of the checkpoint.

        Raises:
            FamilyError: a family's token is EOS or BOS, or `new` contradicts the vocabulary.
            ConfigError: the same for `tokenizer.pad_token`.
        """
        answer = self.ask("pad_token", tokenizer=tokenizer)
        pad: PadToken = answer.value
        kind: type[BtrmError]
        if answer.given_by == RUN_SETTINGS:
            who, kind = f"tokenizer.pad_token {pad.token!r}", ConfigError
        else:
            who, kind = f"{self._where('pad_token')} answered with {pad.token!r}, which", FamilyError
        for role, token in (("end-of-sequence", tokenizer.eos_token), ("beginning-of-sequence", tokenizer.bos_token)):
            if pad.token == token:
                raise kind(
                    f"{who} is the tokenizer's {role} token; padding with it would move the position at which the "
                    "reward is read. Name a token that data never holds, or leave tokenizer.pad_token unset"
                )
        if pad.new == (pad.token in tokenizer.get_vocab()):
            state = (
                "is in the vocabulary already: drop new=True" if pad.new else "is not in the vocabulary: set new=True"
            )
            raise kind(f"{who} {state}")
        return answer

    def chat_template(self, tokenizer: Any) -> str:
        """The Jinja source of the chat template; see `template_answer`.

        Args:
            tokenizer: of the checkpoint.
        """
        return self.template_answer(tokenizer).value  # type: ignore[no-any-return]

    def template_answer(self, tokenizer: Any) -> Answer:
        """The Jinja source of the chat template and who gave it.

        Args:
            tokenizer: of the checkpoint.

        Raises:
            FamilyError: neither the family nor the checkpoint has one.
        """
        answer = self.ask("chat_template", tokenizer=tokenizer)
        if answer.value is None:
            raise FamilyError(
                f"there is no chat template: family '{self.name}' ({self.origin}) gives none and neither does the "
                "checkpoint's tokenizer. Set tokenizer.chat_template to a Jinja file"
            )
        return answer

    def init_head(self, hidden_size: int) -> Callable[[torch.Tensor], None]:
        """The function that fills the (1, hidden_size) head in place; what it raises names the family too.

        Args:
            hidden_size: H, the width of the model's last hidden state.
        """
        answer = self.ask("init_head", hidden_size=hidden_size)

        def fill(weight_1H: torch.Tensor) -> None:
            self._guarded("init_head", "gave a function that failed", lambda: answer.value(weight_1H))

        return fill if answer.given_by != self._given_by else self._steady(fill)

    def _steady(self, fill: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        """The same function, refused if it changes the tensor's form or draws other numbers from the same seed."""

        def checked(weight_1H: torch.Tensor) -> None:
            import torch

            start = torch.get_rng_state()
            form = getattr(weight_1H, "shape", ()), getattr(weight_1H, "dtype", None)
            fill(weight_1H)
            torch.set_rng_state(start)
            fill(other_1H := torch.full(form[0], torch.nan, dtype=form[1]))
            for found in (weight_1H, other_1H):
                if (found.shape, found.dtype) != form:
                    raise FamilyError(
                        f"{self._where('init_head')} gave a function that makes {tuple(found.shape)} of {found.dtype}; "
                        f"expected one that fills {tuple(form[0])} of {form[1]} in place"
                    )
            if not torch.equal(weight_1H.nan_to_num(), other_1H.nan_to_num()):
                raise FamilyError(
                    f"{self._where('init_head')}: the head differs between two draws with the same seed; expected "
                    "draws from torch's global generator alone, so that all processes agree"
                )

        return checked

    def drawn_head(self, hidden_size: int, draws: int = 1, seed: int = 0) -> torch.Tensor:
        """Heads as the family draws them, on tensors that were NaN; torch's generator is left as it was.

        Args:
            hidden_size: H, the width of a head.
            draws: N, how many heads, one after the other.
            seed: of the first.

        Returns:
            Values [N, H] in float32.

        Raises:
            FamilyError: the initialiser fails.
        """
        import torch

        fill, heads_NH = self.init_head(hidden_size), torch.full((draws, hidden_size), torch.nan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for index in range(draws):
                fill(heads_NH[index : index + 1])
        return heads_NH

    def recipe(self) -> Recipe:
        """The family's recommendations; what it leaves open is filled from btrm's defaults."""
        answer: Recipe = self.ask("recipe").value
        given = {f.name: getattr(answer, f.name) for f in dataclasses.fields(Recipe)}
        return dataclasses.replace(
            defaults.RECIPE, **{name: value for name, value in given.items() if value is not None}
        )

    def _guarded(self, hook: str, failed: str, call: Callable[[], Any]) -> Any:
        """Run the plugin's code; whatever goes wrong in it names family, origin and hook."""
        try:
            with guarded(self._where(hook)):
                return call()
        except Exception as error:
            raise FamilyError(f"{self._where(hook)} {failed}: {one_line(error)}") from error

    def _where(self, hook: str) -> str:
        return f"family '{self.name}' ({self.origin}): hook {hook}"


def _copied(config: Any) -> Any:
    """A config that a hook may do with as it likes; one that cannot be copied is given as it is."""
    try:
        return copy.deepcopy(config)
    except Exception:
        return config


def assemble(plugin: object, name: str, settings: object | None = None) -> pluggy.PluginManager:
    """A fresh manager with defaults, family and run settings in this order (the last one is asked first).

    Args:
        plugin: the family.
        name: the family's name.
        settings: the run's own answers to hooks; None for none.

    Raises:
        FamilyError: the plugin has hooks that btrm does not know, or takes arguments that it does not give.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(defaults, DEFAULT)
    try:
        manager.register(plugin, name)
    except pluggy.PluginValidationError as error:
        raise FamilyError(" ".join(str(error).splitlines())) from error
    for hook, caller in vars(manager.hook).items():
        for impl in caller.get_hookimpls() if isinstance(caller, pluggy.HookCaller) else ():
            if not caller.has_spec() and not impl.optionalhook:
                raise FamilyError(f"it implements '{hook}', which is no hook.{did_you_mean(hook, HOOKS)}")
            if impl.tryfirst or impl.trylast or impl.wrapper or impl.hookwrapper:
                raise FamilyError(
                    f"its hook {hook} asks for a place in the order or wraps others; a family only answers"
                )
    manager.check_pending()
    for hook in HOOKS:
        if hasattr(plugin, hook) and manager.parse_hookimpl_opts(plugin, hook) is None:
            raise FamilyError(f"'{hook}' has the name of a hook but no @hookimpl, so it would never be asked")
    if not any(impl.plugin is plugin for hook in HOOKS for impl in getattr(manager.hook, hook).get_hookimpls()):
        raise FamilyError("it implements no hook: mark its functions with @hookimpl")
    if settings is not None:
        manager.register(Overrides(settings), RUN_SETTINGS)
    return manager
