"""What is in the cache, what goes and what stays: in use, of others, the least recently used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from btrm_core import cache
from btrm_core.cli import main
from btrm_core.errors import ConfigError

KEYS = {name: f"{number:064x}" for number, name in enumerate(("old", "middle", "new"))}
DAY = 86400.0


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BTRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BTRM_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments])


def prune(*arguments: str) -> dict[str, Any]:
    result = invoke("prune", "--json", *arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def entry(root: Path, name: str, size: int = 1_000_000, days: float = 0.0, kind: str = "encoded") -> Path:
    """An entry that was last used some days ago."""
    held = cache.build_once(root / kind / KEYS[name], lambda folder: (folder / "x").write_bytes(bytes(size)) and None)
    then = time.time() - days * DAY
    os.utime(held.anchor, (then, then))
    return held.path


@pytest.fixture
def three(root: Path) -> dict[str, Path]:
    """Entries last used 40, 20 and 0 days ago, and what else lies in a cache."""
    made = {name: entry(root, name, days=days) for name, days in (("old", 40), ("middle", 20), ("new", 0))}
    cache.keep_value(root / "hashes" / f"{'a' * 64}.json", {"sha256": "b"})
    return made


def there(three: dict[str, Path]) -> set[str]:
    return {name for name, path in three.items() if path.exists()}


def test_info_says_what_where_how_large_and_how_old(three: dict[str, Path], root: Path) -> None:
    (root / "encoded" / "notes.txt").write_text("mine")
    (root / "encoded" / ".building-x").mkdir()
    text = invoke("info").stdout.splitlines()
    assert text[0] == f"{root}: 3.0 MB (limit 100.0 GB, BTRM_CACHE_LIMIT)"
    cells = {line.split()[0]: line.split() for line in text[2:-1]}
    assert cells["encoded"][1:8] == ["3", "3.0", "MB", "40", "d", "0", "s"]
    assert (cells["hashes"][1], cells["toy"][1], cells["leftovers"][1]) == ("1", "0", "1")
    assert text[-1] == f"not btrm's, and left alone: 1, such as {root / 'encoded' / 'notes.txt'}"
    found = json.loads(invoke("info", "--json").stdout)
    assert (found["root"], found["limit_bytes"]) == (str(root), 100_000_000_000)
    assert found["kinds"]["encoded"]["entries"] == 3
    assert found["bytes"] == sum(item["bytes"] for item in found["entries"]) > 3_000_000
    assert [item["finished"] for item in found["entries"]].count(False) == 1
    assert invoke("info", "--dir", str(root / "nowhere")).stdout.startswith(f"{root / 'nowhere'}: 0 B")


def test_looking_is_not_using(three: dict[str, Path]) -> None:
    before = json.loads(invoke("info", "--json").stdout)["entries"]
    assert json.loads(invoke("info", "--json").stdout)["entries"] == before
    cache.build_once(three["old"], lambda _: pytest.fail("it is there"))
    used = {item["path"]: item for item in json.loads(invoke("info", "--json").stdout)["entries"]}[str(three["old"])]
    assert used["last_used"] > before[-1]["built"][:10]
    assert used["built"] == next(item for item in before if item["path"] == str(three["old"]))["built"]


def test_what_was_not_used_for_long_goes(three: dict[str, Path]) -> None:
    assert len(prune("--older-than", "30d", "--dry-run")["removed"]) == 1
    assert there(three) == {"old", "middle", "new"}
    assert [item["path"] for item in prune("--older-than", "30d")["removed"]] == [str(three["old"])]
    assert there(three) == {"middle", "new"}
    assert prune("--older-than", "3w")["removed"] == []


def test_the_least_recently_used_goes_until_it_fits(three: dict[str, Path]) -> None:
    prune("--max-size", "2.5MB")
    assert there(three) == {"middle", "new"}
    text = invoke("prune", "--max-size", "1MB", "--dry-run").stdout
    assert text.splitlines()[-2] == "would remove 2 entries, 2.0 MB"
    assert there(three) == {"middle", "new"}


def test_all_means_what_btrm_has_put_there_and_nobody_uses(three: dict[str, Path], root: Path) -> None:
    mine = [root / "encoded" / "notes.txt", root / "other" / KEYS["old"] / "x", root / "pairs" / "my-pairs" / "x"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    code = (
        "import sys; from pathlib import Path; from btrm_core import cache\n"
        "held = cache.build_once(Path(sys.argv[1]), None); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(three["old"])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        found = prune("--all")
        assert there(three) == {"old"}
        assert [item["path"] for item in found["in_use"]] == [str(three["old"])]
        other.kill()
    assert [item["path"] for item in prune("--all")["removed"]] == [str(three["old"])]
    assert there(three) == set()
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert sorted(path for path in root.rglob("*") if path.is_file()) == sorted(mine)


def test_leftovers_go_and_what_is_being_built_stays(root: Path) -> None:
    left = [root / "encoded" / ".building-1", root / "toy" / f".llama3-{'a' * 12}-old-x", root / "piped" / ".new-1"]
    for path in left:
        path.mkdir(parents=True)
        (path / "x").write_text("half")
        os.utime(path, (1e9, 1e9))

    def build(folder: Path) -> None:
        os.utime(folder, (1e9, 1e9))
        (left[0]).mkdir(exist_ok=True)
        os.utime(left[0], (1e9, 1e9))
        assert len(prune()["removed"]) == 3
        assert folder.exists()

    assert cache.build_once(root / "encoded" / KEYS["new"], build).path.exists()
    assert not any(path.exists() for path in left)


def test_a_new_entry_makes_room_for_itself(
    three: dict[str, Path], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BTRM_CACHE_LIMIT", "2.5 MB")
    held = cache.build_once(three["middle"], lambda _: None)
    assert held.path.exists(), "what is only read removes nothing"
    made = entry(root, "old", kind="pairs", size=1_400_000)
    assert made.exists()
    assert there(three) == {"middle"}, "the least recently used go, but not what is in use"
    assert capsys.readouterr().err.splitlines() == [
        f"the cache {root} was over its limit of 2.5 MB (BTRM_CACHE_LIMIT): "
        "the least recently used entries were removed (2, 2.0 MB)"
    ]
    assert entry(root, "new", kind="pairs", size=9_000_000).exists(), "what is needed is kept whatever its size"
    assert not made.exists()


def test_the_limit_is_checked_before_anything_is_built(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRM_CACHE_LIMIT", "20 pounds")
    with pytest.raises(ConfigError, match=r"^BTRM_CACHE_LIMIT: '20 pounds' is no size; .* or none for no limit$"):
        cache.build_once(root / "encoded" / KEYS["new"], lambda _: pytest.fail("too late"))
    monkeypatch.setenv("BTRM_CACHE_LIMIT", "none")
    assert cache.size_limit() is None
    assert "no limit" in invoke("info").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--older-than", "30"), "'30' is no age; expected minutes, hours, days or weeks: 45m, 12h, 30d, 2w"),
        (("--max-size", "big"), "'big' is no size; expected a number with a unit, such as 20GB"),
        (("--all", "--older-than", "1d"), "--all removes everything; leave out --older-than and --max-size"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str, three: dict[str, Path]) -> None:
    result = invoke("prune", *arguments)
    assert (result.exit_code, result.stderr) == (2, f"btrm: {said}\n")
    assert there(three) == {"old", "middle", "new"}


def test_a_copied_pipe_stays_while_it_may_be_read(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from btrm_core.data.inputs import streams\n"
        "print(streams.spooled('-', Path(sys.argv[1])), flush=True); import time; time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write('{"a": 1}\n')
        other.stdin.close()
        copy = Path(other.stdout.readline().strip())
        assert len(prune("--all")["in_use"]) == 1
        assert copy.read_text() == '{"a": 1}\n'
        other.kill()
    assert len(prune("--all")["removed"]) == 1
    assert not copy.exists()
