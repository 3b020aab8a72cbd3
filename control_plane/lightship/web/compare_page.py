"""Web: two tables compared, as one HTML file without anything outside it.

Rules of this file: pure; every word from outside is escaped; plots are those of the dashboard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from lightship.monitoring.compare import Comparison

from . import figures
from .plots import text

_CSS: Final = Path(__file__).resolve().parent / "static" / "lightship.css"
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PLOTS: Final = 60


def compare_page(found: Comparison, reference: str, current: str) -> str:
    """The page.

    Args:
        found: the comparison.
        reference: what the reference is called.
        current: what the other is called.
    """
    css = _CSS.read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>Drift: {text(current)} against {text(reference)}</title><style>{css}</style></head><body><main>
<h1>{text(current)} against {text(reference)}</h1>
<p><strong>{_headline(found)}</strong></p>
<p>{found.current_rows:,} rows against {found.reference_rows:,}. Chance of a false alarm: {found.alpha:g}.
Tolerated: {found.floor:g} on the scale of PSI. PSI is debiased, with its 95 % interval; it decides nothing.</p>
<div class="scroll"><table><thead><tr><th>Column</th><th>PSI</th><th>95 % interval</th><th>p</th><th></th></tr></thead>
<tbody>{_rows(found)}</tbody></table></div>
{_faults(found)}{_joint(found)}
<section><h2>Side by side</h2><div class="pairs">{_plots(found)}</div></section>
</main></body></html>
"""


def _headline(found: Comparison) -> str:
    if not found.drift:
        return "No drift."
    parts = [f"{len(found.drifted)} of {len(found.columns)} columns: {text(', '.join(found.drifted[:8]))}"]
    if found.joint_drift:
        parts.append("columns go together otherwise than before")
    return f"Drift. {'; '.join(parts if found.drifted else parts[1:])}."


def _rows(found: Comparison) -> str:
    return "".join(
        f"<tr><td>{text(c.name)}</td><td>{c.psi:.3f}</td><td>{c.psi_low:.3f} to {c.psi_high:.3f}</td>"
        f"<td>{c.p_value:.1e}</td><td>{'drift' if c.alarm else ''}</td></tr>"
        for c in found.columns
    )


def _faults(found: Comparison) -> str:
    if not found.quality:
        return ""
    words = {"missing": "is missing", "range": "is out of range", "stuck": "does not move"}
    items = "".join(
        f"<li>{text(q.name)} {words[q.kind]}: {q.rate:.1%} against {q.reference_rate:.1%}</li>" for q in found.quality
    )
    return f"<h2>Data quality</h2><ul>{items}</ul>"


def _joint(found: Comparison) -> str:
    if found.joint is None or not found.joint_drift:
        return ""
    j = found.joint
    said = f"The correlation of {text(j.pair[0])} and {text(j.pair[1])} was {j.before:+.2f} and is {j.now:+.2f}."
    if j.swapped:
        said += f" {text(j.swapped[0])} and {text(j.swapped[1])} look as if they had changed places."
    return f"<h2>Columns together</h2><p>{said}</p>"


def _plots(found: Comparison) -> str:
    return "".join(str(figures.shift_pair(msgspec.to_builtins(c))) for c in found.columns[:_PLOTS])
