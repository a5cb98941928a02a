"""`--probe-file`: token losses of fixed texts, recorded during training."""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_slm.analysis.losses import model_statistics
from megatron_slm.analysis.probe_records import ProbedTexts, ProbeFolder, ProbeRecord, recorded_losses
from megatron_slm.cli.analyze_tokens import main as analyze
from megatron_slm.convert.source import open_model
from megatron_slm.data.texts import MOST_TEXTS, read_texts
from megatron_slm.data.tokenizers.registry import NullTokenizer
from megatron_slm.errors import EXIT_UNUSABLE, AnalysisError, ConfigError, VocabularyError
from megatron_slm.telemetry.probe_board import TOKENS_SHOWN, _markdown
from megatron_slm.telemetry.text_picture import text_picture
from tests.support.runs import SEQ_LENGTH, flags, run_flags, save_hf_llama, write_corpus, zero_config
from tests.support.scoring import score_here
from tests.support.training import command, train_and_report
from tests.support.world import WorldError, run_world

TOKENIZER = NullTokenizer(96)
TEXTS = [
    "5 9 13 17 21 25",
    "3 1 4 1 5 9 2 6 5 3 5 8 9 7 9 3 2 3 8 4",
    "90 2 33",
    "8 61 2 44 30 19 75 52",
    "11 12 13 14 15",
]
"""More than a micro-batch, fewer than a step; the second is longer than a sample."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_corpus(folder / "corpus")
    save_hf_llama(folder / "reference")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def probing(files: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Flags of a run that selects, and looks at the texts every other step."""
    values = {
        "objective": "slm",
        "reference_load": files / "reference",
        "probe_file": files / "texts.jsonl",
        "eval_interval": 2,
        "save_interval": 2,
        "train_iters": 6,
    }
    return run_flags(files / "corpus", run_dir, **{**values, **changes})


@pytest.fixture(scope="module")
def one_rank(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run_world(train_and_report, 1, probing(files, run_dir))
    return run_dir


def test_records_are_what_the_checkpoints_say(files: Path, one_rank: Path) -> None:
    """Model and reference, by the code that analyses checkpoints; and the kept tokens are the highest scores."""
    folder = ProbeFolder(one_rank)
    texts = folder.texts()
    assert folder.steps() == [2, 4, 6]
    assert texts.tokens_Ws1.shape == (len(TEXTS), SEQ_LENGTH + 1)
    assert texts.valid_Ws.sum(axis=1).tolist() == [5, SEQ_LENGTH, 2, 7, 4]
    reference = model_statistics(open_model(str(files / "reference"), field="x"), texts.excerpt()).loss_Ws
    assert texts.reference_loss_Ws is not None
    np.testing.assert_allclose(texts.reference_loss_Ws, reference, rtol=1e-5, atol=1e-6)
    for step in folder.steps():
        record = folder.read(step)
        model = open_model(str(one_rank / "checkpoints" / f"step_{step:08d}"), field="x")
        loss_Ws = model_statistics(model, texts.excerpt()).loss_Ws
        np.testing.assert_allclose(record.loss_Ws, loss_Ws, rtol=1e-5, atol=1e-6)
        assert record.score_Ws is not None
        assert record.kept_Ws is not None
        np.testing.assert_allclose(
            record.score_Ws[texts.valid_Ws], (loss_Ws - reference)[texts.valid_Ws], rtol=1e-4, atol=1e-5
        )
        for start in (0, 2, 4):  # micro-batches of two texts
            valid_bs, kept_bs = texts.valid_Ws[start : start + 2], record.kept_Ws[start : start + 2]
            score_bs = record.score_Ws[start : start + 2]
            assert kept_bs.sum() == np.ceil(0.6 * valid_bs.sum())
            assert score_bs[kept_bs].min() >= score_bs[valid_bs & ~kept_bs].max(initial=-np.inf)
            assert not (kept_bs & ~valid_bs).any()


LAYOUTS = {
    "tp2-sp pp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
}
SLOW_LAYOUTS = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2 dp2": (4, {"pipeline_model_parallel_size": 2}),
    "zero3 dp2": (2, {"deepspeed_config": zero_config(3)}),
    "zero2 tp2": (2, {"deepspeed_config": zero_config(2), "tensor_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LAYOUTS)])
def test_layouts_record_the_same(files: Path, one_rank: Path, tmp_path: Path, layout: str) -> None:
    world_size, flags = {**LAYOUTS, **SLOW_LAYOUTS}[layout]
    run_world(train_and_report, world_size, probing(files, tmp_path / "run", save_interval=None, **flags))
    ours, theirs = ProbeFolder(one_rank), ProbeFolder(tmp_path / "run")
    assert theirs.steps() == ours.steps()
    np.testing.assert_array_equal(theirs.texts().tokens_Ws1, ours.texts().tokens_Ws1)
    assert theirs.texts().token_texts == ours.texts().token_texts
    np.testing.assert_allclose(
        theirs.texts().reference_loss_Ws,
        ours.texts().reference_loss_Ws,
        rtol=1e-5,
        atol=1e-6,  # type: ignore[arg-type]
    )
    for step in ours.steps():
        np.testing.assert_allclose(theirs.read(step).loss_Ws, ours.read(step).loss_Ws, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(theirs.read(step).kept_Ws, ours.read(step).kept_Ws)  # type: ignore[arg-type]


def test_looking_changes_nothing(files: Path, one_rank: Path, tmp_path: Path) -> None:
    """The run without the flag has the same losses, bit by bit."""
    run_world(train_and_report, 1, probing(files, tmp_path / "run", probe_file=None))

    def losses(folder: Path) -> list[Any]:
        return [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]

    assert losses(tmp_path / "run") == losses(one_rank)
    assert not (tmp_path / "run" / "probe").exists()


def test_a_resumed_run_has_one_history(files: Path, one_rank: Path, tmp_path: Path) -> None:
    """Records after the checkpoint are made again, the one that a kill cut off is made up for, none is there twice."""
    run_dir = tmp_path / "run"
    shutil.copytree(one_rank, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    records = run_dir / "probe"
    (records / "step_00000004.safetensors").unlink()  # saved, and killed before the texts were looked at
    (records / "step_00000006.safetensors").write_bytes(b"of a future that never was")
    (records / "step_00000009.safetensors").write_bytes(b"of a future that never was")
    (records / ".step_00000004.safetensors.tmp").write_bytes(b"half")
    run_world(train_and_report, 1, probing(files, run_dir, load=run_dir / "checkpoints"))
    ours, theirs = ProbeFolder(one_rank), ProbeFolder(run_dir)
    assert theirs.steps() == ours.steps()
    assert sorted(path.name for path in records.iterdir()) == sorted(path.name for path in ours.path.iterdir())
    for step in ours.steps():
        np.testing.assert_array_equal(theirs.read(step).loss_Ws, ours.read(step).loss_Ws)
        np.testing.assert_array_equal(theirs.read(step).kept_Ws, ours.read(step).kept_Ws)  # type: ignore[arg-type]


def test_a_resume_with_other_texts_is_refused(files: Path, one_rank: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(one_rank, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    (tmp_path / "other.jsonl").write_text('{"text": "1 2 3"}\n')
    values = probing(files, run_dir, load=run_dir / "checkpoints", probe_file=tmp_path / "other.jsonl")
    with pytest.raises(WorldError, match="--probe-file") as failed:
        run_world(command, 1, flags(values))
    assert failed.value.codes == [EXIT_UNUSABLE], "it would end in the same way again"
    assert ProbeFolder(run_dir).steps() == [2, 4]


def test_a_run_that_selects_nothing(files: Path, tmp_path: Path) -> None:
    """CLM: losses alone, no reference. A fresh run in the same folder, with or without texts, sets the records aside."""
    values = probing(files, tmp_path / "run", objective="clm", reference_load=None, train_iters=2, save_interval=None)
    run_world(train_and_report, 1, values)
    record = ProbeFolder(tmp_path / "run").read(2)
    assert record.kept_Ws is None
    assert record.score_Ws is None
    assert ProbeFolder(tmp_path / "run").texts().reference_loss_Ws is None
    run_world(train_and_report, 1, {name: value for name, value in values.items() if name != "probe-file"})
    assert not (tmp_path / "run" / "probe").exists()
    assert (tmp_path / "run" / "probe.1" / "step_00000002.safetensors").is_file()


def test_stored_scores_say_nothing_of_the_texts(files: Path, tmp_path: Path) -> None:
    """They are of the run's own samples: the texts' losses are recorded, and neither a reference's nor a selection."""
    store = tmp_path / "store"
    scoring = {"objective": "slm", "reference_load": files / "reference", "train_iters": 2}
    run_world(score_here, 1, run_flags(files / "corpus", tmp_path / "scoring", output=store, **scoring))
    values = probing(
        files, tmp_path / "run", train_iters=2, save_interval=None, reference_load=None, reference_scores=store
    )
    run_world(train_and_report, 1, values)
    folder = ProbeFolder(tmp_path / "run")
    assert folder.texts().reference_loss_Ws is None
    assert folder.read(2).kept_Ws is None
    assert (folder.read(2).loss_Ws[folder.texts().valid_Ws] > 0).all()


# ---- dynamics from records ------------------------------------------------------------------------------------


def test_dynamics_read_records(one_rank: Path, tmp_path: Path) -> None:
    """The classes of the texts' tokens without a checkpoint in reach."""
    only_records = tmp_path / "run"
    shutil.copytree(one_rank / "probe", only_records / "probe")
    output = tmp_path / "page.html"
    assert analyze(["dynamics", "--probe", str(only_records), "--output", str(output)]) == 0
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert numbers["steps"] == [2, 4, 6]
    assert numbers["tokens"] == 5 + SEQ_LENGTH + 2 + 7 + 4
    _, _, loss_CN = recorded_losses(str(only_records))
    assert numbers["mean_loss"] == pytest.approx(loss_CN.mean(axis=1).tolist(), rel=1e-6)
    assert output.read_text().count('class="doc"') == len(TEXTS)


def test_records_that_cannot_be_read(one_rank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(one_rank / "probe", run / "probe")
    common = ["dynamics", "--output", str(tmp_path / "page.html")]
    for words, message in {
        ("--probe", str(tmp_path)): "must be the folder of a run trained with --probe-file",
        ("--probe", str(run), "--text-file", "x"): "must be used without --text-file and --data-path",
        ("--probe", str(run), "--load", str(run)): "must be the only source of losses",
    }.items():
        assert analyze([*common, *words]) == 1
        assert message in capsys.readouterr().err
    path = run / "probe" / "step_00000004.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert analyze([*common, "--probe", str(run)]) == 1
    assert "step_00000004.safetensors" in capsys.readouterr().err
    path.unlink()
    assert analyze([*common, "--probe", str(run)]) == 1
    assert "number of recorded steps is 2: must be at least 3" in capsys.readouterr().err


# ---- the file -------------------------------------------------------------------------------------------------


def read(path: Path, length: int = SEQ_LENGTH) -> Any:
    return read_texts(str(path), TOKENIZER, sequence_length=length, field="--probe-file")


def test_the_files_that_are_read(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """JSON lines, compressed or not, and plain text; truncation is logged."""
    with caplog.at_level(logging.WARNING):
        samples = read(files / "texts.jsonl")
    assert samples.cut == (1,)
    assert re.search(r"line 2: using the first 17 of 20 tokens", caplog.text)
    tokens, valid, starts, *_ = samples[1]
    assert tokens.tolist() == [int(word) for word in TEXTS[1].split()][: SEQ_LENGTH + 1]
    assert valid.all()
    assert starts.size == 0
    tokens, valid, starts, *_ = samples[2]
    assert (tokens.tolist(), valid.sum(), starts.tolist()) == ([90, 2, 33] + [0] * (SEQ_LENGTH - 2), 2, [3])
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        file.write((files / "texts.jsonl").read_text() + "\n  \n")
    assert [ids.tolist() for ids in read(tmp_path / "texts.jsonl.gz").ids] == [ids.tolist() for ids in samples.ids]
    (tmp_path / "one.txt").write_text("1 2 3\n4 5\n")
    assert [ids.tolist() for ids in read(tmp_path / "one.txt").ids] == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "must be readable to its end"),
        ("empty.jsonl", b"", "must have at least one text"),
        ("blank.txt", b" \n\n", "must have at least one text"),
        ("latin.jsonl", '{"text": "1 2"}\n{"text": "é"}'.encode("latin-1"), r"line 2.*: must be UTF-8"),
        ("latin.txt", b"1 2 \xff", r"latin.txt': must be UTF-8"),
        ("plain.jsonl", b"1 2 3", r"line 1.*must be a JSON object"),
        ("keys.jsonl", b'{"text": "1 2"}\n{"content": "1 2"}', r"line 2.*must have a text under `text`"),
        ("short.jsonl", b'{"text": "5"}', r"line 1.*must have at least two tokens"),
        ("many.jsonl", b'{"text": "1 2"}\n' * (MOST_TEXTS + 1), "must have at most 256 texts"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "1 2"}' * 99, mtime=0)[:-12], "must be readable to its end"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--probe-file.*{message}"):
        read(tmp_path / name)


def test_a_text_of_other_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text('{"text": "1 two"}')
    with pytest.raises(VocabularyError, match="must be an id in"):
        read(tmp_path / "words.jsonl")


def test_records_of_losses_that_are_not_finite(one_rank: Path, tmp_path: Path) -> None:
    shutil.copytree(one_rank / "probe", tmp_path / "probe")
    loss_Ws = ProbeFolder(tmp_path).read(4).loss_Ws.copy()
    loss_Ws[0, 0] = np.nan
    ProbeFolder(tmp_path).write(ProbeRecord(step=4, loss_Ws=loss_Ws))
    with pytest.raises(AnalysisError, match="number of non-finite losses at step 4 is 1: must be 0"):
        recorded_losses(str(tmp_path))


# ---- TensorBoard ----------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """The text of a page, and of its links."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.linked, self.titles, self._inside = "", "", [], False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = self._inside or tag == "a"
        self.titles += [value for name, value in attrs if tag == "a" and name == "title"]

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "a"

    def handle_data(self, data: str) -> None:
        self.text += data
        self.linked += data * self._inside


def test_text_survives_tensorboards_own_filter() -> None:
    """What TensorBoard makes of it shows every character of the text, and the kept tokens as links with their losses."""
    from tensorboard.plugin_util import markdown_to_safe_html

    pieces = ("a", " **b**", "_c_", "<i>", "[x](y)", " `z`", "|", "#", "\n", "- é", '"q"', "&amp;")
    count = len(pieces) - 1
    kept_Ws = (np.arange(count) % 2 == 0)[None]
    texts = ProbedTexts(
        tokens_Ws1=np.zeros((1, count + 1), np.int64),
        valid_Ws=np.ones((1, count), np.bool_),
        token_texts=(pieces,),
        sources=("line 1",),
        reference_loss_Ws=np.full((1, count), 0.5, np.float32),
    )
    loss_Ws = np.arange(count, dtype=np.float32)[None]
    record = ProbeRecord(step=3, loss_Ws=loss_Ws, score_Ws=loss_Ws - 0.5, kept_Ws=kept_Ws)
    shown = Links()
    shown.feed(markdown_to_safe_html(_markdown(texts, record, 0)))
    assert shown.text.endswith("".join(pieces).replace("\n", "↵"))
    assert shown.linked == "".join(p for p, kept in zip(pieces[1:], kept_Ws[0], strict=True) if kept).replace("\n", "↵")
    assert shown.titles[1] == "loss 2.000, reference 0.500, score +1.500"


def test_long_texts_are_cut_where_they_are_shown() -> None:
    """An evaluation adds a bounded amount to the event file."""
    count = 3 * TOKENS_SHOWN
    texts = ProbedTexts(
        tokens_Ws1=np.zeros((1, count + 1), np.int64),
        valid_Ws=np.ones((1, count), np.bool_),
        token_texts=(("x",) * (count + 1),),
        sources=("line 1",),
    )
    record = ProbeRecord(step=1, loss_Ws=np.ones((1, count), np.float32))
    assert _markdown(texts, record, 0).count("x") == TOKENS_SHOWN + 1


def test_a_picture_of_a_text() -> None:
    """As wide as a line; underlined where tokens are kept, dark where the loss is high."""
    pieces = ("a", "b" * 200, "c\n", "d")
    picture = text_picture(pieces, np.array([9.0, 0.1, 1.5], np.float32), np.array([True, False, True]))
    assert picture.dtype == np.uint8
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert (0x0B, 0x4F, 0x82) in colours
    assert (0xD5, 0x5E, 0x00) in colours
    none = text_picture(pieces, np.array([9.0, 0.1, 1.5], np.float32), None)
    assert (0xD5, 0x5E, 0x00) not in {tuple(colour) for colour in none.reshape(-1, 3)}


def test_what_is_shown_in_tensorboard(one_rank: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(one_rank / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    tags = board.Tags()
    assert {f"probe/{name}" for name in ("loss", "loss_kept", "loss_not_kept", "score", "excess_loss")} <= {
        *tags["histograms"]
    }
    assert [event.step for event in board.Histograms("probe/loss")] == [2, 4, 6]
    assert {f"probe/text {n + 1}" for n in range(len(TEXTS))} <= {*tags["images"]}
    assert "probe/text 1/text_summary" in tags["tensors"]
