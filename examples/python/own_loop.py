"""Selective training in a loop of one's own: two models, one optimizer, no framework.

    python examples/python/own_loop.py --model path/to/base --reference path/to/reference --text corpus.txt

A reference is a model of the same tokenizer that was trained on cleaner text.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_slm import make_selector, micro_batch, selective_loss, token_losses


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; return the metrics of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--keep-ratio", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(args.reference, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.text, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)

    selector = make_selector("excess", keep_ratio=args.keep_ratio)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    history = []
    for step in range(args.steps):
        batch = micro_batch(rows[torch.arange(4 * step, 4 * step + 4) % len(rows)], first_sample=4 * step)
        reference_losses = token_losses(reference, batch)
        loss = selective_loss(model, batch, selector=selector, reference=reference_losses, step=step)
        loss.mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.metrics(reference_losses))
        print(f"step {step + 1}  " + "  ".join(f"{name} {value:.3f}" for name, value in history[-1].items()))
    return history


if __name__ == "__main__":
    main()
