"""What btrm needs of a tokenizer: text that stays text, and a pad token of its own.

Decides: how a rendered conversation becomes ids (`Encoder`) and how a pad token is put in place (`install_pad`). Chat
templates are `templates`', whole conversations `format`'s.

Why an encoder of our own: a tokenizer turns the letters `<|eot_id|>` into the control token wherever they stand, so a
user who types them ends the turn. Switching this off for a whole text (`split_special_tokens`) would lose the
template's control tokens too, and encoding the parts of a text apart changes what stands around them (a word's leading
space). For the rare conversation that spells a control token, `Encoder` therefore keeps a copy of the tokenizer that
knows its control tokens under private names only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from btrm_core.errors import FamilyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from btrm_core.families import PadToken

_LAST_PRIVATE = 0x10FFFD  # private use, plane 16: the characters least likely to stand in real text


_FIRST_PRIVATE = 0x100000


_ALIAS_BASE = 0xF0000  # private use, plane 15: the second character of an alias


_MAX_COPIES = 3


_NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


# Characters that no vocabulary has: a tokenizer that cannot spell them with bytes answers with its unknown token.
_RARE = "\x01 \x7f \u0378 \u1c80 \ua8e5 \U00010348 \U0001f9ff \U000e0041 \U0010fffd"


def fast_backend(tokenizer: Any) -> Tokenizer:
    """Return the Rust tokenizer inside a transformers tokenizer.

    Args:
        tokenizer: a tokenizer of transformers.

    Raises:
        FamilyError: the tokenizer has none (a pure Python or SentencePiece one).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FamilyError(
            f"tokenizer {type(tokenizer).__name__} has no fast backend, expected one with a tokenizer.json; "
            "convert it once with transformers and save it, or return a fast tokenizer from the setup_tokenizer hook"
        )
    return backend  # type: ignore[no-any-return]


def self_contained(tokenizer: Any) -> Any:
    """Return a tokenizer that comes back from `save_pretrained` as it is: same ids, in any process, without its class.

    Tokenizer classes that build their backend anew when loaded (`LlamaTokenizer`, `GemmaTokenizer`, ...) need more than
    transformers saves: a saved Mistral v1 tokenizer loses its `legacy` flag, and with it the space before the text that
    follows a control token. The generic class loads `tokenizer.json` as it stands.

    Args:
        tokenizer: a fast transformers tokenizer; returned unchanged if it is of the generic class already. The result
            shares its backend.
    """
    from transformers import PreTrainedTokenizerFast

    backend = fast_backend(tokenizer)
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    named = {key: token for key, token in tokenizer.special_tokens_map.items() if key in _NAMED_TOKENS}
    extra = [*tokenizer.special_tokens_map.values(), *tokenizer.extra_special_tokens]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=_Uncopied(backend),
        extra_special_tokens=[token for token in dict.fromkeys(extra) if token not in named.values()],
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        **named,
    )
    plain.name_or_path = tokenizer.name_or_path
    plain.chat_template = tokenizer.chat_template
    return plain


class _Uncopied:
    """Hands a backend to transformers, which makes a deep copy of it: two seconds for a large vocabulary."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self._backend


def install_pad(tokenizer: Any, pad: PadToken, given_by: str) -> int:
    """Make `pad` the tokenizer's padding token and return the number of tokens added to the vocabulary (0 or 1).

    The token becomes a control token: text that spells it never becomes it.

    Args:
        tokenizer: a fast transformers tokenizer; changed in place.
        pad: the answer of the `pad_token` hook.
        given_by: who gave the answer, for the error.

    Raises:
        FamilyError: the token is unknown, is the end or the beginning of a sequence, or can come from ordinary text.
    """
    from transformers import AddedToken

    setting = "name another one with --set tokenizer.pad_token=TOKEN"
    backend = fast_backend(tokenizer)
    pad_id = backend.token_to_id(pad.token)
    if pad_id is None and not pad.new:
        raise FamilyError(f"pad token {pad.token!r} ({given_by}) is not in the vocabulary; {setting}")
    for role in ("eos", "bos"):
        if pad_id is not None and pad_id == getattr(tokenizer, f"{role}_token_id"):
            full = {"eos": "end-of-sequence", "bos": "beginning-of-sequence"}[role]
            raise FamilyError(
                f"pad token {pad.token!r} ({given_by}) is the {full} token, expected a distinct one; {setting}"
            )
    if pad_id is not None and pad_id not in tokenizer.added_tokens_decoder:
        raise FamilyError(
            f"pad token {pad.token!r} ({given_by}) is an ordinary piece of text in this vocabulary, "
            f"expected a control or reserved token; {setting}"
        )
    if pad_id is not None and pad_id in backend.encode(_RARE, add_special_tokens=False).ids:
        raise FamilyError(
            f"pad token {pad.token!r} ({given_by}) stands for unknown characters in this vocabulary, "
            f"so it occurs in data; {setting}"
        )
    tokenizer.add_special_tokens({"pad_token": AddedToken(pad.token, special=True, normalized=False)})
    return 1 if pad_id is None else 0


def free_pad(tokenizer: Any, template: str) -> PadToken:
    """A token to fill up with: the tokenizer's own if it is no other, else a control token that no conversation has.

    Nothing is read at padding, so any token will do that text of a conversation never becomes.

    Args:
        tokenizer: the `transformers` tokenizer of the base model.
        template: text of the chat template; a control token that it names is not taken.
    """
    from btrm_core.families import PadToken

    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, None}
    added = tokenizer.added_tokens_decoder
    reserved = [str(added[i]) for i in sorted(added, reverse=True) if added[i].special]
    names = [tokenizer.pad_token, *(name for name in reserved if name not in template)]
    free = [name for name in names if name not in taken]
    if free:
        return PadToken(free[0], reason="a token that no conversation has")
    return PadToken("<|btrm-pad|>", reason="the vocabulary has no free token", new=True)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of what decides a fast tokenizer's ids; padding and truncation settings do not count.

    Args:
        tokenizer: a tokenizer of transformers with a `backend_tokenizer`.
    """
    # Cut out of the text: parsing the JSON of a large vocabulary would take a second on every start.
    text = re.sub(
        r'"truncation":.*?"added_tokens":', "", tokenizer.backend_tokenizer.to_str(), count=1, flags=re.DOTALL
    )
    return hashlib.sha256(text.encode()).hexdigest()


def rename_tokens(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """Return a copy of a tokenizer in which some tokens have other names and the same ids.

    The old names mean nothing to the copy: text that spells one is tokenised like any other text. Every id, the
    splitting and the normalisation stay as they are. The post-processor (which would add BOS) is dropped.

    Args:
        backend: the tokenizer to copy.
        names: old name -> new name.

    Raises:
        FamilyError: the copy does not behave so.
    """
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    spec.update(post_processor=None, truncation=None, padding=None)
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    elif vocab is not None:  # Unigram: [piece, log probability], the id is the position
        model["vocab"] = [[names.get(piece, piece), *rest] for piece, *rest in vocab]
    if model.get(
        "merges"
    ):  # a merge that builds a renamed token out of letters must go: this is how text would reach it
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if a + b not in names and a not in names and b not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    copy = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    copy.encode_special_tokens = False
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # Unigram
        unknown = model["vocab"][model["unk_id"]][0]
    _check_renamed(backend, copy, names, unknown)
    return copy


def _check_renamed(backend: Tokenizer, copy: Tokenizer, names: Mapping[str, str], unknown: str | None) -> None:
    """Raise `FamilyError` unless `copy` has the ids of `backend` under the new names, and none from the old letters."""
    wrong = [old for old, new in names.items() if backend.token_to_id(old) != copy.token_to_id(new)]
    ids = {copy.token_to_id(new) for new in names.values() if new != unknown}
    spelled = copy.encode_batch_fast(list(names), add_special_tokens=False)
    wrong += [old for old, e in zip(names, spelled, strict=True) if not ids.isdisjoint(e.ids)]
    if wrong or copy.get_vocab_size() != backend.get_vocab_size():
        raise FamilyError(
            f"tokenizer cannot keep the text {wrong[0] if wrong else ''!r} apart from its control token; "
            "expected control tokens that are added tokens of tokenizer.json; fix it in the setup_tokenizer hook"
        )


class Encoder:
    """Rendered conversations to ids, where only the template can write a control token.

    Ordinary text takes the ordinary way: `encode`, one batched call, equal to the tokenizer's own ids without added
    BOS. For a conversation for which `spells_control` holds, `hide` replaces the spelled control tokens by private
    characters before the template is rendered, and `encode_hidden` puts them back as text in their surroundings.
    """

    def __init__(self, backend: Tokenizer, controls: Mapping[str, int]) -> None:
        """Build one for a backend and its control tokens (text -> id)."""
        self.backend = backend
        self.controls = dict(controls)
        longest_first = sorted(self.controls, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._copies: dict[str, Tokenizer] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the renamed copies behind when pickled for a worker process: they are large and quickly made."""
        return {**self.__dict__, "_copies": {}}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts whose control tokens are all meant as such; no BOS is added.

        Args:
            texts: rendered conversations, or parts of them.
        """
        backend = self.backend
        # transformers leaves the settings of its last call behind in the backend
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = False
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def spells_control(self, text: str) -> bool:
        """Say whether the text contains the letters of a control token.

        Args:
            text: what is looked at.
        """
        return self._pattern.search(text) is not None

    def hide(self, conversation: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Replace every spelled control token in a conversation by a private character that occurs nowhere in it.

        Args:
            conversation: messages with `role` and `content`.

        Returns:
            The conversation to render, and character -> control token for `encode_hidden`.
        """
        used = {c for message in conversation for value in message.values() for c in value}
        free = (chr(n) for n in range(_FIRST_PRIVATE, _LAST_PRIVATE) if chr(n) not in used)
        marks: dict[str, str] = {}  # control token -> character

        def mark(match: re.Match[str]) -> str:
            if match[0] not in marks:
                marks[match[0]] = next(free)
            return marks[match[0]]

        hidden = [{key: self._pattern.sub(mark, value) for key, value in m.items()} for m in conversation]
        return hidden, {character: text for text, character in marks.items()}

    def encode_hidden(self, rendered: str, marks: Mapping[str, str]) -> list[int]:
        """Return the ids of the rendering of a conversation that went through `hide`.

        Args:
            rendered: the hidden conversation as the template writes it.
            marks: character -> control token, from `hide`.
        """
        introducer = next(chr(n) for n in range(_LAST_PRIVATE, _FIRST_PRIVATE, -1) if chr(n) not in rendered)
        aliases = {text: introducer + chr(_ALIAS_BASE + n) for n, text in enumerate(self.controls)}
        text = self._pattern.sub(lambda match: aliases[match[0]], rendered)
        for character, spelled in marks.items():
            text = text.replace(character, spelled)
        if introducer not in self._copies:
            if len(self._copies) > _MAX_COPIES:  # another introducer is needed only for text with private characters
                self._copies.clear()
            self._copies[introducer] = rename_tokens(self.backend, aliases)
        return self._copies[introducer].encode(text, add_special_tokens=False).ids
