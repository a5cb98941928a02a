"""Self-contained HTML pages without network access, for phones, dark mode and color-blind readers.

Parts are `Markup`: `Markup.format` escapes everything else, so that text from a corpus is never executed.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from megatron_slm.files import write_durably

STYLE = """
:root { --page:#f8fafc; --card:#fff; --text:#1f2937; --soft:#5b6470; --line:#e1e5ea; --accent:#0072B2;
  --mono:ui-monospace,"DejaVu Sans Mono",Menlo,monospace; color-scheme:light dark }
@media (prefers-color-scheme: dark) { :root { --page:#0f141a; --card:#171d25; --text:#e5e9ee; --soft:#a3adb9;
  --line:#2b3440; --accent:#56B4E9 } img { filter:none; background:#fff } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--text); font:16px/1.55 system-ui,sans-serif }
main { max-width:1180px; margin:0 auto; padding:2rem 1.1rem 4rem }
h1 { font-size:1.6rem; line-height:1.2; margin:0 0 .4rem } h2 { font-size:1.15rem; margin:2.4rem 0 .5rem }
p { max-width:48rem; margin:.4rem 0 } .soft { color:var(--soft); font-size:.9rem }
.verdict { font-size:1.08rem; border-left:4px solid var(--accent); padding-left:.9rem; margin:1.1rem 0 }
.wide { overflow-x:auto } table { border-collapse:collapse; font-variant-numeric:tabular-nums; margin:.7rem 0;
  font-size:.93rem } th,td { text-align:right; padding:.38rem .8rem; border-bottom:1px solid var(--line);
  white-space:nowrap } th { color:var(--soft); font-weight:500 }
th:first-child,td:first-child { text-align:left; padding-left:0 }
.grid { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr)); gap:1rem; margin:.8rem 0 }
figure { margin:0 } img { display:block; width:100%; border-radius:10px; border:1px solid var(--line) }
.bar { display:inline-block; width:7rem; height:.62rem; border-radius:3px; margin-right:.6rem;
  background:linear-gradient(90deg,var(--accent) var(--share),var(--line) var(--share)) }
.docs { columns:2 27rem; column-gap:.9rem; margin-top:1rem }
.doc { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:.7rem .9rem; margin:0 0 .9rem;
  break-inside:avoid; white-space:pre-wrap; overflow-wrap:anywhere; font:13px/1.8 var(--mono) }
.doc h3 { margin:0 0 .3rem; font:600 12px/1.4 system-ui,sans-serif; color:var(--soft) }
.t,.key { border-radius:3px; padding:.1em 0; box-shadow:inset -1px 0 0 var(--card) }
.key { padding:.1em .5em; margin:0 .5rem .3rem 0; font-family:var(--mono); font-size:.85rem; display:inline-block }
.t:hover,.t:focus { outline:2px solid currentColor } .u { color:var(--soft); border-bottom:1px dotted var(--soft) }
#tip { position:fixed; left:0; right:0; bottom:0; margin:0; padding:.55rem 1rem; background:var(--text);
  color:var(--page); font:14px/1.4 var(--mono); max-width:none } #tip:empty { display:none }
@media (max-width:40rem) { main { padding:1.2rem .8rem 4rem } th,td { padding:.3rem .22rem; font-size:.77rem;
  white-space:normal } .bar { display:block; width:2.6rem; margin:.15rem 0 .15rem auto } }
"""

# Touch screens cannot hover: a tap shows the token's tooltip at the bottom of the page.
_TIPS = """
const tip=document.getElementById('tip');
document.addEventListener('click',e=>{const t=e.target.closest('.t');tip.textContent=t?(t.title||''):''});
"""


def join(parts: Iterable[Markup], separator: str = "") -> Markup:
    """Concatenate parts."""
    return Markup(separator).join(parts)


def paragraph(text: str | Markup, kind: str = "") -> Markup:
    """Return a paragraph of the CSS class `kind`."""
    return Markup('<p class="{}">{}</p>\n').format(kind, text)


def listed(names: Sequence[str]) -> str:
    """Return names as text: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def heading(text: str) -> Markup:
    """Return a section heading."""
    return Markup("<h2>{}</h2>\n").format(text)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table; escapes cells that are not `Markup`."""
    head = join(Markup("<th>{}</th>").format(text) for text in heads)
    body = join(
        Markup("<tr>{}</tr>\n").format(join(Markup("<td>{}</td>").format(cell) for cell in row)) for row in rows
    )
    return Markup('<div class="wide"><table><tr>{}</tr>\n{}</table></div>\n').format(head, body)


def share_bar(share: float) -> Markup:
    """Return a share in [0, 1] as a bar and a percentage."""
    return Markup('<span class="bar" style="--share:{:.1f}%"></span>{:.1f}&nbsp;%').format(100 * share, 100 * share)


def pictures(named_svgs: Iterable[tuple[str, bytes]]) -> Markup:
    """Return pictures with their descriptions, side by side on wide screens and in one column on phones."""
    figures = (
        Markup('<figure><img alt="{}" src="data:image/svg+xml;base64,{}"></figure>\n').format(
            text, base64.b64encode(svg).decode("ascii")
        )
        for text, svg in named_svgs
    )
    return Markup('<div class="grid">\n{}</div>\n').format(join(figures))


def visible(text: str) -> str:
    """Make line breaks, tabs and empty text visible; does not escape."""
    return text.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "↵\n") or "▫"


def token(text: str, kind: str, tip: str) -> Markup:
    """Return one token of the CSS class `kind` with a tooltip."""
    return Markup('<span class="t {}" title="{}">{}</span>').format(kind, tip, visible(text))


def document_card(title: str, tokens: Iterable[Markup]) -> Markup:
    """Return a document, token by token."""
    return Markup('<div class="doc"><h3>{}</h3>{}</div>\n').format(title, join(tokens))


def legend(kinds: Iterable[tuple[str, str]]) -> Markup:
    """Return a legend of (CSS class, meaning) pairs."""
    return paragraph(join(Markup('<span class="key {}">{}</span>').format(kind, text) for kind, text in kinds))


def write_page(path: Path, title: str, parts: Iterable[Markup], style: str = "") -> Path:
    """Write a page durably and return its path."""
    content = Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>{}</title><style>{}</style></head><body><main>\n<h1>{}</h1>\n{}"
        '</main><p id="tip" aria-live="polite"></p><script>{}</script></body></html>\n'
    ).format(title, Markup(STYLE + style), title, join(parts), Markup(_TIPS))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, content.encode("utf-8"))
    return path
