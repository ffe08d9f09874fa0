"""What `btrm doctor` prints: pairs with coloured tokens and the reward position, and one line per verdict; or JSON.

Decides how it is laid out. Text of conversations is cut in the middle, and what a terminal could take for a command is
spelled out.

Colours say the same as words and signs, so nothing is lost without them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from btrm_core.chat import ChatFormat
from btrm_core.console import finite
from btrm_core.packing import Tree
from btrm_core.preflight import Check
from btrm_core.preflight.doctor.case import Case
from btrm_core.preflight.doctor.examples import Example

TEXT_HEAD, TEXT_TAIL = 100, 60
"""Characters kept at both ends of a long stretch of text."""


PIECES_HEAD, PIECES_TAIL = 9, 11
"""Stretches of text and control tokens kept at both ends of a long prompt."""


REWARD_MARK = "▲"


_NAME_WIDTH = 18


_STYLES: dict[str, dict[str, Any]] = {
    "control": {"fg": "cyan"},
    "shared": {},
    "chosen": {"fg": "green"},
    "rejected": {"fg": "red"},
    "reward": {"fg": "cyan", "bold": True, "underline": True},
    "mark": {"fg": "yellow", "bold": True},
    "note": {"dim": True},
}


_VERDICTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ok": ("ok", {"fg": "green"}),
    "warn": ("warn", {"fg": "yellow"}),
    "fail": ("FAIL", {"fg": "red", "bold": True}),
    "skip": ("skip", {"dim": True}),
}


_SUMMARY = {"fail": "failed", "warn": "to look at", "ok": "ok", "skip": "skipped"}


@dataclass(frozen=True)
class Piece:
    """A stretch of text of one kind, as it is shown."""

    text: str
    kind: str


def opening(case: Case, width: int) -> str:
    """What is looked at, and its examples.

    Args:
        case: what is looked at, from `examine`.
        width: columns of the terminal.
    """
    data = case.config.data
    sources = ", ".join(data.train)
    lines = [
        click.style(case.title, bold=True),
        f"{len(case.rows):,} pairs of {sources}, at most {data.max_length:,} tokens a conversation",
    ]
    if case.examples and case.chat is not None:
        legend = " · ".join(click.style(kind, **_STYLES[kind]) for kind in ("shared", "chosen", "rejected", "control"))
        mark = click.style(REWARD_MARK, **_STYLES["mark"])
        lines += ["", f"{legend} tokens; {mark} is where the reward is read, … is text left out here"]
    for example in case.examples:
        lines += ["", *_example_lines(example, case.chat, width)]
    return "\n".join([*lines, ""])


def verdict_line(check: Check, width: int | None) -> str:
    """One check: verdict, name, and what, why, what to do; folded to `width` unless that is None.

    Args:
        check: how it ended.
        width: columns to fold to; None folds nothing.
    """
    word, style = _VERDICTS[check.verdict]
    text = check.what
    if check.why:
        text += f": {check.why}"
    if check.what_to_do:
        text += f" → {check.what_to_do}"
    head = f"{click.style(f'{word:<4}', **style)}  {check.name:<{_NAME_WIDTH}} "
    indent = 6 + max(_NAME_WIDTH, len(check.name)) + 1
    if width is None or width < indent + 30:
        return head + text
    lines = _fold([Piece(text, "shared")], width - indent)
    return head + ("\n" + " " * indent).join("".join(piece.text for piece in line) for line in lines)


def closing(checks: Sequence[Check]) -> str:
    """How many checks ended how.

    Args:
        checks: how they ended, in their order.
    """
    parts = []
    for verdict, word in _SUMMARY.items():
        if number := sum(check.verdict == verdict for check in checks):
            parts.append(click.style(f"{number} {word}", **_VERDICTS[verdict][1]))
    return "\n" + ", ".join(parts)


def worst(checks: Iterable[Check]) -> str:
    """The verdict over all: fail, else warn, else ok.

    Args:
        checks: how they ended, in their order.
    """
    found = {check.verdict for check in checks}
    return next((verdict for verdict in ("fail", "warn") if verdict in found), "ok")


def as_json(case: Case, checks: Sequence[Check]) -> dict[str, Any]:
    """Examples and verdicts as plain values.

    Args:
        case: what is looked at, from `examine`.
        checks: how they ended, in their order.
    """
    data = case.config.data
    return {
        "verdict": worst(checks),
        "family": case.family.name if case.family is not None else None,
        "model": str(case.config.model.name),
        "finished_model": case.directory is not None,
        "data": list(data.train),
        "eval_data": list(data.eval),
        "max_length": data.max_length,
        "pairs": len(case.rows),
        "checks": [{**vars(check), "figures": finite(check.figures)} for check in checks],
        "examples": [_example_json(example, case.chat) for example in case.examples],
    }


def pieces(chat: ChatFormat, ids: Sequence[int], start: int, kind: str) -> list[Piece]:
    """The tokens from `start` on as stretches of text and control tokens, as they read in their place.

    Text is what decoding up to its end adds to decoding up to its beginning: some decoders drop the space that a
    stretch begins with when it stands alone.

    Args:
        chat: how conversations become ids.
        ids: a whole conversation.
        start: the first token to show.
        kind: of text that is no control token: shared, chosen or rejected.
    """
    tokenizer, out = chat.tokenizer, []
    decoded = len(tokenizer.decode(ids[:start])) if start else 0
    index = start
    while index < len(ids):
        if ids[index] in chat.control_ids:
            out.append(Piece(visible(str(tokenizer.convert_ids_to_tokens(ids[index]))), "control"))
            index += 1
            decoded = len(tokenizer.decode(ids[:index]))
            continue
        while index < len(ids) and ids[index] not in chat.control_ids:
            index += 1
        text = tokenizer.decode(ids[:index])
        out.append(Piece(_shortened(visible(text[decoded:])), kind))
        decoded = len(text)
    return out


def visible(text: str) -> str:
    r"""The text on one line, with everything that is not printable spelled out.

    Args:
        text: what is looked at.

    >>> visible("a\n\x1b[2J")
    'a↵\\x1b[2J'
    """
    return "".join("↵" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str) -> str:
    if len(text) <= TEXT_HEAD + TEXT_TAIL + 20:
        return text
    return f"{text[:TEXT_HEAD]} … {text[-TEXT_TAIL:]}"


def _sides(chat: ChatFormat, group: Tree) -> dict[str, list[Piece]]:
    """What is shown of a pair: the shared part and both tails, each as pieces."""
    sequences = [sequence.tolist() for sequence in group.sequences]
    shared = pieces(chat, sequences[0][: group.shared], 0, "shared")
    if len(shared) > PIECES_HEAD + PIECES_TAIL + 2:
        shared = [*shared[:PIECES_HEAD], Piece(" … ", "note"), *shared[-PIECES_TAIL:]]
    sides = {"shared": shared}
    for kind, ids in zip(("chosen", "rejected"), sequences, strict=True):
        tail = pieces(chat, ids, group.shared, kind)
        if tail:
            last = tail.pop()
            is_token = last.kind == "control"
            tail += [Piece(last.text, "reward" if is_token else kind)]
        else:
            tail.append(Piece("(nothing more)", "note"))
        sides[kind] = [*tail, Piece(REWARD_MARK, "mark")]
    return sides


def _counts(pair: Tree) -> dict[str, int]:
    """Tokens that both sides of a pair begin with, and those left of each."""
    chosen, rejected = (length - pair.shared for length in pair.lengths.tolist())
    return {"shared": pair.shared, "chosen": chosen, "rejected": rejected}


def _example_lines(example: Example, chat: ChatFormat | None, width: int) -> list[str]:
    subset = f", {example.subset}" if example.subset else ""
    title = click.style(visible(example.id), bold=True) + visible(subset)
    if example.group is None or chat is None:
        return [f"{title}: cannot be encoded ({example.error})"]
    group, lines = example.group, []
    counts = _counts(group)
    cut = ", prompt cut to the maximum length" if example.truncated else ""
    reward = "rewards at tokens {:,} and {:,}".format(*group.lengths.tolist())
    lines.append(title + click.style(f": {len(group.tokens):,} tokens, {reward}{cut}", **_STYLES["note"]))
    for kind, shown in _sides(chat, group).items():
        label = f"  {kind:<8} {counts[kind]:>5,}"
        folded = _fold(shown, width - len(label) - 1)
        for number, line in enumerate(folded):
            start = click.style(label, **_STYLES["note"]) if number == 0 else " " * len(label)
            lines.append(f"{start} " + "".join(click.style(piece.text, **_STYLES[piece.kind]) for piece in line))
    return lines


def _example_json(example: Example, chat: ChatFormat | None) -> dict[str, Any]:
    out: dict[str, Any] = {"id": example.id, "subset": example.subset, "error": example.error}
    if example.group is None or chat is None:
        return out
    group = example.group
    sides = {
        kind: "".join(piece.text for piece in shown if piece.kind != "mark")
        for kind, shown in _sides(chat, group).items()
    }
    ends = [int(sequence[-1]) for sequence in group.sequences]
    return {
        **out,
        "truncated": example.truncated,
        "tokens": _counts(group),
        "reward_positions": [length - 1 for length in group.lengths.tolist()],
        "reward_tokens": [str(chat.tokenizer.convert_ids_to_tokens(index)) for index in ends],
        "text": sides,
    }


def _fold(shown: Sequence[Piece], width: int) -> list[list[Piece]]:
    """Break pieces into lines, at spaces and between pieces; only what is longer than a line is broken inside."""
    lines: list[list[Piece]] = [[]]
    room = width
    for piece in shown:
        whole = piece.kind in ("control", "reward", "mark")
        for word in [piece.text] if whole else re.findall(r"\S+\s*|\s+", piece.text):
            if len(word.rstrip()) > room and room < width and piece.kind != "mark":
                lines.append([])
                room = width
            while len(word.rstrip()) > width:
                lines[-1].append(Piece(word[:width], piece.kind))
                lines.append([])
                word = word[width:]
            lines[-1].append(Piece(word, piece.kind))
            room -= len(word)
    return [_merged(line) for line in lines]


def _merged(line: Sequence[Piece]) -> list[Piece]:
    """The line with neighbours of one kind as one piece, without space at its end."""
    out = [Piece("".join(p.text for p in same), kind) for kind, same in itertools.groupby(line, lambda p: p.kind)]
    return [*out[:-1], Piece(out[-1].text.rstrip(), out[-1].kind)] if out else []
