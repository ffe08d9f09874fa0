"""Code of the model card: how others get rewards from a model directory. Every block of it is run by a test."""

from __future__ import annotations

import json
import shlex
from typing import Any

CHAT = """chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
text = tokenizer.apply_chat_template(chat, tokenize=False)
"""


PIPELINE = (
    """from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained({name})
reward = pipeline("text-classification", model={name}, tokenizer=tokenizer)
"""
    + CHAT
    + """print(reward([text], top_k=None, function_to_apply="none", add_special_tokens=False)[0][0]["score"])"""
)


ADAPTERS = (
    """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

# adapters: the base model is loaded from where adapter_config.json says
tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoPeftModelForSequenceClassification.from_pretrained({name}, num_labels=1{options}).eval()
"""
    + CHAT
    + """print(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())"""
)


FOUR_BITS = """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}",
    llm_int8_skip_modules=["score"],
)"""


VLLM = """import json
from urllib.request import Request, urlopen

chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
body = json.dumps({"model": {name}, "messages": chat}).encode()
asked = Request("http://127.0.0.1:8000/classify", body, {"Content-Type": "application/json"})
print(json.load(urlopen(asked))["data"][0]["probs"][0])"""


TRL = """from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "Name a planet."}]}] * 8)
trainer = GRPOTrainer(
    model="POLICY", reward_funcs={name}, args=GRPOConfig(output_dir="grpo", max_steps=2), train_dataset=prompts
)
trainer.train()"""


def how_to_use(made: dict[str, Any], name: str) -> list[tuple[str, str, str]]:
    """Title, language and code of each way to get rewards without btrm's Python interface.

    Args:
        made: the content of `btrm.json`.
        name: the directory or hub id that stands in the code.
    """
    quoted, word = json.dumps(name, ensure_ascii=False), shlex.quote(name)
    if not (made.get("adapters") or {"merged": True})["merged"]:
        return [
            ("transformers and peft", "python", _adapters(made, quoted)),
            ("vLLM, TRL and OpenRLHF read whole weights", "bash", f"btrm export {word} WHOLE --merge-adapter"),
        ]
    server = f"vllm serve {word} --runner pooling --dtype bfloat16{_vllm_options(made.get('card', {}))}"
    trainer = "python -m openrlhf.cli.train_ppo_ray --reward.remote_url http://127.0.0.1:8080/get_reward ..."
    return [
        ("transformers", "python", PIPELINE.replace("{name}", quoted)),
        ("vLLM, the server", "bash", server),
        ("vLLM, a request", "python", VLLM.replace("{name}", quoted)),
        ("TRL", "python", TRL.replace("{name}", quoted)),
        ("OpenRLHF", "bash", f"btrm serve {word} --port 8080\n{trainer}"),
    ]


def _vllm_options(about: dict[str, Any]) -> str:
    """What vLLM must be told of a class that is not named after its causal language model, which is what it loads."""
    causal = about.get("causal")
    if causal is None or causal.removesuffix("ForCausalLM") == about["architecture"].removesuffix(
        "ForSequenceClassification"
    ):
        return ""
    return f" --convert classify --hf-overrides {shlex.quote(json.dumps({'architectures': [causal]}))}"


def _adapters(made: dict[str, Any], quoted: str) -> str:
    """How peft loads adapters: over a base model in 4 bits where they were trained so, with the cap on its scores."""
    code, options = ADAPTERS, ""
    if made["config"]["model.quantize"] != "none":
        options = FOUR_BITS.replace("{dtype}", made["dtype"])
        code = code.replace("import AutoTokenizer", "import AutoTokenizer, BitsAndBytesConfig")
    if made.get("card", {}).get("softcap"):  # the base model's own configuration may not say so
        options += ', attn_implementation="eager"'
    return code.replace("{options}", options).replace("{name}", quoted)
