"""Training: the model card, Markdown with the YAML front matter that model hubs read.

Rules:
* pure: every fact comes in as an argument; what nobody said is said to be missing, never made up;
* scalars are written as JSON strings, which are YAML too: no title can break out of the front matter.

Source: Mitchell et al., "Model Cards for Model Reporting", 2019; the Hugging Face model card metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import msgspec

from lightship_agent.contract.schema import Feature, FeatureSchema

from .metrics import Metrics

_SHOWN: Final = 50
#: A correlation below it has no one direction.
_MIXED: Final = 0.3
_NOT_SAID: Final = "Not stated by the people who trained this model."


class CardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a card is made of.

    Attributes:
        model: registered name.
        version: registered version.
        created: RFC 3339, UTC.
        estimator: the recipe's estimator.
        schema: what goes in.
        labels: class names, empty for regression.
        target: what is predicted.
        metrics: on held-out rows.
        dataset_name: of the training data.
        dataset_digest: of the training data.
        dataset_rows: of the training data.
        recipe_digest: of the recipe.
        code_revision: of the code.
        environment: from `environment.capture`.
        importances: share by feature.
        importance_method: how they were found.
        effects: by feature, -1 to 1, how a higher value moves the second class's score, or the value.
        warnings: what the estimator warned of.
        licence: an SPDX identifier in lower case, empty when not stated.
        intended_use: by the people who trained it.
        out_of_scope: uses that it is not made for.
        limitations: by the people who trained it.
        contact: whom to ask.
    """

    model: str
    version: int
    created: str
    estimator: str
    schema: FeatureSchema
    labels: tuple[str, ...] = ()
    target: str = ""
    metrics: Metrics
    dataset_name: str
    dataset_digest: str
    dataset_rows: int
    recipe_digest: str = ""
    code_revision: str = ""
    environment: dict[str, str] = {}
    importances: dict[str, float] = {}
    importance_method: str = ""
    effects: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    licence: str = ""
    intended_use: str = ""
    out_of_scope: str = ""
    limitations: str = ""
    contact: str = ""


def render_card(facts: CardFacts) -> str:
    """The card as Markdown; the same facts give the same text."""
    sections = [
        _front_matter(facts),
        f"# {facts.model} version {facts.version}\n",
        _overview(facts),
        f"## Intended use\n\n{facts.intended_use or _NOT_SAID}\n",
        f"## Out of scope\n\n{facts.out_of_scope or _NOT_SAID}\n",
        _evaluation(facts.metrics),
        _inputs(facts),
        _training(facts),
        _limitations(facts),
        f"## Contact\n\n{facts.contact or _NOT_SAID}\n",
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(facts: CardFacts) -> str:
    task = f"tabular-{facts.metrics.task}"
    lines = ["---"]
    if facts.licence:
        lines.append(f"license: {_quote(facts.licence)}")
    lines += [
        "library_name: onnx",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {_quote(tag)}" for tag in ("lightship", "onnx", facts.estimator)),
        "model-index:",
        f"- name: {_quote(facts.model)}",
        "  results:",
        "  - task:",
        f"      type: {task}",
        "    dataset:",
        f"      name: {_quote(facts.dataset_name)}",
        f"      type: {_quote(facts.dataset_name)}",
        f"      revision: {_quote(facts.dataset_digest)}",
        "    metrics:",
    ]
    for name, value in sorted(facts.metrics.values.items()):
        lines += [f"    - type: {_quote(name)}", f"      value: {value:.6f}"]
    return "\n".join([*lines, "---", ""])


def _overview(facts: CardFacts) -> str:
    what = f"Predicts {_cell(facts.target)}" if facts.target else "Predicts"
    kind = f"one of {len(facts.labels)} classes" if facts.labels else "a number"
    text = f"{what}: {kind}, from {facts.schema.width} features. Made on {facts.created} with `{facts.estimator}`."
    if facts.labels:
        names = ", ".join(_cell(label) for label in facts.labels[:_SHOWN])
        text += f"\n\nClasses: {names}{', …' if len(facts.labels) > _SHOWN else ''}."
    return f"{text}\n"


def _evaluation(metrics: Metrics) -> str:
    rows = [(name, f"{value:.4f}") for name, value in sorted(metrics.values.items())]
    parts = [f"## Evaluation\n\nOn {metrics.rows} held-out rows.\n", _table(("metric", "value"), rows)]
    if metrics.per_class:
        per_class = [
            (_cell(c.label), f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", str(c.support))
            for c in metrics.per_class[:_SHOWN]
        ]
        parts.append(_table(("class", "precision", "recall", "f1", "rows"), per_class))
        parts.append(_more(len(metrics.per_class), "classes"))
    return "\n".join(part for part in parts if part)


def _inputs(facts: CardFacts) -> str:
    head: tuple[str, ...] = ("feature", "unit", "lowest seen", "highest seen", "may be missing", "importance")
    rows: list[tuple[str, ...]] = [
        (f.name, _cell(f.unit), *_seen(f), "yes" if f.nullable else "no", _share(facts, f.name))
        for f in facts.schema.features[:_SHOWN]
    ]
    if facts.effects:
        head = (*head, f"a higher value makes {_cell(facts.labels[1]) if facts.labels else 'the value'}")
        words = ("more likely", "less likely") if facts.labels else ("higher", "lower")
        rows = [(*row, _effect(facts.effects.get(row[0], 0.0), *words)) for row in rows]
    method = f"\nImportance: {_cell(facts.importance_method)}.\n" if facts.importance_method else ""
    return f"## Inputs\n\n{_table(head, rows)}{_more(facts.schema.width, 'features')}{method}"


def _seen(feature: Feature) -> tuple[str, str]:
    """Lowest and highest of a number; of categories the first and the last."""
    if feature.is_categorical:
        return _cell(feature.levels[0]), f"{_cell(feature.levels[-1])} ({len(feature.levels)} categories)"
    return _number(feature.low), _number(feature.high)


def _training(facts: CardFacts) -> str:
    lines = [
        f"* Dataset: {_cell(facts.dataset_name)}, {facts.dataset_rows} rows, sha256:{facts.dataset_digest}",
        f"* Recipe: sha256:{facts.recipe_digest or 'unknown'}",
        f"* Code revision: {_cell(facts.code_revision) or 'unknown'}",
        *(f"* {name}: {version}" for name, version in sorted(facts.environment.items())),
    ]
    return "## Training\n\n" + "\n".join(lines) + "\n"


def _limitations(facts: CardFacts) -> str:
    lines = [facts.limitations or _NOT_SAID, ""]
    lines.append("* Inputs outside the ranges above were never seen in training.")
    small = [c.label for c in facts.metrics.per_class if c.support < 30]
    if small:
        named = ", ".join(_cell(label) for label in small[:_SHOWN])
        lines.append(f"* Fewer than 30 held-out rows, so these classes' figures are rough: {named}.")
    lines += [f"* While training: {_cell(warning)}" for warning in facts.warnings[:10]]
    return "## Limitations\n\n" + "\n".join(lines) + "\n"


def _effect(correlation: float, up: str, down: str) -> str:
    if abs(correlation) < _MIXED:
        return "either"
    return up if correlation > 0 else down


def _share(facts: CardFacts, name: str) -> str:
    return f"{facts.importances[name]:.3f}" if name in facts.importances else "-"


def _more(count: int, what: str) -> str:
    return f"\nAnd {count - _SHOWN} more {what}.\n" if count > _SHOWN else ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    """Text that stays within its line and table cell, cut to a readable length."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:200]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
