"""Train a policy with GRPO (TRL) against a reward model that btrm trained.

python examples/grpo.py --policy Qwen/Qwen3-0.6B --reward OUTPUT/model --prompts prompts.jsonl

Each line of the prompts holds {"prompt": [messages]}. `--reward` may also be the URL of a `btrm serve`.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from btrm_core import trl_reward_func


def main() -> None:
    """Train and save the policy."""
    parser = argparse.ArgumentParser(description="GRPO with a reward model of btrm")
    parser.add_argument("--policy", required=True, help="causal model with a chat template")
    parser.add_argument("--tokenizer", help="default: the policy's")
    parser.add_argument("--reward", required=True, help="directory of a reward model, or URL of a server")
    parser.add_argument("--prompts", required=True, help="JSONL file")
    parser.add_argument("--output", default="runs/grpo")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--responses", type=int, default=8, help="responses to a prompt")
    parser.add_argument("--length", type=int, default=512, help="tokens of a response")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.policy),
        processing_class=AutoTokenizer.from_pretrained(options.tokenizer or options.policy),
        reward_funcs=trl_reward_func(options.reward),
        train_dataset=load_dataset("json", data_files=options.prompts, split="train"),
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            num_generations=options.responses,
            per_device_train_batch_size=options.responses,
            max_completion_length=options.length,
            logging_steps=1,
            use_cpu=options.cpu,
            bf16=not options.cpu,
            report_to="none",
            save_strategy="no",
        ),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
