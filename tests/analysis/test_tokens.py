"""Losses, selections and pages of token reports, against transformers and plain sorting."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_slm.analysis import losses
from megatron_slm.analysis.excerpt import Excerpt, excerpt_of_texts
from megatron_slm.analysis.kept import KeptTokens, agreement, frequency_bands, groups, levels, select
from megatron_slm.analysis.losses import checkpoints_in, excerpt_of_store, model_statistics, store_losses
from megatron_slm.analysis.selection_page import at_quarters
from megatron_slm.cli.analyze_tokens import main
from megatron_slm.convert.imports import import_folder
from megatron_slm.convert.source import open_model
from megatron_slm.data.corpus.indexed_writer import IndexedCorpusWriter
from megatron_slm.data.corpus.sidecar import loss_mask_prefix
from megatron_slm.errors import AnalysisError
from megatron_slm.selection.scores import score_named
from tests.support.runs import SEQ_LENGTH, run_flags, save_hf_llama, write_corpus
from tests.support.scoring import score_here
from tests.support.training import train_and_report
from tests.support.world import run_world


@pytest.fixture(scope="module")
def excerpt(tokenizer: Any, text_file: Path) -> Excerpt:
    return excerpt_of_texts([str(text_file)], tokenizer, sequence_length=24, max_tokens=10**6)


def test_losses_and_entropies_are_transformers(
    folders: list[Path], excerpt: Excerpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every token, in batches that do not divide the windows; 0 where nothing is predicted."""
    monkeypatch.setattr(losses, "BATCH_TOKENS", 24 * 5)
    said = model_statistics(open_model(str(folders[0]), field="--load"), excerpt, with_entropy=True)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folders[0])(torch.from_numpy(excerpt.tokens_Ws1[:, :-1])).logits
    log_probs = logits.double().log_softmax(-1)
    expected = -log_probs.gather(2, torch.from_numpy(excerpt.labels_Ws)[..., None])[..., 0].numpy()
    entropy = -(log_probs.exp() * log_probs).sum(-1).numpy()
    assert said.entropy_Ws is not None
    np.testing.assert_allclose(said.loss_Ws[excerpt.valid_Ws], expected[excerpt.valid_Ws], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(said.entropy_Ws[excerpt.valid_Ws], entropy[excerpt.valid_Ws], rtol=1e-4, atol=1e-5)
    assert not said.loss_Ws[~excerpt.valid_Ws].any()


@pytest.mark.parametrize("together", [0, 4])
def test_kept_are_the_highest_scores_of_each_micro_batch(folders: list[Path], excerpt: Excerpt, together: int) -> None:
    model, reference = (model_statistics(open_model(str(f), field="--load"), excerpt) for f in folders[:2])
    kept = select(
        "x", excerpt, model, reference, score=score_named("excess"), keep_ratio=0.4, scope="micro-batch",
        spans_per_micro_batch=together,
    )  # fmt: skip
    size = together or len(excerpt.spans)
    for start in range(0, len(excerpt.spans), size):
        part = slice(start, start + size)
        valid = excerpt.valid_Ws[part]
        excess = (model.loss_Ws[part] - reference.loss_Ws[part])[valid]
        order = np.argsort(-excess, kind="stable")[: math.ceil(0.4 * valid.sum())]
        expected = np.zeros(excess.size, bool)
        expected[order] = True
        assert kept.kept_Ws[part][valid].tolist() == expected.tolist()
        assert not kept.kept_Ws[part][~valid].any()
    rows = groups(excerpt, kept, model, reference)
    for grouping in {row.grouping for row in rows}:
        own = [row for row in rows if row.grouping == grouping]
        assert sum(row.tokens for row in own) == excerpt.num_tokens
        assert sum(row.kept_share * row.tokens for row in own) == pytest.approx(kept.kept_Ws.sum())
    assert {row.name for row in rows if row.grouping == "source"} == {"site 0", "site 1"}
    assert {"words", "number", "unlabeled"} == {row.name for row in rows if row.grouping == "part of the document"}


def test_agreement_and_levels(folders: list[Path], excerpt: Excerpt) -> None:
    model, reference, other = (model_statistics(open_model(str(f), field="--load"), excerpt) for f in folders[:3])

    def by(reference: Any) -> Any:
        return select("x", excerpt, model, reference, score=score_named("excess"), keep_ratio=0.5,
                      scope="sequence", spans_per_micro_batch=0)  # fmt: skip

    first, second = by(reference), by(other)
    assert agreement(first, first) == 1.0
    both = (first.kept_Ws & second.kept_Ws).sum()
    assert agreement(first, second) == agreement(second, first) == pytest.approx(both / first.kept_Ws.sum())
    level_N = levels(first, excerpt.valid_Ws)[excerpt.valid_Ws]
    score_N = first.score_Ws[excerpt.valid_Ws]
    assert max(np.bincount(level_N)) - min(np.bincount(level_N)) <= 1
    for level in range(4):
        assert score_N[level_N == level].min() >= score_N[level_N == level + 1].max()


def test_frequency_bands() -> None:
    """The most frequent id covers half of the text, the rare ones the last percent."""
    labels = np.array([0] * 60 + [1] * 25 + [2] * 10 + [3] * 4 + [4])
    assert [frequency_bands(labels)[labels == i][0] for i in range(5)] == [3, 2, 2, 1, 0]


def test_quarters() -> None:
    """By step: checkpoints at the start are not a third of training. Without steps, by number."""

    def chosen(steps: list[int | None]) -> list[int]:
        nothing: Any = None
        kept = [KeptTokens(name=str(i), score_Ws=nothing, kept_Ws=nothing, step=step) for i, step in enumerate(steps)]
        return [int(one.name) for _, one in at_quarters(kept)]

    assert chosen([None] * 7) == chosen([10, 20, 30, 40, 50, 60, None]) == [0, 2, 4, 6]
    assert chosen([10, 20, 30, 40, 300, 700, 1000]) == [0, 4, 5, 6]


def test_the_selection_command(
    folders: list[Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every model, two references, numbers and a self-contained page that shows the text as text."""
    page_path = tmp_path / "page.html"
    argv = [
        "selection",
        "--load",
        *map(str, folders),
        "--reference-load",
        *map(str, folders[1:3]),
        "--seq-length",
        "24",
    ]
    argv += ["--text-file", str(text_file), "--slm-keep-ratio", "0.3", "--documents", "99", "--output", str(page_path)]
    assert main(argv) == 0
    numbers = json.loads(page_path.with_suffix(".json").read_text())
    assert numbers["kept_tokens"] == math.ceil(0.3 * numbers["tokens"])
    assert len(numbers["agreement"]) == 4
    page = page_path.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script>alert" not in page
    assert page.count('class="t k"') == numbers["kept_tokens"]
    assert page.count('class="t k"') + page.count('class="t d"') == numbers["tokens"]
    shown = html.unescape("".join(re.findall(r'<span class="t [kdu]"[^>]*>(.*?)</span>', page, flags=re.DOTALL)))
    assert "⇥\tTabs, " in shown
    assert all(f"{share} %: " in page for share in (0, 33, 66, 100))
    assert "wrote" in capsys.readouterr().out


def test_the_dynamics_command(folders: list[Path], text_file: Path, tmp_path: Path) -> None:
    page_path = tmp_path / "page.html"
    argv = ["dynamics", "--load", *map(str, folders), "--text-file", str(text_file), "--output", str(page_path)]
    assert main([*argv, "--most", "5", "--documents", "99"]) == 0
    numbers = json.loads(page_path.with_suffix(".json").read_text())
    assert sum(numbers["shares"].values()) == pytest.approx(1)
    assert len(numbers["most_fluctuating"]) == 5
    assert numbers["most_fluctuating"][0]["fluctuation"] >= numbers["most_fluctuating"][4]["fluctuation"]
    page = page_path.read_text()
    shown = sum(page.count(f'class="t {kind}"') for kind in ("hh", "lh", "hl", "ll"))
    assert shown == numbers["tokens"]
    assert page.count('class="t hl"') == round(numbers["shares"]["H->L"] * numbers["tokens"])
    assert page_path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_a_loss_mask_leaves_out_is_shown_and_not_counted(folders: list[Path], tmp_path: Path) -> None:
    prefix, generator = tmp_path / "sft", np.random.default_rng(0)
    masks = [generator.integers(0, 2, size=n) for n in (30, 9, 41)]
    with (
        IndexedCorpusWriter(prefix, "uint16") as tokens,
        IndexedCorpusWriter(loss_mask_prefix(prefix), "uint8") as trained,
    ):
        for mask in masks:
            tokens.add_document(generator.integers(5, 50, size=mask.size))
            trained.add_document(mask)
    expected = int(np.concatenate(masks)[1:].sum())
    common = ["--data-path", str(prefix), "--seq-length", "16", "--documents", "99"]
    for command, kinds, extra in (
        ("dynamics", ("hh", "lh", "hl", "ll"), []),
        ("selection", ("k", "d"), ["--reference-load", str(folders[1])]),
    ):
        page_path = tmp_path / f"{command}.html"
        argv = [command, "--load", *map(str, folders), *extra, *common, "--output", str(page_path)]
        assert main(argv) == 0
        assert json.loads(page_path.with_suffix(".json").read_text())["tokens"] == expected
        page = page_path.read_text()
        assert sum(page.count(f'class="t {kind}"') for kind in kinds) == expected
        assert "excluded by the loss mask" in page


def test_checkpoints_and_folders_give_the_same(folders: list[Path], excerpt: Excerpt, tmp_path: Path) -> None:
    """A checkpoint of ours, imported, has the losses of the folder it came from; a run's checkpoints are all found."""
    import_folder(str(folders[0]), str(tmp_path / "run" / "checkpoints"))
    (stage,) = checkpoints_in([str(tmp_path / "run")])
    ours = model_statistics(open_model(stage.path, field="--load"), excerpt).loss_Ws
    theirs = model_statistics(open_model(str(folders[0]), field="--load"), excerpt).loss_Ws
    np.testing.assert_array_equal(ours, theirs)


def test_a_run_over_two_stages(tmp_path: Path) -> None:
    """Checkpoints of two ranks, read here: the last one's loss on a corpus is what the run itself evaluated."""
    corpus = write_corpus(tmp_path / "corpus")
    values = run_flags(
        corpus, tmp_path / "run", train_iters=4, save_interval=1,
        pipeline_model_parallel_size=2, valid_data_path=f"held={corpus}",
    )  # fmt: skip
    run_world(train_and_report, 2, values)
    output = tmp_path / "page.html"
    argv = ["dynamics", "--load", str(tmp_path / "run"), "--data-path", str(corpus), "--seq-length", str(SEQ_LENGTH)]
    assert main([*argv, "--output", str(output)]) == 0
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert numbers["steps"] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert numbers["mean_loss"][-1] == pytest.approx(
        next(x["loss"] for x in lines if x.get("event") == "eval"), rel=1e-5
    )


def test_stores_hold_the_same_losses(tmp_path: Path) -> None:
    """A pass written by the scoring tool, read instead of the model; another corpus is refused."""
    corpus, reference = write_corpus(tmp_path / "corpus"), save_hf_llama(tmp_path / "model")
    store = tmp_path / "store"
    run_world(score_here, 1, run_flags(corpus, tmp_path / "r", objective="slm", reference_load=reference, output=store))
    excerpt = excerpt_of_store(str(store), str(corpus), None, max_tokens=20 * SEQ_LENGTH)
    assert len(excerpt.spans) == 20
    expected = model_statistics(open_model(str(reference), field="--load"), excerpt).loss_Ws
    np.testing.assert_allclose(store_losses(str(store), excerpt), expected, rtol=1e-5, atol=1e-6)
    output = tmp_path / "page.html"
    argv = ["dynamics", "--scores", *[str(store)] * 3, "--data-path", str(corpus), "--output", str(output)]
    assert main(argv) == 0
    other = write_corpus(tmp_path / "other", seed=1)
    with pytest.raises(AnalysisError, match=r"--data-path is .*other': must be the corpus of the store .*store\."):
        excerpt_of_store(str(store), str(other), None, max_tokens=64)


def test_bad_input(folders: list[Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each a named error, before anything is written."""
    other = save_hf_llama(tmp_path / "other", vocab_size=99)
    one, text = str(folders[0]), ["--text-file", str(text_file), "--output", str(tmp_path / "x.html")]
    cases = {
        ("dynamics", "--load", one, one): "must name at least 3 checkpoints",
        ("dynamics", "--load", one, one, str(other)): "must equal the first model's, ",
        ("selection", "--load", one): "--reference-load is missing: required by --slm-score excess",
        (
            "selection",
            "--load",
            str(tmp_path),
            "--reference-load",
            one,
        ): "must be a Hugging Face folder, a checkpoint, or a run's folder",
        ("selection", "--load", one, "--reference-load", str(other)): "must equal the first model's, ",
        ("selection", "--load", one, "--reference-load", one, "--slm-keep-ratio", "0"): "(0, 1]",
        (
            "selection",
            "--load",
            one,
            "--reference-load",
            one,
            "--seq-length",
            "65",
        ): "must be at most 64, the model's context length",
        ("selection", "--load", one, "--data-path", "x"): "but not both",
        ("dynamics",): "be the only source of losses",
    }
    for words, message in cases.items():
        assert main([*words, *text]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x.html").exists()
    assert main(["selection", "--load", str(other), "--reference-load", str(other), *text]) == 1
    assert "--tokenizer-model" in capsys.readouterr().err


@pytest.mark.parametrize("width", [360, 1200])
def test_pages_fit_a_phone_and_need_no_network(
    folders: list[Path], text_file: Path, tmp_path: Path, browser: str, width: int
) -> None:
    """In a real browser: nothing is wider than the window, and a touched token says what it is."""
    output = tmp_path / "page.html"
    argv = ["selection", "--load", *map(str, folders), "--reference-load", str(folders[1]), "--seq-length", "24"]
    assert main([*argv, "--text-file", str(text_file), "--output", str(output)]) == 0
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" width="{width}" height="700" style="border:0"></iframe><pre id="out"></pre><script>'
        'addEventListener("load",()=>{const d=document.getElementById("f").contentDocument;'
        'd.querySelector(".t.k").click();'
        'document.getElementById("out").textContent=[d.documentElement.scrollWidth,d.documentElement.clientWidth,'
        'd.getElementById("tip").textContent,[...d.images].every(i=>i.naturalWidth>0)].join("|")})</script>'
    )
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         "--virtual-time-budget=4000", "--dump-dom", f"file://{frame}"],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="out">(\d+)\|(\d+)\|(.*?)\|(true|false)</pre>', done.stdout)
    assert found is not None, done.stdout[-500:]
    assert int(found[1]) <= int(found[2]), "the page is wider than the window"
    assert found[3].startswith("kept: loss ")
    assert found[4] == "true"
