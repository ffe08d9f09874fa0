"""Rows that mean no good: made from a seed, loaded and scored, with every row accounted for.

A long run by command: `python tests/support/row_fuzz.py --rows 100000 --seed 1`; it prints what failed, with the seed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from btrm_core.data import load_pairs, parse_naming
from btrm_core.errors import DataError
from btrm_core.scoring.records import read_record, what_was_added, written

TEXTS = (
    *("", " ", "q", "a", "b", "\n\nHuman: q\n\nAssistant: a", "Human:", "Assistant: x", "é\u2028", "\x00", "\ud800"),
    *("<|im_start|>user\nq<|im_end|>\n", "[INST] q [/INST] a</s>", "<s>[INST]", "<extra_id_1>User\nq", "a<|eot_id|>"),
    *(
        '[{"role": "user", "content": "q"}]',
        "[{'role': 'user'}]",
        '{"role": "user", "content": 1}',
        "[",
        '["q"]',
        "1e5",
    ),
    *(
        "USER: q ASSISTANT:",
        "### Instruction:\nq\n### Response:",
        "Human: q\nAssistant:",
        "[null]",
        "['a' 'b']",
        "[1. nan]",
    ),
    *(
        "array([{'role': 'user'}])",
        "{'a': array(",
        "[{'role': 'user', 'content': 'q'} {'role': 'bot', 'content': 'a'}]",
    ),
    *("tie", "model_a", "B", "N/A", "A>B", "x" * 3000),
)
NUMBERS = (0, 1, -1, 2.5, 1e-46, 1e308, -1e300, math.nan, math.inf, True, 10**30, 3, "4", "nan", None)
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "Bot", "judge", "", None, 7)
KEYS = (
    *("prompt", "chosen", "rejected", "messages", "conversations", "instruction", "input", "question", "history"),
    *("response", "responses", "completions", "answers", "scores", "score", "ranks", "output", "summaries", "choice"),
    *("response_a", "response_b", "winner", "response_0", "response_1", "better_response_id", "rejected_response"),
    *("human_ref_A", "human_ref_B", "labels", "winner_model_a", "winner_model_b", "winner_tie", "overall_preference"),
    *("system", "system_prompt", "margin", "weight", "probability", "id", "subset", "tools", "info", "error", "reward"),
    *("chosen_response", "preferred_output", "non_preferred_output", "accepted", "response_j", "response_k", "\ud801"),
    *("output_1", "output_2", "conv_A", "conv_B", "label", "preference", "turn", "model_a", "model_b", "candidates"),
    *("trajectory", "contents", "system_message", "replies", "text", "role", "score_a", "score_b", "Chosen", " prompt"),
    *("rewards", "truncated", "btrm_reward", "overall_score", "context", "conversation_a", "conversation_b"),
)
SHAPES: tuple[tuple[str, ...], ...] = (
    *(("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "responses", "scores")),
    *(("prompt", "response", "score"), ("prompt", "response_a", "response_b", "winner"), ("messages",)),
    *(("messages", "rejected_response"), ("instruction", "input", "output"), ("info", "summaries", "choice")),
)
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SOUND: tuple[dict[str, Any], ...] = (
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"chosen": TURNS, "rejected": [TURNS[0], {"role": "gpt", "content": "b"}]},
    {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, "2", None]},
    {"prompt": "q", "response": "a", "score": 1},
    {"prompt": "q", "response": "b", "score": 3},
    {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"},
    {"messages": TURNS, "rejected_response": "b"},
    {"prompt": "q", "chosen": ["a", "c"], "rejected": ["b"]},
    {"conv_A": TURNS, "conv_B": [TURNS[0], {"role": "gpt", "content": "b"}], "winner": "model_a", "turn": 1},
    {"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": "b"},
    {
        "prompt": {
            "role": "prompter",
            "text": "q",
            "replies": [{"role": "assistant", "text": x, "rank": x} for x in "01"],
        }
    },
)


class Maker:
    """Makes rows, most of them nearly right."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def row(self) -> Any:
        """A row, or now and then something that is none."""
        if self.draw.random() < 0.02:
            return self.value(2)
        if self.draw.random() < 0.5:
            sound = dict(self.draw.choice(SOUND))
            if self.draw.random() < 0.5:
                key = self.draw.choice((*sound, *KEYS))
                sound[key] = self.value_for(key)
            return sound
        keys = [*self.draw.choice(SHAPES), *self.draw.sample(KEYS, self.draw.choice((0, 0, 1, 2, 3)))]
        return {key: self.value_for(key) for key in keys if self.draw.random() > 0.03}

    def value_for(self, key: str) -> Any:
        """A value as the key wants it, mostly."""
        draw = self.draw
        if draw.random() < 0.15:
            return self.value(2)
        if key in ("messages", "conversations", "history") or (
            key in ("chosen", "rejected", "prompt") and draw.random() < 0.4
        ):
            return self.messages()
        if key in ("responses", "completions", "answers", "output", "summaries", "candidates"):
            return [self.response() for _ in range(draw.randint(0, 4))]
        if key in ("scores", "ranks"):
            return [draw.choice(NUMBERS) for _ in range(draw.randint(1, 4))]
        if key in ("score", "margin", "weight", "probability", "choice", "labels", "overall_preference"):
            return draw.choice(NUMBERS)
        return draw.choice(TEXTS)

    def messages(self) -> list[Any]:
        """Turns that alternate, mostly."""
        made = []
        for place in range(self.draw.randint(0, 4)):
            role = ("user", "assistant")[place % 2] if self.draw.random() < 0.85 else self.draw.choice(ROLES)
            content = self.draw.choice(TEXTS) if self.draw.random() < 0.9 else self.value(1)
            made.append({"role": role, "content": content})
            if self.draw.random() < 0.1:
                made[-1][self.draw.choice(("tool_calls", "reasoning_content", "name", "from", "value"))] = self.value(2)
        return made

    def response(self) -> Any:
        """One of several responses."""
        if self.draw.random() < 0.5:
            return self.draw.choice(TEXTS)
        return {"text": self.draw.choice(TEXTS), "score": self.draw.choice(NUMBERS), "rank": self.draw.choice(NUMBERS)}

    def value(self, depth: int) -> Any:
        """Anything that JSON can spell, and what Python's JSON spells besides."""
        kind = self.draw.randrange(4 if depth else 2)
        if kind == 0:
            return self.draw.choice(NUMBERS)
        if kind == 1:
            return self.draw.choice(TEXTS)
        if kind == 2:
            return [self.value(depth - 1) for _ in range(self.draw.randint(0, 3))]
        keys = (
            "role",
            "content",
            "from",
            "value",
            "text",
            "type",
            "score",
            "a",
            "parts",
            "messages",
            "user",
            "replies",
        )
        return {self.draw.choice(keys): self.value(depth - 1) for _ in range(self.draw.randint(0, 3))}

    def line(self) -> bytes:
        """A row as a line, now and then with a byte of it broken."""
        line = json.dumps(self.row(), ensure_ascii=self.draw.random() < 0.9).encode("utf-8", "surrogatepass")
        if self.draw.random() < 0.03 and line:
            place = self.draw.randrange(len(line))
            broken = bytes([self.draw.randrange(256)]).replace(b"\n", b"x").replace(b"\r", b"x")
            line = line[:place] + broken + line[place + 1 :]
        return line + b"\n"


def check(
    lines: list[bytes], folder: Path, scored: str = "all", ties: str = "half", names: tuple[str, ...] = ()
) -> None:
    """Load and score the lines; raises AssertionError for what is not accounted for."""
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(lines))
    number = sum(1 for line in lines if line.strip())
    try:
        data = load_pairs([str(path)], scored=scored, ties=ties, naming=parse_naming(names))  # type: ignore[arg-type]
    except DataError as error:
        told = str(error)
        if not told.startswith("no pairs") or "\n" in told:
            raise
    else:
        report = data.issues
        assert report.rows == number, f"{report.rows} rows of {number}"
        assert report.rows == report.used + report.bad + sum(report.skipped.values()), report.format()
        assert len(data) == report.pairs
        for pair in data:
            texts = [pair.id, pair.subset, pair.chosen, pair.rejected, *(m["content"] for m in pair.prompt)]
            "".join(texts).encode()
            numbers = np.array([pair.weight, pair.margin or 0.0, pair.probability], np.float32)
            assert np.isfinite(numbers).all()
            assert numbers[0] > 0
            assert 0.5 <= pair.probability <= 1
        json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False).encode()
        report.format().encode()
    for place, line in enumerate(lines, start=1):
        if line.strip():
            _score(line, place)


def _score(line: bytes, place: int) -> None:
    record = read_record(line, place)
    groups = record.groups if record.error is None else []
    answers = sum(len(answers) for _, answers in groups)
    assert record.error or answers
    rewards = tuple(0.5 for _ in range(answers))
    out = written(record, rewards, (None,) * answers, False)
    json.dumps(out, allow_nan=False)
    added = what_was_added(out)
    assert ("error" in added) == (record.error is not None)
    assert all(key in out for key in record.row)


def main() -> None:
    """Try many rows, a thousand to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for seed in range(given.seed, given.seed + math.ceil(given.rows / 1000)):
        maker = Maker(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                check([maker.line() for _ in range(1000)], Path(folder))
            except Exception:
                print(f"seed {seed}")
                raise
    print(f"{given.rows:,} rows: every one used or reported")


if __name__ == "__main__":
    main()
