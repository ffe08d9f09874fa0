from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from click.testing import CliRunner, Result
from support import processes
from support.scorer_samples import CONVERSATIONS, PROMPT, RESPONSES, base_model, reward_model, say

from btrm_core.cli import main
from btrm_core.errors import DataError
from btrm_core.scoring.bulk import score_file
from btrm_core.scoring.bulk.partial import header_file
from btrm_core.scoring.evaluate import source_rewards
from btrm_core.scoring.responses import Responses, Rewards
from btrm_core.scoring.scorer import Scorer

TOO_LONG = "word " * 400


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("scoring") / "model")


@pytest.fixture(scope="session")
def scorer(model: Path) -> Scorer:
    return Scorer(str(model), device="cpu", tokens_per_batch=16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(number: int) -> list[dict[str, Any]]:
    return [{"id": n, "prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"Not {n}, never."} for n in range(number)]


def test_lines_of_all_kinds_keep_their_order(scorer: Scorer, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl.gz", tmp_path / "new" / "out.jsonl"
    cut = [*say(TOO_LONG, "Yes."), *say("Why?", "Because.")]
    rows = [
        {"messages": CONVERSATIONS[0], "id": "ä"},
        CONVERSATIONS[2],
        {"prompt": PROMPT, "chosen": RESPONSES[0], "rejected": RESPONSES[1]},
        {"prompt": PROMPT, "responses": [RESPONSES[0], TOO_LONG]},
        {"messages": CONVERSATIONS[0][:1]},
        {"messages": cut, "broken": "\ud800"},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    source.write_bytes(gzip.compress(b"\n".join([*lines[:2], b" ", b"{oops", *lines[2:]])))
    text = score_file(scorer, str(source), str(target))

    a, b, chosen, rejected, because = scorer.rewards(
        [
            *(CONVERSATIONS[0], CONVERSATIONS[2]),
            *([*PROMPT, {"role": "assistant", "content": r}] for r in RESPONSES[:2]),
            say("Why?", "Because."),
        ]
    ).tolist()
    margin = chosen - rejected
    out = read(target)
    near = {name: pytest.approx(value, abs=1e-5) for name, value in locals().items() if isinstance(value, float)}
    assert out[0] == {"messages": CONVERSATIONS[0], "id": "ä", "reward": near["a"]}
    assert out[1] == {"messages": CONVERSATIONS[2], "reward": near["b"]}
    assert re.fullmatch(r"line 4: not JSON: .* at column 2", out[2].pop("error"))
    assert out[2] == {}
    assert out[3] == {
        **rows[2],
        "chosen_reward": near["chosen"],
        "rejected_reward": near["rejected"],
        "reward_margin": pytest.approx(margin, abs=2e-5),
    }
    assert out[4] == {
        **rows[3],
        "rewards": [near["chosen"], None],
        "error": "line 6: responses[1]: answer longer than max_length 256",
    }
    assert (out[5]["reward"], out[5]["error"]) == (
        None,
        "line 7: the last message of 'messages' is from 'user', expected 'assistant'",
    )
    assert out[6] == {**rows[5], "reward": near["because"], "truncated": True}
    assert len(out) == 7
    assert re.fullmatch(
        rf"{re.escape(str(target))}: 3 conversations, 1 pair scored in [\d.]+ s \([\d.]+ rewards/s\); 1 truncated; "
        r"3 not scored \(line 4: not JSON: .*\)",
        text,
    )
    assert sorted(path.name for path in target.parent.iterdir()) == ["out.jsonl"]


def test_speed_is_said_in_pairs_where_there_are_only_pairs(scorer: Scorer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", pairs(3))
    assert re.search(r": 3 pairs scored in .* pairs/s\)$", score_file(scorer, source, str(tmp_path / "out.jsonl")))


@pytest.fixture(scope="session")
def scored(scorer: Scorer, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """A file of 60 pairs, one of them broken, and its rewards."""
    root = tmp_path_factory.mktemp("scored")
    rows: list[Any] = [*pairs(60), 7]
    rows[10], rows[60] = rows[60], rows[10]
    source = write(root / "in.jsonl", rows)
    score_file(scorer, source, str(root / "out.jsonl"))
    return source, (root / "out.jsonl").read_bytes()


def same(found: bytes, expected: bytes) -> None:
    """Equal but for rounding: other lines share a row after an interruption."""
    left, right = ([json.loads(line) for line in lines.splitlines()] for lines in (found, expected))
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert list(one) == list(other)
        for key, value in one.items():
            assert value == (pytest.approx(other[key], abs=1e-5) if key.endswith("_reward") else other[key]) or (
                key == "reward_margin" and value == pytest.approx(other[key], abs=2e-5)
            )


@pytest.mark.parametrize("kept", [1, 150, 0.3, 0.7, -1, "all"])
def test_a_killed_call_is_continued_after_its_last_whole_line(
    scorer: Scorer, scored: tuple[str, bytes], kept: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, whole = scored
    target = tmp_path / "out.jsonl"
    header = {"format": 1, "input": _sha256(source), "model": scorer.identity}
    header_file(target).write_text(json.dumps(header))
    bytes_kept = (
        int(kept * len(whole)) if isinstance(kept, float) else len(whole) if kept == "all" else kept % len(whole)
    )
    (tmp_path / "out.jsonl.partial").write_bytes(whole[:bytes_kept])
    before = scorer.tokens.useful
    text = score_file(scorer, source, str(target))
    same(target.read_bytes(), whole)
    lines, said = whole[:bytes_kept].count(b"\n"), capsys.readouterr().err
    if lines:
        assert f"out.jsonl.partial goes on after {lines} lines" in said
        assert f"; {lines} lines were there from before" in text
    else:
        assert "out.jsonl.partial holds no whole line: starting anew" in said
    assert "60 pairs scored" in text
    assert "1 not scored (line 11: the line is 7" in text
    assert (scorer.tokens.useful == before) == (kept == "all")
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"out.jsonl"}


@pytest.mark.parametrize("change", ["input", "model", "header", "damage"])
def test_rewards_of_another_input_or_model_are_dropped(
    scorer: Scorer, scored: tuple[str, bytes], change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, whole = scored
    target = tmp_path / "out.jsonl"
    header = {"format": 1, "input": _sha256(source), "model": scorer.identity}
    if change in header:
        header[change] = "other"
    if change != "header":
        header_file(target).write_text(json.dumps(header))
    other = b'{"chosen_reward": 99}\n' if change != "damage" else b"\x00" * 80 + b"\n"
    (tmp_path / "out.jsonl.partial").write_bytes(other * 3)
    score_file(scorer, source, str(target))
    what = "holds no whole line" if change == "damage" else "is not of this input and model"
    assert f"out.jsonl.partial {what}: starting anew" in capsys.readouterr().err
    same(target.read_bytes(), whole)


def _sha256(source: str) -> str:
    import hashlib

    return hashlib.sha256(Path(source).read_bytes()).hexdigest()


class Stopping(Scorer):
    """A scorer that is interrupted after the second chunk."""

    def stream(self, chunks: Iterable[Sequence[Responses]]) -> Iterator[list[Rewards]]:
        for number, scored in enumerate(super().stream(chunks)):
            if number == 2:
                raise KeyboardInterrupt
            yield scored


def test_ctrl_c_keeps_whole_lines_and_says_so(
    model: Path, scorer: Scorer, scored: tuple[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, whole = scored
    target = tmp_path / "out.jsonl"
    stopping = Stopping(str(model), device="cpu", tokens_per_batch=16)
    with pytest.raises(KeyboardInterrupt):
        score_file(stopping, source, str(target))
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    lines = kept.count(b"\n")
    assert 0 < lines < 61
    assert kept.endswith(b"\n")
    assert not target.exists()
    assert f"out.jsonl.partial keeps {lines} lines; the same command goes on from there" in capsys.readouterr().err
    score_file(scorer, source, str(target))
    assert target.read_bytes().startswith(kept)
    same(target.read_bytes(), whole)


def test_reading_stays_close_to_scoring(scorer: Scorer) -> None:
    read_so_far = 0

    def chunks() -> Iterator[Sequence[Responses]]:
        nonlocal read_so_far
        for n in range(10):
            read_so_far = n + 1
            yield [(PROMPT, [f"{n}"])]

    for number, _ in enumerate(scorer.stream(chunks()), start=1):
        assert read_so_far <= number + 1


def test_a_truncated_archive_keeps_what_could_be_read(scorer: Scorer, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    rows = "".join(json.dumps(row) + "\n" for row in pairs(200)).encode()
    source.write_bytes(gzip.compress(rows)[:-60])
    with pytest.raises(DataError) as refused:
        score_file(scorer, str(source), str(tmp_path / "out.jsonl"))
    said = re.search(
        r"in\.jsonl\.gz cannot be read after line (\d+) \(.*\); the file may be cut short", str(refused.value)
    )
    assert said, refused.value
    assert len((tmp_path / "out.jsonl.partial").read_bytes().splitlines()) == int(said[1]) > 5
    assert not (tmp_path / "out.jsonl").exists()


def test_refused_inputs_and_outputs(scorer: Scorer, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", pairs(1)), str(tmp_path / "out.jsonl")
    wrong = write(tmp_path / "wrong.jsonl", [{"text": "a"}, {"text": "b"}])
    (tmp_path / "wide.jsonl").write_bytes("{}\n".encode("utf-16"))
    cases = {
        (str(tmp_path / "none.jsonl"), out): r"there is no file .*none\.jsonl",
        (str(tmp_path / "x.parquet"), out): r"there is no file",
        (write(tmp_path / "in.json", []), out): r"in\.json is not JSON Lines .*`btrm data convert .*in\.json -o OUT",
        (write(tmp_path / "in.jsonl.zip", []), out): r"in\.jsonl\.zip is not JSON Lines",
        (source, source): r"cannot write to .*in\.jsonl: it is the input",
        (source, str(tmp_path)): r"it is a directory",
        (source, str(tmp_path / "out.csv")): r"out.csv would be a table of another kind; expected .jsonl",
        (write(tmp_path / "empty.jsonl", []), out): r"empty\.jsonl holds no lines",
        (str(tmp_path / "wide.jsonl"), out): r"wide\.jsonl is UTF-16, expected UTF-8",
        (write(tmp_path / "plain.jsonl.gz", pairs(1)), out): r"cannot be read after line 0 .* may be cut short$",
        (wrong, out): r"none of the 2 lines of .*wrong\.jsonl could be scored; line 1: expected 'messages', ",
    }
    for (given, wanted), reason in cases.items():
        with pytest.raises(DataError, match=reason):
            score_file(scorer, given, wanted)
    assert not Path(out).exists()
    assert not list(tmp_path.glob("*.partial*"))
    score_file(scorer, source, out)
    with pytest.raises(
        DataError, match=r"out\.jsonl exists already; name another output, or replace it with --overwrite"
    ):
        score_file(scorer, source, out)
    score_file(scorer, source, out, overwrite=True)


def test_two_calls_do_not_write_one_file(scorer: Scorer, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "out.jsonl.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is writing .*out\.jsonl\.partial"):
            score_file(scorer, write(tmp_path / "in.jsonl", pairs(1)), str(tmp_path / "out.jsonl"))


def test_a_full_disk_is_one_line(scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"cannot write .*out\.jsonl: .*; the same command goes on"):
        score_file(scorer, write(tmp_path / "in.jsonl", pairs(1)), str(tmp_path / "out.jsonl"))


def btrm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_scores_and_refuses(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", pairs(2))
    result = btrm("score", model, source, "-o", tmp_path / "out.jsonl")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "2 pairs scored" in result.stderr
    expected = scorer.pair_rewards(
        [[{"role": "user", "content": f"Say {n}."}] for n in range(2)], ["0", "1"], ["Not 0, never.", "Not 1, never."]
    )
    found = [[row["chosen_reward"], row["rejected_reward"]] for row in read(tmp_path / "out.jsonl")]
    np.testing.assert_allclose(found, expected, atol=1e-5)

    again = btrm("score", model, source, "-o", tmp_path / "out.jsonl")
    assert again.exit_code == 2
    assert again.stderr.strip().endswith(
        "out.jsonl exists already; name another output, or replace it with --overwrite"
    )
    base = base_model(tmp_path / "base", "llama3")
    refused = btrm("score", base, source, "-o", tmp_path / "other.jsonl")
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"btrm: {base} holds no reward head (score.weight is missing from its weights); expected a model trained by "
        f"`btrm train`, such as one made with --model {base}\n"
    )


USER = {"role": "user", "content": "What is 2+2?"}
FOUR = {"role": "assistant", "content": "4"}
HH = "\n\nHuman: What is 2+2?\n\nAssistant:"
SAME_CONVERSATION: list[dict[str, Any]] = [
    {"messages": [USER, FOUR]},
    {"prompt": HH, "response": "4"},
    {"prompt": HH, "responses": ["4", "5"]},
    {"chosen": f"{HH} 4", "rejected": f"{HH} 5"},
    {"prompt": HH, "chosen": " 4", "rejected": "5"},
    {"instruction": "What is 2+2?", "response": "4"},
    {"question": "What is 2+2?", "responses": ["4", "5"]},
    {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
    {"messages": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4"}]},
    {"prompt": HH, "answers": [{"answer": "4", "rank": 1}, {"answer": "5", "rank": 2}]},
    {"instruction": "What is 2+2?", "completions": [{"response": "4", "overall_score": "N/A"}]},
    {"prompt": "What is 2+2?", "response_a": "4", "response_b": "5"},
    {"context": [USER], "response1": "4", "response2": "5", "overall_preference": -2},
    {"prompt": "What is 2+2?", "chosen": "4", "rejected": "4"},
    {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5", "probability": 0.3, "weight": -1, "margin": "x"},
    {"prompt": [USER], "response": [FOUR], "system": None},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]}, FOUR]},
    {"messages": [USER, FOUR], "rejected_response": "5"},
    {"prompt": "What is 2+2?", "output": ["4", "5"]},
    {"prompt": "What is 2+2?", "chosen": ["4"], "rejected": ["5", "6"]},
]
SYSTEM = {"role": "system", "content": "Be brief."}
WITH_SYSTEM: list[dict[str, Any]] = [
    {"messages": [SYSTEM, USER, FOUR]},
    {"system": "Be brief.", "prompt": "What is 2+2?", "response": "4"},
    {"system_prompt": "Be brief.", "prompt": "What is 2+2?", "response": "4"},
    {"system_prompt": "Be brief.", "prompt": "What is 2+2?", "chosen": "4", "rejected": "5"},
    {"system": "Be brief.", "messages": [USER, FOUR]},
    {"system": "Be brief.", "prompt": "What is 2+2?", "responses": ["4", "5"]},
]


def first_reward(line: dict[str, Any]) -> Any:
    return line.get("reward", line.get("chosen_reward", (line.get("rewards") or [None])[0]))


def test_one_conversation_has_one_reward_however_it_is_written(scorer: Scorer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*SAME_CONVERSATION, *WITH_SYSTEM])
    score_file(scorer, source, str(tmp_path / "out.jsonl"))
    lines = read(tmp_path / "out.jsonl")
    assert [line.get("error") for line in lines] == [None] * len(lines)
    plain, brief = scorer.rewards([[USER, FOUR], [SYSTEM, USER, FOUR]]).tolist()
    expected = [plain] * len(SAME_CONVERSATION) + [brief] * len(WITH_SYSTEM)
    assert [first_reward(line) for line in lines] == pytest.approx(expected, abs=1e-5)
    assert plain != pytest.approx(brief, abs=1e-4)


def test_the_sides_of_a_pair_may_have_prompts_of_their_own(scorer: Scorer, tmp_path: Path) -> None:
    chosen, rejected = [USER, FOUR, USER, FOUR], [*PROMPT, FOUR]
    score_file(scorer, write(tmp_path / "in.jsonl", [{"chosen": chosen, "rejected": rejected}]), str(tmp_path / "o"))
    (line,) = read(tmp_path / "o")
    found = [line["chosen_reward"], line["rejected_reward"]]
    assert found == pytest.approx(scorer.rewards([chosen, rejected]).tolist(), abs=1e-5)


def test_nothing_of_a_line_is_replaced(scorer: Scorer, tmp_path: Path) -> None:
    mine = {
        "messages": [USER, FOUR],
        "reward": 7.0,
        "rewards": [1],
        "error": "mine",
        "truncated": "no",
        "x": float("nan"),
    }
    source = write(tmp_path / "in.jsonl", [mine, {"messages": 1, "error": "mine"}])
    text = score_file(scorer, source, str(tmp_path / "out.jsonl"))
    good, bad = read(tmp_path / "out.jsonl")
    assert {**good, "btrm_reward": None} == {**mine, "x": None, "btrm_reward": None}
    assert good["btrm_reward"] == pytest.approx(scorer.rewards([[USER, FOUR]])[0], abs=1e-5)
    assert bad == {
        **{"messages": 1, "error": "mine", "reward": None},
        "btrm_error": "line 2: 'messages' is 1 (int), expected a list of messages",
    }
    assert "1 conversation scored" in text
    assert "; 1 not scored (line 2: " in text
    assert "; 2 have keys of these names, so that the rewards are called btrm_..." in text
    assert "NaN" not in (tmp_path / "out.jsonl").read_text()


def test_what_is_not_scored_as_it_stands_is_said(scorer: Scorer, tmp_path: Path) -> None:
    row = {"messages": [USER, {**FOUR, "reasoning_content": "2 and 2"}], "tools": [{"name": "f"}]}
    text = score_file(scorer, write(tmp_path / "in.jsonl", [row, row]), str(tmp_path / "out.jsonl"))
    assert "messages.reasoning_content not used (2)" in text
    assert "tools not used (2)" in text


def test_links_are_followed_and_only_files_are_replaced(scorer: Scorer, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", pairs(2))
    kept, link = tmp_path / "kept.jsonl", tmp_path / "link.jsonl"
    kept.write_text("old")
    link.symlink_to(kept)
    with pytest.raises(DataError, match=r"kept\.jsonl exists already"):
        score_file(scorer, source, str(link))
    score_file(scorer, source, str(link), overwrite=True)
    assert link.is_symlink()
    assert len(read(kept)) == 2
    dangling = tmp_path / "dangling.jsonl"
    dangling.symlink_to(tmp_path / "made.jsonl")
    score_file(scorer, source, str(dangling))
    assert len(read(tmp_path / "made.jsonl")) == 2
    before = Path("/dev/null").stat().st_rdev
    score_file(scorer, source, "/dev/null", overwrite=True)
    assert Path("/dev/null").is_char_device()
    assert Path("/dev/null").stat().st_rdev == before
    with pytest.raises(DataError, match=r"^cannot write /dev/full: No space left on device$"):
        score_file(scorer, source, "/dev/full", overwrite=True)
    assert not list(Path("/dev").glob("full.partial*"))


def test_a_pipe_is_written_to(scorer: Scorer, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    score_file(scorer, write(tmp_path / "in.jsonl", pairs(2)), str(pipe))
    reader.join()
    assert len(found[0].splitlines()) == 2
    assert pipe.is_fifo()


def fed(file: str, *arguments: str) -> None:
    """`btrm` in a child that reads a pipe with the lines of a file."""
    reading, writing = os.pipe()
    os.write(writing, Path(file).read_bytes())
    os.close(writing)
    os.dup2(reading, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    processes.command(*arguments)


def test_standard_input_and_output(model: Path, scorer: Scorer, tmp_path: Path) -> None:
    lines = write(tmp_path / "in.jsonl", pairs(2))
    for target in ("/dev/stdout", "-"):
        output, errors = tmp_path / f"output {len(target)}", tmp_path / f"errors {len(target)}"
        started = processes.start(fed, lines, "score", str(model), "-", "-o", target, log=output, errors=errors)
        assert processes.wait(started) == [0], errors.read_text()
        assert len(read(output)) == 2, "results only"
        assert "2 pairs scored" in errors.read_text()


@pytest.mark.parametrize("ending", [".bz2", ".xz", ".zst"])
def test_packed_lines_are_scored(scorer: Scorer, tmp_path: Path, ending: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in pairs(2)).encode()
    content = {
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
    }
    (tmp_path / f"in.jsonl{ending}").write_bytes(content[ending](lines))
    assert "2 pairs scored" in score_file(scorer, str(tmp_path / f"in.jsonl{ending}"), str(tmp_path / "out.jsonl"))


def test_columns_are_mapped_for_scoring(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"ask": "What is 2+2?", "good": "4", "bad": "5"}])
    result = btrm(
        "score", model, source, "-o", tmp_path / "o", "--map", "prompt=ask,chosen=good", "--map", "rejected=bad"
    )
    assert result.exit_code == 0, result.stderr
    assert "reward_margin" in read(tmp_path / "o")[0]
    refused = btrm("score", model, source, "-o", tmp_path / "p", "--map", "promt=ask")
    assert (refused.exit_code, "Did you mean 'prompt'" in refused.stderr) == (2, True)


def test_an_evaluation_takes_each_side_of_a_pair_after_its_own_prompt(scorer: Scorer, tmp_path: Path) -> None:
    five = {"role": "assistant", "content": "5"}
    parted = {"chosen": [USER, FOUR, USER, FOUR], "rejected": [USER, five, USER, five]}
    same = {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}
    found = source_rewards(scorer, write(tmp_path / "in.jsonl", [parted, same]))
    rewards = scorer.rewards([parted["chosen"], parted["rejected"], [USER, FOUR], [USER, five]]).reshape(2, 2)
    assert found.bad_rows == 0
    np.testing.assert_allclose(found.rewards.reward_P2, rewards, atol=1e-5)
