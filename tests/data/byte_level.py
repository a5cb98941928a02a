"""Small byte-level tokenizers like GPT-2's, trained on the spot, in every file format."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.texts import training_texts

END = "<|endoftext|>"


def byte_level(vocab_size: int = 600) -> Tokenizer:
    """Train a byte-level BPE whose last token ends documents."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(training_texts(), trainer)
    tokenizer.add_special_tokens([END])
    return tokenizer


def byte_level_folder(folder: Path, *, special: Sequence[str] = (), bos: str = END) -> Path:
    """Write it as a Hugging Face folder, with more special tokens behind the last one."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=bos)
    fast.save_pretrained(str(folder))
    return folder


def gpt2_files(folder: Path) -> tuple[Path, Path]:
    """Write GPT-2's vocab.json and merges.txt."""
    tokenizer = byte_level()
    tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text()) | {END: tokenizer.token_to_id(END)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return folder / "vocab.json", folder / "merges.txt"


def byte_ranks() -> list[bytes]:
    """Return the tokens' bytes by rank, single bytes first, in order."""
    tokenizer = byte_level()
    letters = dict(zip(_letters(), range(256), strict=True))
    vocabulary = {token: index for token, index in tokenizer.get_vocab().items() if token != END}
    tokens = [bytes(letters[letter] for letter in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    return [bytes([byte]) for byte in range(256)] + [token for token in tokens if len(token) > 1]


def tiktoken_file(folder: Path) -> Path:
    """Write OpenAI's .tiktoken file."""
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(byte_ranks())]
    (folder / "ranks.tiktoken").write_text("\n".join(lines))
    return folder / "ranks.tiktoken"


def megatron_json_file(folder: Path) -> Path:
    """Write Megatron's JSON file."""
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("utf-8", "replace")}
        for rank, token in enumerate(byte_ranks())
    ]
    (folder / "vocab.json").write_text(json.dumps(entries))
    return folder / "vocab.json"


def _letters() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
