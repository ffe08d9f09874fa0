"""A tiny checkpoint as other people publish them, with a chat template that no family is made for."""

from __future__ import annotations

from pathlib import Path

from btrm_core.families import TinyShape
from btrm_core.model.toy import build_toy

# That of HuggingFaceH4/zephyr-7b-beta after BOS: a line break after every turn's end.
ZEPHYR = (
    "{{ bos_token }}"
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def zephyr(directory: Path, template: str | None = ZEPHYR) -> Path:
    """A Mistral with two million weights whose pad token is EOS."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    build_toy(TinyShape("mistral", {"sliding_window": 64}, special), directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory
