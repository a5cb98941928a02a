"""The quickstart's result page: curves of its three runs, headline numbers, and which tokens SLM keeps.

Reads `summary.json` and the runs' `metrics.jsonl` in the run folder, and two Hugging Face folders (model,
reference). Writes `curves.png` and `report.html`, which needs no other file, beside the summary.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Okabe and Ito's palette: distinct for every common kind of colour blindness.
CLM_COLOUR, SLM_COLOUR, REFERENCE_COLOUR = "#D55E00", "#0072B2", "#6b7280"
SMOOTHING_SHARE = 0.04  # width of the running mean of the training losses, of the logged steps

Curve = list[tuple[float, float]]  # tokens trained on, loss in nats
RUNS = {"reference": "reference (CLM, curated)", "clm": "CLM, noisy", "slm": "SLM, noisy"}


@dataclass(frozen=True, slots=True)
class Run:
    """The logged lines of one run, training and evaluation apart."""

    training: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read the `metrics.jsonl` of a run's folder."""
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        evaluations = tuple(line for line in lines if line.get("event") == "eval")
        return cls(tuple(line for line in lines if "event" not in line), evaluations)

    def held_out(self, name: str) -> Curve:
        """The losses on the evaluation set `name`."""
        return [(line["tokens"], line["loss"]) for line in self.evaluations if line["set"] == name]

    def training_losses(self, key: str) -> Curve:
        """The training losses logged as `key`, without the lines that have none, as a running mean."""
        lines = [line for line in self.training if line.get(key) is not None]
        values = [float(line[key]) for line in lines]
        width = max(1, round(len(values) * SMOOTHING_SHARE))
        means = [fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]
        return [(line["tokens"], mean) for line, mean in zip(lines, means, strict=True)]


def _plot(axes: Axes, title: str, curves: Sequence[tuple[str, str, str, Curve]]) -> None:
    """Draw `(name, colour, line style, curve)`s, each labelled at its end with its name and last loss."""
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=12)
    axes.set_xlabel("training tokens (millions)", color="#374151")
    axes.tick_params(color="#9ca3af", labelcolor="#374151")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#9ca3af")
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    curves = [curve for curve in curves if curve[3]]
    if not curves:
        return
    for _, colour, style, curve in curves:
        tokens, losses = zip(*curve, strict=True)
        axes.plot([count / 1e6 for count in tokens], losses, style, color=colour, lw=1.9)
    # The losses of an almost untrained model would flatten the part that tells the runs apart.
    high = max(loss for *_, curve in curves for _, loss in curve[len(curve) // 4 :])
    low = min(loss for *_, curve in curves for _, loss in curve)
    margin = (high - low) * 0.08 or 0.1
    axes.set(xlim=(0, None), ylim=(low - margin, high + margin))
    height, gap = -math.inf, (high - low + 2 * margin) * 0.062
    for name, colour, _, curve in sorted(curves, key=lambda entry: entry[3][-1][1]):
        height, label = max(curve[-1][1], height + gap), f"{name} {curve[-1][1]:.3f}"
        axes.text(1.015, height, label, color=colour, va="center", transform=axes.get_yaxis_transform())


def draw_curves(run_dir: Path) -> Path:
    """Draw the runs of `run_dir` into its `curves.png`: held-out losses left, training losses right."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    clm, slm = Run.read(run_dir / "clm"), Run.read(run_dir / "slm")
    last = max((tokens for tokens, _ in clm.held_out("target") + slm.held_out("target")), default=1.0)
    reference = [(tokens, summary["reference"]["target_loss"]) for tokens in (0.0, last)]
    held_out = [
        ("CLM", CLM_COLOUR, "-", clm.held_out("target")),
        ("SLM", SLM_COLOUR, "-", slm.held_out("target")),
        ("reference", REFERENCE_COLOUR, "--", reference),
    ]
    training = [
        ("CLM, all tokens", CLM_COLOUR, "-", clm.training_losses("loss_all")),
        ("SLM, all tokens", SLM_COLOUR, "-", slm.training_losses("loss_all")),
        ("SLM, tokens not kept", SLM_COLOUR, ":", slm.training_losses("loss_unselected")),
        ("SLM, kept tokens", SLM_COLOUR, "--", slm.training_losses("loss")),
    ]
    figure = Figure(figsize=(12.4, 4.5), dpi=160)
    left, right = figure.subplots(1, 2)
    _plot(left, "Loss on held-out curated text", held_out)
    _plot(right, "Training loss on the noisy corpus", training)
    left.set_ylabel("loss (nats per token)", color="#374151")
    figure.tight_layout(w_pad=2.5)
    path = run_dir / "curves.png"
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15, facecolor="white")
    return path


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a held-out document. The first is predicted from nothing: no losses, `kept` is None."""

    text: str
    kind: str | None
    token_loss: float = math.nan
    reference_loss: float = math.nan
    kept: bool | None = None

    @property
    def excess_loss(self) -> float:
        """Token loss minus reference loss, in nats."""
        return self.token_loss - self.reference_loss


def keep_highest(scores: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """A mask of the `ceil(keep_ratio * len(scores))` highest scores, ties to the lower position."""
    order = torch.sort(scores, descending=True, stable=True).indices
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order[: math.ceil(keep_ratio * len(scores))]] = True
    return kept


def _split(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> tuple[list[int], list[str]]:
    """The first `context` token ids of `text` and the text of each; the texts join to the text they cover."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [0, *(end for _, end in encoded["offset_mapping"][:context])]
    return encoded["input_ids"][:context], [text[start:end] for start, end in pairwise(ends)]


def _kinds(texts: Sequence[str], spans: Sequence[tuple[str, int]]) -> list[str | None]:
    """What each token's first character is part of, by the document's spans; None where they do not say."""
    ends = list(accumulate(length for _, length in spans))
    starts = accumulate((len(text) for text in texts[:-1]), initial=0)
    names = [*(kind for kind, _ in spans), None]
    return [names[bisect_right(ends, start)] for start in starts]


@torch.no_grad()
def _token_losses(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The fp32 loss in nats of every token but the first."""
    tokens = torch.tensor([list(ids)])
    return cross_entropy(model(tokens).logits[0, :-1].float(), tokens[0, 1:], reduction="none")


def score_documents(
    model_dir: str, reference_dir: str, records: Sequence[Mapping[str, Any]], keep_ratio: float
) -> list[list[Token]]:
    """Score the documents, cut to the models' context, and select over all of them as one micro-batch."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folders = (model_dir, reference_dir)
    model, reference = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in folders)
    if model.config.vocab_size != reference.config.vocab_size:
        raise SystemExit(
            f"--model has {model.config.vocab_size} tokens, --reference has {reference.config.vocab_size}. "
            "Losses compare only over one vocabulary: train both with one tokenizer."
        )
    context = min(model.config.max_position_embeddings, reference.config.max_position_embeddings)
    scored = []
    for record in records:
        ids, texts = _split(tokenizer, record["text"], context)
        if ids:
            kinds = _kinds(texts, record.get("spans", ()))
            scored.append((texts, kinds, _token_losses(model, ids), _token_losses(reference, ids)))
    kept = iter(keep_highest(torch.cat([own - other for *_, own, other in scored]), keep_ratio).tolist())
    documents = []
    for texts, kinds, own, other in scored:
        rows = zip(texts[1:], kinds[1:], own.tolist(), other.tolist(), strict=True)
        documents.append([Token(texts[0], kinds[0]), *(Token(*row, kept=next(kept)) for row in rows)])
    return documents


STYLE = """
:root { --page:#f8fafc; --card:#fff; --text:#1f2937; --soft:#6b7280; --line:#e5e7eb; --kept:#a9d4f5;
  --kept-text:#06283d; --left:#f1f3f5; --left-text:#7b8490; --mono:ui-monospace,"DejaVu Sans Mono",monospace;
  color-scheme:light dark }
@media (prefers-color-scheme: dark) { :root { --page:#0f141a; --card:#171d25; --text:#e5e9ee; --soft:#9aa5b1;
  --line:#2b3440; --kept:#0a5c94; --kept-text:#f2f9ff; --left:#1f2730; --left-text:#84909c } }
body { margin:0; background:var(--page); color:var(--text); font:16px/1.55 system-ui,sans-serif }
main { max-width:1080px; margin:0 auto; padding:2.5rem 1.25rem 4rem }
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 .4rem } h2 { font-size:1.15rem; margin:2.6rem 0 .6rem }
p { max-width:46rem; margin:.4rem 0 } .soft { color:var(--soft); font-size:.9rem }
.verdict { font-size:1.12rem; border-left:4px solid #0072B2; padding-left:.9rem; margin:1.2rem 0 }
.verdict.worse { border-color:#D55E00 } img { display:block; width:100%; border-radius:10px }
table { border-collapse:collapse; font-variant-numeric:tabular-nums; margin:.8rem 0; font-size:.95rem }
th,td { text-align:right; padding:.42rem .95rem; border-bottom:1px solid var(--line) }
th { color:var(--soft); font-weight:500 } th:first-child,td:first-child { text-align:left; padding-left:0 }
.bar { display:inline-block; width:8rem; height:.62rem; border-radius:3px; margin-right:.6rem;
  background:linear-gradient(90deg,#0072B2 var(--share),var(--line) var(--share)) }
.docs { columns:2 27rem; column-gap:.9rem; margin-top:1.2rem }
.doc { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:.8rem 1rem;
  margin:0 0 .9rem; break-inside:avoid; white-space:pre-wrap; overflow-wrap:anywhere;
  font:13px/1.75 var(--mono) }
.t,.key { border-radius:3px; padding:.1em 0; box-shadow:inset -1px 0 0 var(--card) }
.key { padding:.1em .5em; margin-right:.4rem; font-family:var(--mono); font-size:.85rem }
.k { background:var(--kept); color:var(--kept-text) } .d { background:var(--left); color:var(--left-text) }
.u { color:var(--soft); border-bottom:1px dotted var(--soft) } .t:hover { outline:1.5px solid currentColor }
"""


def _visible(text: str) -> str:
    """Escaped text whose line ends, tabs, and empty or undecodable rest can be seen."""
    shown = html.escape(text.replace("\r", "␍").replace("\t", "⇥\t"), quote=True).replace("\n", "↵\n")
    return shown or "▫"


def _span(token: Token) -> str:
    """One token as a span: `t k` kept, `t d` not kept, `t u` not scored; its losses in the tooltip."""
    if token.kept is None:
        return f'<span class="t u" title="first token, not scored">{_visible(token.text)}</span>'
    word = "kept" if token.kept else "not kept"
    losses = f"token loss {token.token_loss:.3f}, reference loss {token.reference_loss:.3f}"
    title = f"{word}: {losses}, excess {token.excess_loss:+.3f}"
    return f'<span class="t {"k" if token.kept else "d"}" title="{title}">{_visible(token.text)}</span>'


def token_page(documents: Sequence[Sequence[Token]], keep_ratio: float) -> str:
    """The part of the page that shows the documents token by token, with a legend and the shares kept."""
    scored = [token for document in documents for token in document if token.kept is not None]
    kept = sum(token.kept is True for token in scored)
    cards = "\n".join(f'<div class="doc">{"".join(map(_span, document))}</div>' for document in documents)
    return f"""<h2>Which tokens are kept</h2>
<p>{len(documents)} held-out noisy documents, ranked together as one micro-batch: of {len(scored):,} tokens,
the {kept:,} ({keep_ratio:.0%}) with the highest excess loss (the trained model's token loss minus the
reference's, in nats) are kept. Point at a token for its losses. Documents are cut at the models' context.</p>
<p class="soft"><span class="key k">kept</span><span class="key d">not kept</span>
<span class="key u">not scored</span> ↵ is a line end</p>
{_kind_table(scored)}
<div class="docs">{cards}</div>"""


def _kind_table(tokens: Sequence[Token]) -> str:
    """Share kept and mean losses by what the tokens are part of; empty where the documents do not say."""
    names, rows = ("token_loss", "reference_loss", "excess_loss"), []
    for kind, count in Counter(token.kind for token in tokens if token.kind).most_common():
        own = [token for token in tokens if token.kind == kind]
        share = sum(token.kept is True for token in own) / count
        means = (fmean(getattr(token, name) for token in own) for name in names)
        bar = f'<span class="bar" style="--share:{share:.1%}"></span>{share:\u2007>4.0%}'
        rows.append((html.escape(kind), f"{count:,}", bar, *(f"{mean:.2f}" for mean in means)))
    heads = ("part of the document", "tokens", "kept", "mean loss", "mean reference loss", "mean excess")
    return _table(heads, rows) if rows else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{head}</th>" for head in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div style="overflow-x:auto"><table><tr>{head}</tr>\n{body}</table></div>'


def _tokens_to_reach(curve: Curve, loss: float) -> float | None:
    """After how many tokens the curve first falls to `loss`, linear between points; None if it never does."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss < high:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def verdict(summary: Mapping[str, Any], slm: Run) -> str:
    """In words and as HTML, which of the two runs ends lower on held-out curated text, and by how much."""
    clm_loss, slm_loss = summary["clm"]["target_loss"], summary["slm"]["target_loss"]
    figures = f"{slm_loss:.3f} against {clm_loss:.3f} nats per token on held-out curated text"
    if not slm_loss < clm_loss:
        return f'<p class="verdict worse">SLM is not better than CLM in this run: {figures}.</p>'
    words = f"SLM ends lower than CLM: {figures} ({1 - math.exp(slm_loss - clm_loss):.1%} less perplexity)."
    curve = slm.held_out("target")
    if reached := _tokens_to_reach(curve, clm_loss):
        words += f" It reaches CLM's final loss after {reached / curve[-1][0]:.0%} of the training tokens."
    return f'<p class="verdict">{words}</p>'


def _headline_rows(run_dir: Path, summary: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each run: its held-out losses, the tokens it read, and those it was trained on."""
    for name, title in RUNS.items():
        run, loss = Run.read(run_dir / name), summary[name]["target_loss"]
        noisy = f"{run.held_out('noisy')[-1][1]:.3f}" if run.held_out("noisy") else "n/a"
        tokens = run.training[-1]["tokens"] if run.training else 0
        valid = sum(line["valid_tokens"] for line in run.training)
        trained = tokens * sum(line["kept_tokens"] for line in run.training) / max(valid, 1)
        counts = (f"{tokens / 1e6:.2f} M", f"{trained / 1e6:.2f} M")
        yield title, f"<b>{loss:.3f}</b>", f"{math.exp(loss):.3f}", noisy, *counts


def write_report(run_dir: Path, documents: Sequence[Sequence[Token]], keep_ratio: float) -> Path:
    """Draw the curves and write `report.html` with the numbers, the picture and the documents."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    picture = base64.b64encode(draw_curves(run_dir).read_bytes()).decode("ascii")
    heads = ("run", "held-out curated loss", "perplexity", "held-out noisy loss", "tokens read", "trained on")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quickstart: selective language modeling</title><style>{STYLE}</style></head><body><main>
<h1>Selective language modeling, quickstart</h1>
<p>A reference learnt clean worked arithmetic. Then one start model was trained twice on the same noisy text:
on all tokens (CLM), and on the {summary["keep_ratio"]:.0%} of each micro-batch with the highest excess loss
(SLM).</p>
{verdict(summary, Run.read(run_dir / "slm"))}
{_table(heads, list(_headline_rows(run_dir, summary)))}
<p class="soft">Losses in nats per token. One run each, one seed; {summary["seconds"]:,.0f} seconds in all.
SLM does not learn what it does not keep: a low loss on noisy text is not what it is trained for.</p>
<h2>Curves</h2>
<img alt="Left: held-out curated loss against training tokens. Right: training losses on the noisy corpus."
 src="data:image/png;base64,{picture}">
{token_page(documents, keep_ratio)}
</main></body></html>
"""
    (run_dir / "report.html").write_text(page, encoding="utf-8")
    return run_dir / "report.html"


def main() -> None:
    """Parse the command line, score the documents, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True, help="folder with summary.json and the runs")
    parser.add_argument("--model", required=True, help="Hugging Face folder of the trained model")
    parser.add_argument("--reference", required=True, help="Hugging Face folder of the reference")
    parser.add_argument("--text-file", type=Path, required=True, help="JSON lines with the documents to show")
    parser.add_argument("--keep-ratio", type=float, default=0.6)
    parser.add_argument("--documents", type=int, default=12, help="how many of the first documents to show")
    arguments = parser.parse_args()
    if not 0 < arguments.keep_ratio <= 1:
        parser.error(f"--keep-ratio {arguments.keep_ratio}: must be above 0 and at most 1")
    with arguments.text_file.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, arguments.documents)]
    documents = score_documents(arguments.model, arguments.reference, records, arguments.keep_ratio)
    print(f"report: {write_report(arguments.run_dir, documents, arguments.keep_ratio)}")


if __name__ == "__main__":
    main()
