"""Selective training with Hugging Face's Trainer, with a reference model or with its stored losses.

python examples/python/hugging_face_trainer.py --model base --reference ref --text corpus.txt --output out
torchrun --nproc-per-node 2 examples/python/hugging_face_trainer.py ...   # DistributedDataParallel
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from megatron_slm import ReferenceLossCollator, SlmTrainer, make_selector, with_reference_losses


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; return the Trainer's log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--reference", "--text", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--keep-ratio", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--store", action="store_true", help="compute the reference's losses once, before training")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    reference = AutoModelForCausalLM.from_pretrained(args.reference, dtype=torch.float32)
    with open(args.text, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"]
    rows = [{"input_ids": ids[i : i + args.length]} for i in range(0, len(ids) - args.length, args.length)]

    trainer = SlmTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=with_reference_losses(reference, rows) if args.store else rows,
        data_collator=ReferenceLossCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False)),
        selector=make_selector("excess", keep_ratio=args.keep_ratio),
        reference_model=None if args.store else reference,
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
