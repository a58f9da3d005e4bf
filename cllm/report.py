"""`cllm report SWEEP`: a sweep as one HTML file that needs nothing else: no network, no other file.

What a reader wants first comes first: the verdict, what to be careful about, confirmed settings, their
comparisons; then all settings, figures, and each trial with the command that reproduces it. Of 2,000 trials
the table, the summaries and the first records are read, and all records of the best seven settings alone.
"""

import html
import re
import shlex
from collections import Counter
from pathlib import Path

from cllm import figures, records, verdict
from cllm.errors import InputError
from cllm.files import write_atomic
from cllm.sweep import folder

__all__ = ["page", "write"]

MOST_COMPARISONS = 60


def write(directory, out=None):
    """Write a sweep's report.

    Parameters
    ----------
    directory : path-like
        The sweep's.
    out : path-like, optional
        The HTML file; by default report.html in `directory`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        When there is no sweep, or its files are damaged.
    OSError
        When there is nothing at all, or the file cannot be written.
    """
    out = Path(directory, "report.html") if out is None else Path(out)
    write_atomic(out, page(directory))
    return out


def page(directory):
    """The report as HTML.

    Parameters
    ----------
    directory : path-like

    Returns
    -------
    str
    """
    directory = Path(directory)
    sweep, results = folder.contents(directory)
    found = records.Run(directory).summary or verdict.conclude(sweep, results)
    title = f"Sweep {directory.resolve().name}"
    config = sweep.config
    where = "at the last step" if config.at == "last" else "at its best"
    what = f"Objective: {config.objective} {where}, to {config.goal}"
    states = ", ".join(f"{n:,} {state}" for state, n in found["trials"].items() if n)
    head = f"{_text(what)}. {len(sweep.numbers):,} settings; trials: {_text(states)}."
    cautions = found["warnings"]
    sentences = [line for line in found["verdict"].split("\n") if line not in cautions]
    first, *rest = sentences or ["There is no verdict yet."]
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=lead>{head}</p>",
        _section("Verdict", f"<p class=first>{_text(first)}</p>", *(f"<p>{_text(one)}</p>" for one in rest)),
    ]
    if cautions:
        parts.append(_section("Warnings", "<ul>", *(f"<li>{_text(line)}</li>" for line in cautions), "</ul>"))
    if found["confirmed"]:
        parts.append(_section("Confirmed with fresh seeds", _settings(sweep, found["confirmed"])))
    parts += _comparisons(sweep, found)
    parts.append(_section("Settings by rank, seeds of the search", _settings(sweep, found["settings"])))
    parts.append(_section("Figures", *_figures(directory)))
    parts.append(_trials(sweep, results, directory))
    return PAGE.format(title=_text(title), style=STYLE, script=SCRIPT, body="\n".join(parts))


def _text(value):
    """What others wrote, as text in HTML and in its attributes."""
    return html.escape(str(value), quote=True)


def _section(title, *content):
    return "\n".join([f"<section><h2>{_text(title)}</h2>", *content, "</section>"])


def _table(columns, rows):
    """A table that sorts where scripts run; a cell is HTML, or (HTML, the number to sort by)."""
    lines = ["<div class=scroll><table>", "<thead><tr>"]
    lines += [f"<th>{_text(column)}</th>" for column in columns]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = []
        for cell in row:
            if isinstance(cell, tuple):
                key = "" if cell[1] is None else f"{cell[1]:.17g}"
                cells.append(f'<td class=number data-key="{key}">{cell[0]}</td>')
            else:
                cells.append(f"<td>{cell}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _value(setting, key):
    """A setting's value of a key as a cell."""
    if key not in setting:
        return ""
    value = setting[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    shown = _text(verdict.text(value))
    return (shown, value) if number else shown


def _settings(sweep, entries):
    varied = sweep.varied()
    tests = any("test" in entry for entry in entries)
    several = len({name for entry in entries for name in entry["instruction_sets"]}) > 1
    columns = ["rank", "setting", *varied, sweep.config.objective, "95 % interval", "finished", "state"]
    columns += ["test"] * tests + ["instruction sets"] * several
    rows = []
    for rank, entry in enumerate(entries, 1):
        mean, error = entry["mean"], entry["standard_error"]
        state = entry["state"]
        value = "" if mean is None else verdict.plus_minus(mean, error)
        if state == "pruned":
            state = f"pruned at step {entry['step']:,}"
            if entry["mean_at_rung"] is not None:
                value, mean = f"{entry['mean_at_rung']:.5g} at step {entry['step']:,}", None
        row = [(f"{rank}", rank), (f"{entry['setting']}", entry["setting"])]
        row += [_value(entry["values"], key) for key in varied]
        row += [(_text(value), mean), _interval(entry), _text(entry["finished"]), _text(state)]
        if tests:
            values = list(entry.get("test", {}).values())
            mean = sum(values) / len(values) if values else None
            row.append(("" if mean is None else f"{mean:.5g}", mean))
        if several:
            row.append(_text(", ".join(entry["instruction_sets"])))
        rows.append(row)
    return _table(columns, rows)


def _interval(entry):
    if entry["interval"] is None:
        return "", None
    low, high = entry["interval"]
    return f"{low:.5g} to {high:.5g}", low


def _comparisons(sweep, found):
    """The section of paired differences; none without any."""
    entries = found["comparisons"]
    if not entries:
        return []
    rows = []
    for entry in entries[:MOST_COMPARISONS]:
        p, correlation = entry["p_holm"], entry["correlation"]
        apart = {True: "apart", False: "not told apart", None: "open"}[entry["apart"]]
        rows.append([
            _text(sweep.describe(entry["setting"])), _text(sweep.describe(entry["against"])),
            (_text(verdict.plus_minus(entry["mean"], entry["standard_error"])), entry["mean"]),
            _interval(entry), f"{entry['n']}",
            ("" if correlation is None else f"{correlation:.2f}", correlation),
            ("" if p is None else f"{p:.2g}", p), apart,
        ])  # fmt: skip
    columns = ["setting", "against", "better by", "95 % interval", "pairs", "correlation", "p (Holm)", ""]
    content = [_table(columns, rows)]
    if not found["decided"]:
        content.insert(0, "<p>From the seeds that chose the best, which flatters it: no p decides here.</p>")
    if len(entries) > MOST_COMPARISONS:
        content.append(f"<p>And {len(entries) - MOST_COMPARISONS:,} more, in summary.json.</p>")
    return [_section("Comparisons, seed by seed", *content)]


# Figures -----------------------------------------------------------------------------------------------


def _figures(directory):
    """Each figure as SVG in the page, with its name."""
    found = []
    try:
        for number, (name, figure) in enumerate(figures.drawn(directory), 1):
            svg = _inline(figure, f"f{number}-")
            found.append(f"<figure>{svg}<figcaption>{_text(name)}</figcaption></figure>")
    except InputError as error:  # as of a sweep that has just begun
        found.append(f"<p>{_text(error)}</p>")
    return found


def _inline(figure, prefix):
    """A figure as an <svg> element whose ids are its own in the page."""
    svg = figures.to_svg(figure)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = re.sub(r'(<\w[^<>]*? id="|href="#|clip-path="url\(#)', rf"\g<1>{prefix}", svg)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1)


# Trials ------------------------------------------------------------------------------------------------


def _trials(sweep, results, directory):
    """All trials with the command that trains each again, and what computed them."""
    varied, rows, computed = sweep.varied(), [], Counter()
    for name, result in sorted(results.items(), key=lambda item: (item[1].trial.setting, item[1].trial.seed)):
        path = directory / "trials" / name
        command = ""
        if (path / "config.toml").is_file():
            words = ["cllm", "train", str(path / "config.toml"), "--run.dir", f"runs/{name}-again"]
            command = f"<code>{_text(shlex.join(words))}</code>"
            computed.update(_computed(path))
        shown = "" if result.value is None else f"{result.value:.6g}"
        seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
        rows.append([
            f"<span class=name>{_text(name)}</span>",
            *(_value(result.trial.overrides, key) for key in varied),
            (f"{result.trial.seed}", result.trial.seed), _text(result.state), (f"{result.step}", result.step),
            (shown, result.value), (seconds, result.seconds), _text(result.error), command,
        ])  # fmt: skip
    columns = ["trial", *varied, "seed", "state", "step", sweep.config.objective, "seconds", "error"]
    columns.append("trains it again")
    notes = "<p>Run a command where the sweep was run, as paths of data are from there.</p>"
    if computed:
        sets = "".join(f"<li>{n:,} trials: {_text(words)}</li>" for words, n in computed.most_common())
        notes += "<p>What computed them; the same versions, instruction set (CLLM_ISA) and number of threads "
        notes += f"give the same bits.</p><ul>{sets}</ul>"
    return _section("All trials", notes, _table(columns, rows))


def _computed(run_dir):
    """Versions and instruction set of a trial that has ended, in words; several when it moved."""
    summary = records.Run(run_dir).summary
    for one in summary.get("environments", [summary]):
        if "versions" in one:
            versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
            yield f"{one.get('isa', 'unknown instruction set')}; {versions}"


# The page ----------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --page: #fff; --ink: #1b1b1b; --faint: #5c5c5c; --line: #d8d8d8; --shade: #f4f4f4; --mark: #0a58a5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #191919; --ink: #e6e6e6; --faint: #a4a4a4; --line: #3c3c3c; --shade: #242424;
    --mark: #8cc2f2; }
  figure svg { filter: invert(0.9) hue-rotate(180deg); }
}
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p { margin: 0.4rem 0; max-width: 62rem; }
.lead, figcaption { color: var(--faint); }
.first { font-size: 1.15rem; font-weight: 600; border-left: 4px solid var(--mark); padding-left: 0.7rem; }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 0.875rem; }
th, td { padding: 0.25rem 0.6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--shade); white-space: nowrap; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
td { max-width: 24rem; }
.name { white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font-size: 0.8125rem; white-space: nowrap; user-select: all; }
figure { display: inline-block; margin: 0 1rem 1.5rem 0; width: min(100%, 36rem); vertical-align: top;
  overflow-x: auto; }
figure svg { width: 100%; min-width: 32rem; height: auto; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => {
        const cell = row.cells[column], key = cell.dataset.key;
        return { row, text: cell.textContent, number: key ? Number(key) : NaN };
      });
      const empty = one => Number.isNaN(one.number) && one.text === "";
      rows.sort((a, b) => {
        if (empty(a) || empty(b)) return empty(a) - empty(b);
        const [x, y] = down ? [b, a] : [a, b];
        if (!Number.isNaN(x.number) && !Number.isNaN(y.number)) return x.number - y.number;
        if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return Number.isNaN(a.number) ? 1 : -1;
        return x.text.localeCompare(y.text, undefined, { numeric: true });
      });
      body.append(...rows.map(one => one.row));
    });
  });
}
"""
