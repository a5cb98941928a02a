"""Selective training with TRL's SFTTrainer: the mixin before the trainer, and nothing else.

    python examples/python/sft_trainer.py --model base --reference ref --data chat.jsonl --output out

Each line of the data has a `prompt` and a `completion`; only tokens of completions compete.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from megatron_slm import SlmTrainerMixin, make_selector


class SlmSFTTrainer(SlmTrainerMixin, SFTTrainer):
    """SFTTrainer that trains on the kept tokens only."""


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; return the Trainer's log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--reference", "--data", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--keep-ratio", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)

    trainer = SlmSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            max_length=128,
            completion_only_loss=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        selector=make_selector("excess", keep_ratio=args.keep_ratio),
        reference_model=AutoModelForCausalLM.from_pretrained(args.reference, dtype=torch.float32),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
