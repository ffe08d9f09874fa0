"""Tiny random models of the architectures people bring, and what btrm does with each; printed as a table by `-m`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from btrm_core.model.leakage import Trust, Use, trusted, without_dropout
from btrm_core.model.reward import RewardModel, choose_for
from support.tiny_models import SIZE

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 48,
}
GEMMA3 = {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
DELTA = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 14}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
EXPERTS = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256}
INTERFACE = "does not use transformers' attention interface"
STATE = "neither full nor sliding attention"


class Architecture(NamedTuple):
    """A tiny configuration, the form its sequences get on a CPU, and words of the reason if it is not the first."""

    model_type: str
    config: dict[str, Any]
    form: str = "shared"
    reason: str = ""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", {}),
    "llama3": Architecture(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-dynamic": Architecture(
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 48},
        "one by one",
        "depends on the longest sequence of a batch above 48 tokens",
    ),
    "llama-yarn": Architecture(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": Architecture("mistral", {"sliding_window": 9}),
    "ministral3": Architecture("ministral3", {"head_dim": 8}),
    "mixtral": Architecture("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.1}),
    "ministral": Architecture("ministral", {"sliding_window": 9, "head_dim": 8}),
    "gemma": Architecture("gemma", {"head_dim": 16}),
    "gemma2": Architecture("gemma2", {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 2.0}),
    "gemma3_text": Architecture("gemma3_text", GEMMA3),
    "gemma3": Architecture(
        "gemma3",
        {"text_config": {**SIZE, **GEMMA3}, "vision_config": {**VISION, "num_hidden_layers": 1, "image_size": 28}},
    ),
    "qwen2": Architecture("qwen2", {}),
    "qwen2-moe": Architecture(
        "qwen2_moe",
        {**MOE, "shared_expert_intermediate_size": 16},
        "padded",
        "only causal and sliding-window attention can be packed",
    ),
    "qwen3": Architecture(
        "qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen3-moe": Architecture("qwen3_moe", {**MOE, "head_dim": 8}),
    "qwen3_next": Architecture("qwen3_next", {**MOE, **DELTA, "shared_expert_intermediate_size": 16}, "padded", STATE),
    "qwen3_5_text": Architecture("qwen3_5_text", {**DELTA}, "padded", STATE),
    "phi": Architecture("phi", {}),
    "phi3": Architecture("phi3", {"sliding_window": 9}),
    "phi3-longrope": Architecture(
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48, "max_position_embeddings": 256},
        "one by one",
        "depends on the longest sequence of a batch above 48 tokens",
    ),
    "phimoe": Architecture("phimoe", {"num_local_experts": 4}),
    "jamba": Architecture(
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        "padded",
        STATE,
    ),
    "zamba": Architecture(
        "zamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 1,
            "attn_layer_offset": 0,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "use_mamba_kernels": False,
            "num_key_value_heads": 4,
        },
        "padded",
        STATE,
    ),
    "zamba2": Architecture(
        "zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "num_mem_blocks": 1,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "use_mem_rope": True,
            "num_key_value_heads": 4,
            "chunk_size": 16,
        },
        "padded",
        STATE,
    ),
    "doge": Architecture("doge", {"keep_window_size": 2048}, "padded", "'LayerMask' object has no attribute"),
    "doge-small": Architecture(
        "doge", {"keep_window_size": 8}, "one by one", "padded batches are not exact for this model: rewards change"
    ),
    "gpt2": Architecture("gpt2", {**GPT}),
    "biogpt": Architecture("biogpt", {}),
    "gpt-sw3": Architecture("gpt-sw3", {**GPT}),
    "openai-gpt": Architecture("openai-gpt", {**GPT}, "padded", INTERFACE),
    "gpt_bigcode": Architecture("gpt_bigcode", {**GPT}),
    "gpt_neo": Architecture(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 9},
        "padded",
        INTERFACE,
    ),
    "gpt_neox": Architecture("gpt_neox", {}),
    "gptj": Architecture("gptj", {**GPT, "rotary_dim": 8}),
    "opt": Architecture("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": Architecture("bloom", {"n_layer": 2, "n_head": 4}, "padded", INTERFACE),
    "falcon": Architecture("falcon", {"new_decoder_architecture": False}, "padded", INTERFACE),
    "falcon-alibi": Architecture("falcon", {"alibi": True, "new_decoder_architecture": False}, "padded", INTERFACE),
    "mpt": Architecture("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}, "padded", INTERFACE),
    "stablelm": Architecture("stablelm", {}),
    "olmo": Architecture("olmo", {}),
    "olmo2": Architecture("olmo2", {}),
    "olmo3": Architecture("olmo3", {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
    "starcoder2": Architecture("starcoder2", {"sliding_window": 9}),
    "exaone4": Architecture("exaone4", {"sliding_window": 9, "head_dim": 8}),
    "glm": Architecture("glm", {"head_dim": 8}),
    "glm4": Architecture("glm4", {"head_dim": 8}),
    "gpt_oss": Architecture("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "sliding_window": 9}, "padded", "s_aux"),
    "smollm3": Architecture("smollm3", {}),
    "nemotron": Architecture("nemotron", {}),
    "persimmon": Architecture("persimmon", {}),
    "helium": Architecture("helium", {"head_dim": 8}),
    "seed_oss": Architecture("seed_oss", {"head_dim": 8}),
    "deepseek_v2": Architecture("deepseek_v2", {**MLA, **EXPERTS, "n_shared_experts": 1, "topk_method": "greedy"}),
    "deepseek_v3": Architecture("deepseek_v3", {**MLA, **EXPERTS}),
    "axk1": Architecture("axk1", {**MLA, **EXPERTS}),
    "axk2": Architecture("axk2", {**MLA, **EXPERTS}, "padded", STATE),
    "diffllama": Architecture("diffllama", {}),
    "jetmoe": Architecture("jetmoe", {"num_local_experts": 2, "kv_channels": 8, "num_key_value_heads": 2}),
    "minimax": Architecture(
        "minimax",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
        "padded",
        STATE,
    ),
    "hunyuan_v1_moe": Architecture("hunyuan_v1_moe", {"head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    "hunyuan": Architecture("hunyuan_v1_dense", {"head_dim": 8}),
    "hunyuan-dynamic": Architecture(
        "hunyuan_v1_dense",
        {"head_dim": 8, "rope_parameters": {**DYNAMIC, "alpha": 1000.0}, "max_position_embeddings": 48},
    ),
    "arcee": Architecture("arcee", {}),
    "minicpm3": Architecture("minicpm3", MLA),
}
"""By a name of our own. Windows are 9 tokens and positions change at 48, below the lengths that the test uses."""

REFUSED = "refused"
OLDER: dict[str, tuple[str, str, str]] = {
    # without padding it had no causal mask
    "doge": ("5.18", REFUSED, "rewards change with what else is in the batch"),
    "doge-small": ("5.18", REFUSED, "a reward does not depend on"),
    "hunyuan-dynamic": ("5.20", "one by one", "depends on the longest sequence of a batch above 48 tokens"),
    "gptj": ("5.24", "padded", INTERFACE),
}
"""The version of transformers before which an architecture was another one, what it got then, and why."""


def expected(name: str) -> tuple[str, str]:
    """The form that sequences of an architecture get with the transformers that is installed, and words of the reason.

    The form is `REFUSED` where nothing is exact.
    """
    before, form, reason = OLDER.get(name, ("0", "", ""))
    if Version(transformers.__version__) < Version(before):
        return form, reason
    return ARCHITECTURES[name].form, ARCHITECTURES[name].reason


def tiny_reward_model(name: str, *, dropout: bool = False) -> RewardModel:
    """A reward model of an architecture with random weights, large enough for attention to matter."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    hf = AutoModelForSequenceClassification.from_config(
        CONFIG_MAPPING[architecture.model_type](**{**SIZE, **architecture.config})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.3 if parameter.ndim > 1 else parameter + noise * 0.05)
    if not dropout:
        without_dropout(hf)
    return RewardModel(hf, choose_for(hf, "auto", "cpu"))


def form_of(trust: Trust) -> str:
    """How sequences are laid out, in the words of `Architecture.form`."""
    return "one by one" if trust.one_by_one else trust.layout


def table(cache_dir: str) -> str:
    """The table of the documentation: every architecture, what its sequences get, and why."""
    lines = ["| architecture | sequences are | because |", "|---|---|---|"]
    words = {"shared": "packed, prompts shared", "padded": "padded", "one by one": "computed one by one"}
    for name in sorted(ARCHITECTURES):
        trust = trusted(tiny_reward_model(name), [], Use(cache_dir=cache_dir))
        lines.append(f"| {name} | {words[form_of(trust)]} | {'; '.join(trust.why_not)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(table(folder))
