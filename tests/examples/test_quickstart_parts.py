"""The quickstart's corpora are reproducible, disjoint and right; its report shows the models' losses."""

from __future__ import annotations

import html
import importlib.util
import json
import math
import operator
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul, "/": operator.truediv}
FILES = ("curated_train", "curated_heldout", "noisy_train", "noisy_heldout")


def load_example(name: str) -> ModuleType:
    """Import a script of the quickstart by its path: `examples` is not a package."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_corpora = load_example("make_corpora")
report = load_example("report")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of the four files."""
    folder: Path = tmp_path_factory.mktemp("corpora")
    make_corpora.make_corpora(folder, 7, curated_documents=600, noisy_documents=400, heldout_documents=80)
    return folder


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of one file."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(folder: Path, name: str) -> list[str]:
    """The texts of one file."""
    return [record["text"] for record in records(folder, name)]


# Corpora.


def test_same_seed_gives_the_same_bytes(corpora: Path, tmp_path: Path) -> None:
    """Another run with the same arguments writes the same files; another seed does not."""
    sizes = {"curated_documents": 600, "noisy_documents": 400, "heldout_documents": 80}
    make_corpora.make_corpora(tmp_path / "again", 7, **sizes)
    make_corpora.make_corpora(tmp_path / "other", 8, **sizes)
    for name in FILES:
        written = (corpora / f"{name}.jsonl").read_bytes()
        assert written == (tmp_path / "again" / f"{name}.jsonl").read_bytes()
        assert written != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_held_out_documents_are_in_no_training_file(corpora: Path) -> None:
    """Also not inside a noisy page, where a problem is followed by more text."""
    held_out = set(texts(corpora, "curated_heldout"))
    assert held_out.isdisjoint(texts(corpora, "curated_train"))
    noisy = texts(corpora, "noisy_train")
    assert set(texts(corpora, "noisy_heldout")).isdisjoint(noisy)
    assert not [problem for problem in held_out if any(problem in page for page in noisy)]


def test_forbidden_problems_are_drawn_again() -> None:
    """A problem of the held-out set that the stream would give is replaced by another."""
    first = "".join(make_corpora.make_problem(make_corpora.random.Random(3), frozenset()))
    second = "".join(make_corpora.make_problem(make_corpora.random.Random(3), frozenset([first])))
    assert first != second


def evaluate(terms: str) -> float:
    """The value of `a op b op c` with one precedence level, as the problems write it."""
    first, *rest = re.findall(r"[+\-x/]|\d+", terms)
    value = float(first)
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        value = OPERATORS[sign](value, number)
    return value


def test_every_equation_of_the_curated_corpus_holds(corpora: Path) -> None:
    """Each document has equations, all right; its answer is the last result of its working."""
    for text in texts(corpora, "curated_train"):
        equations = re.findall(r"(\d+(?: [+\-x/] \d+)+) = (\d+)", text)
        assert equations, text
        for terms, result in equations:
            assert evaluate(terms) == int(result), text
        answers = re.findall(r"^Answer: (\d+)$", text, flags=re.MULTILINE)
        assert answers == [equations[-1][1]], text
        assert 100 <= len(text) <= 400


def test_columns_end_in_the_digits_of_the_answer(corpora: Path) -> None:
    """The digits written column by column make up the sum."""
    sums = [text for text in texts(corpora, "curated_train") if " plus " in text]
    assert sums
    for text in sums:
        written = re.findall(r"write (\d)", text)
        assert f"Answer: {''.join(reversed(written))}\n" in text


def test_spans_cover_held_out_pages_and_every_kind_occurs(corpora: Path) -> None:
    """Spans add up to the text, name known kinds, and are in no file that is trained on."""
    kinds = set()
    for record in records(corpora, "noisy_heldout"):
        assert sum(length for _, length in record["spans"]) == len(record["text"])
        kinds |= {kind for kind, _ in record["spans"]}
    assert kinds == set(make_corpora.KINDS)
    assert all(set(record) == {"text"} for record in records(corpora, "noisy_train"))


def test_only_changed_characters_are_called_corrupted() -> None:
    """Without its corrupted digits, a line is the clean line without the digits at the same places."""
    rng = make_corpora.random.Random(0)
    line = "Add them: 140 + 21 = 161."
    changed = 0
    for _ in range(300):
        pieces = make_corpora.corrupt_line(rng, line)
        text = "".join(piece for _, piece in pieces)
        assert text.endswith("\n")
        marks = "".join(kind[0] * len(piece) for kind, piece in pieces)
        if len(text) == len(line) + 1:
            differing = "".join("c" if a != b else "a" for a, b in zip(text, line + "\n", strict=True))
            assert marks == differing
        changed += "c" in marks
    assert changed > 250


def test_the_table_names_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command writes the files and prints documents, characters and shares of each."""
    command = f"make_corpora.py --output {tmp_path} --seed 1 --curated-documents 20 --noisy-documents 10"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--heldout-documents", "5"])
    make_corpora.main()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [
        ["curated_train", "20"],
        ["curated_heldout", "5"],
        ["noisy_train", "10"],
        ["noisy_heldout", "5"],
    ]


# Report.


def write_metrics(folder: Path, final_loss: float, *, selective: bool) -> None:
    """A run's `metrics.jsonl` with 40 training lines and five evaluations, falling to `final_loss`."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, 41):
        loss = final_loss + 4 * math.exp(-step / 8)
        line = {"step": step, "tokens": step * 2048, "loss": loss, "loss_all": loss, "valid_tokens": 2048}
        line |= {"kept_tokens": 1229 if selective else 2048, "loss_unselected": None}
        if selective:
            line |= {"loss_unselected": loss + 2, "loss_all": loss + 0.8}
        lines.append(line)
        if step % 8 == 0:
            evaluation = {"event": "eval", "step": step, "tokens": step * 2048}
            last = final_loss if step == 40 else loss
            lines += [
                {**evaluation, "set": "target", "loss": last},
                {**evaluation, "set": "noisy", "loss": 2.0},
            ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_run(folder: Path, *, clm: float, slm: float) -> Path:
    """A run folder with synthetic metrics of the three runs and their summary."""
    losses = {"reference": 0.5, "clm": clm, "slm": slm}
    for name, loss in losses.items():
        write_metrics(folder / name, loss, selective=name == "slm")
    summary: dict[str, Any] = {name: {"target_loss": loss} for name, loss in losses.items()}
    summary |= {"keep_ratio": 0.6, "tokens": 81920, "seconds": 12.5, "hf_dir": str(folder / "hf")}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model_folders(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny Llama folders with different random weights and one byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpora, "noisy_train"), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(fast),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.5,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        fast.save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def shown_text(page: str) -> str:
    """The text of all token spans of a page, as it was before it was made visible and escaped."""
    tokens = re.findall(r'<span class="t [kdu]"[^>]*>(.*?)</span>', page, flags=re.DOTALL)
    return html.unescape("".join(tokens)).replace("↵\n", "\n").replace("⇥\t", "\t").replace("▫", "")


def test_curves_are_drawn(tmp_path: Path) -> None:
    """`curves.png` is a PNG, also where a run logged no loss of tokens that were not kept."""
    path = report.draw_curves(write_run(tmp_path / "run", clm=1.0, slm=0.8))
    assert path == tmp_path / "run" / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_report_from_files_to_page(
    tmp_path: Path, corpora: Path, model_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command writes both files; the page is self-contained and keeps the share that it names."""
    run_dir = write_run(tmp_path / "run", clm=1.0, slm=0.8)
    model, reference = model_folders
    command = f"report.py --run-dir {run_dir} --model {model} --reference {reference} --keep-ratio 0.6 "
    command += f"--text-file {corpora / 'noisy_heldout.jsonl'} --documents 5"
    monkeypatch.setattr(sys, "argv", command.split())
    report.main()
    assert (run_dir / "curves.png").exists()
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    kept, dropped = page.count('class="t k"'), page.count('class="t d"')
    assert kept == math.ceil(0.6 * (kept + dropped))
    assert page.count('class="t u"') == page.count('<div class="doc">') == 5
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "SLM ends lower than CLM: 0.800 against 1.000" in page
    assert "prefers-color-scheme: dark" in page
    assert all(f"<td>{kind}</td>" in page for kind in ("arithmetic", "noise"))


def test_losses_of_the_page_are_the_models_losses(model_folders: tuple[Path, Path]) -> None:
    """Losses equal those of a plain forward; kept are the highest excess losses of all documents together."""
    document = {"text": "Answer: 12\nSo 3 + 4 = 7.\n"}
    model, reference = model_folders
    tokens = report.score_documents(str(model), str(reference), [document, document], 0.3)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    ids = torch.tensor([tokenizer(document["text"], add_special_tokens=False)["input_ids"]])
    for folder, name in ((model, "token_loss"), (reference, "reference_loss")):
        with torch.no_grad():
            log_probs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.float().log_softmax(-1)
        expected = -log_probs[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        actual = torch.tensor([getattr(token, name) for token in tokens[1][1:]])
        torch.testing.assert_close(actual, expected)
    scored = [token for shown in tokens for token in shown[1:]]
    lowest_kept = min(token.excess_loss for token in scored if token.kept)
    assert lowest_kept >= max(token.excess_loss for token in scored if not token.kept)
    assert sum(token.kept for token in scored) == math.ceil(0.3 * len(scored))
    # Both documents tie token by token: the first one's tokens come first.
    assert all(a.kept or not b.kept for a, b in zip(tokens[0][1:], tokens[1][1:], strict=True))


def test_text_is_escaped_and_complete(model_folders: tuple[Path, Path]) -> None:
    """Markup in a document is shown, not run; white space and split characters come back as they were."""
    text = '<script>alert("x&y")</script>\n\n\ttab  two é\n'
    documents = report.score_documents(*map(str, model_folders), [{"text": text}, {"text": ""}], 0.6)
    page = report.token_page(documents, 0.6)
    assert "<script" not in page
    assert shown_text(page) == text
    assert len(documents) == 1


def test_long_documents_are_cut_at_the_context(corpora: Path, model_folders: tuple[Path, Path]) -> None:
    """No more tokens are shown than the models have positions."""
    text = "".join(texts(corpora, "curated_heldout")[:3])
    (tokens,) = report.score_documents(*map(str, model_folders), [{"text": text}], 0.6)
    assert len(tokens) == 64
    assert text.startswith("".join(token.text for token in tokens))


def test_ties_go_to_the_lower_position() -> None:
    """Among equal scores the first are kept."""
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert report.keep_highest(scores, 0.6).tolist() == [True, True, False, True, False]
    assert report.keep_highest(scores, 1.0).all()


def test_the_verdict_says_so_when_slm_is_not_better(tmp_path: Path) -> None:
    """A worse and an equal result are both called not better."""
    for slm_loss in (1.2, 1.0):
        run_dir = write_run(tmp_path / str(slm_loss), clm=1.0, slm=slm_loss)
        page = report.write_report(run_dir, [], 0.6).read_text(encoding="utf-8")
        assert "SLM is not better than CLM in this run" in page
        assert "ends lower" not in page


def test_two_vocabularies_are_refused(tmp_path: Path, model_folders: tuple[Path, Path]) -> None:
    """Losses over different vocabularies cannot be compared."""
    config = LlamaConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="--reference has 99"):
        report.score_documents(str(model_folders[0]), str(tmp_path), [{"text": "1"}], 0.6)


def test_keep_ratio_outside_its_range_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of zero tokens keeps nothing."""
    arguments = ["--run-dir", str(tmp_path), "--model", "m", "--reference", "r", "--text-file", "t"]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments, "--keep-ratio", "0"])
    with pytest.raises(SystemExit):
        report.main()
