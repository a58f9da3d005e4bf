"""`cllm report`: one HTML file, well-formed, that needs nothing else and shows what users wrote as text."""

import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cllm import cli, records, report, sweep, verdict
from cllm.sweep import folder
from cllm.sweep.results import Result, table

VOID = {"meta", "br", "img", "hr", "link", "input"}
HOSTILE = "<script>alert('x')</script>&\"$y^{$"


class Page(HTMLParser):
    """The page's elements; each that is opened must be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.ids, self.headings, self.code = [], [], [], [], [], []
        self.rows = []  # (heading of the section, cells)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        names = ("src", "href", "xlink:href", "data", "action", "poster")
        self.loads += [attributes[name] for name in names if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag in ("h2", "code"):
            (self.headings if tag == "h2" else self.code).append("")
        if tag == "tr":
            self.rows.append((self.headings[-1], []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "h2" in self.open:
            self.headings[-1] += data
        if "code" in self.open:
            self.code[-1] += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][1][-1] += data

    def table(self, heading):
        return [cells for section, cells in self.rows if section == heading]


def write_sweep(directory, names=("adamw", "sgd"), confirm=True):
    """A sweep's directory with trials that have ended; the second setting has lost a seed."""
    text = '[sweep]\nobjective = "val.loss"\nat = "last"\ngoal = "minimize"\nseeds = [0, 1]\n[base]\n'
    text += f'[[space]]\n"optim.lr" = [0.001, 0.01]\n"data.source" = {json.dumps(names)}\n'
    text += "[confirm]\ntop = 2\nseeds = [7, 8]\n" if confirm else ""
    directory.mkdir(parents=True)
    (directory / "sweep.toml").write_text(text, encoding="utf-8")
    plan = sweep.Sweep.load(directory / "sweep.toml")
    results = {}
    trials = plan.trials()
    if confirm:
        trials += [plan.trial(setting, seed) for setting in (0, 2) for seed in (7, 8)]
    for trial in trials:
        value = 2.0 + trial.setting / 4 + (trial.seed % 2) * (1 + trial.setting) / 50
        failed = (trial.setting, trial.seed) == (1, 1)
        outcome = ("failed", 5, None, f"diverged {HOSTILE}") if failed else ("finished", 20, value)
        results[trial.name] = Result(trial, *outcome, seconds=1.5, isa="x86-64-v3")
        path = directory / "trials" / trial.name
        path.mkdir(parents=True)
        lines = [
            f"[optim]\nlr = {trial.overrides['optim.lr']}",
            f"[data]\ntokenizer = \"char\"\nsource = {json.dumps(trial.overrides['data.source'])}",
            f"[train]\nseed = {trial.seed}\n",
        ]
        (path / "config.toml").write_text("\n".join(lines), encoding="utf-8")
        with records.Recorder(path) as recorder:
            for step in (1, 10, 20):
                recorder.write({"step": step, "split": "train", "loss": 4 - step / 10})
                recorder.write({"step": step, "split": "val", "loss": value})
        versions = {"isa": "x86-64-v3", "versions": {"cllm": "1.2.3"}}
        records.write_summary(path, {"state": outcome[0], "step": outcome[1], **versions})
    folder.write_settings(plan, directory)
    folder.write_new(directory / "results.csv", table(plan, results))
    records.write_summary(directory, verdict.conclude(plan, results) | {"seconds": 1.0})
    return directory


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A sweep in a folder whose name is for quoting."""
    return write_sweep(tmp_path_factory.mktemp("x") / "it's <b>a sweep</b>", [HOSTILE, "plain.txt"])


@pytest.fixture(scope="module")
def text(there):
    return report.page(there)


def test_the_page_is_well_formed_and_its_ids_are_unique(text):
    page = Page(text)
    assert page.tags.count("svg") == page.tags.count("figure") >= 4
    assert len(page.ids) == len(set(page.ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert used and set(used) <= set(page.ids)


def test_nothing_is_loaded(text):
    assert not re.search(r"https?:", text)
    assert all(re.match(r"#|data:image/png", value) for value in Page(text).loads)
    assert "default-src 'none'" in text and "@import" not in text


def test_the_verdict_is_first_and_trials_are_last(text):
    assert Page(text).headings == [
        "Verdict", "Warnings", "Confirmed with fresh seeds", "Comparisons, seed by seed",
        "Settings by rank, seeds of the search", "Figures", "All trials",
    ]  # fmt: skip
    assert text.index("Not decided, as 2 fresh seeds") < text.index("<svg")
    assert text.count("Two seeds leave one degree of freedom") == 1  # a warning, and not once more


def test_what_users_wrote_is_text(text):
    page = Page(text)
    assert page.tags.count("script") == 1 and "b" not in page.tags
    assert text.count("&lt;script&gt;alert(") > 10
    settings = page.table("Settings by rank, seeds of the search")
    assert any(HOSTILE in row for row in settings)
    assert any(f"diverged {HOSTILE}" in row for row in page.table("All trials"))


def test_tables_hold_the_conclusions(there, text):
    page, found = Page(text), json.loads((there / "summary.json").read_bytes())
    head, *rows = page.table("Settings by rank, seeds of the search")
    assert head[:4] == ["rank", "setting", "optim.lr", "data.source"]
    assert [int(row[1]) for row in rows] == [entry["setting"] for entry in found["settings"]]
    assert rows[-1][-2:] == ["1/2", "failed"]
    _, *confirmed = page.table("Confirmed with fresh seeds")
    assert [row[1] for row in confirmed] == ["0", "2"]
    _, comparison = page.table("Comparisons, seed by seed")
    entry = found["comparisons"][0]
    assert comparison[2] == verdict.plus_minus(entry["mean"], entry["standard_error"])
    assert comparison[6] == f"{entry['p_holm']:.2g}"


def test_each_trial_has_the_command_that_trains_it_again(there, text):
    commands = [shlex.split(code) for code in Page(text).code]
    assert len(commands) == 12
    for words in commands:
        assert words[:2] == ["cllm", "train"] and words[3] == "--run.dir"
        assert Path(words[2]).is_file() and Path(words[2]).parents[2] == there
        assert words[4] == f"runs/{Path(words[2]).parent.name}-again"
        rest, overrides = cli._split_overrides(words[2:])
        assert cli._parser().parse_args(["train", *rest]).config == words[2]
        assert overrides == {"run.dir": words[4]}
    assert "12 trials: x86-64-v3; cllm 1.2.3" in text


def test_a_sweep_that_goes_on_is_reported_from_its_table(tmp_path):
    directory = write_sweep(tmp_path / "going", confirm=False)
    (directory / "summary.json").unlink()
    lines = (directory / "results.csv").read_text().splitlines()
    lines = [re.sub(r"^(3,.*),finished,20,[^,]*,", r"\1,pending,0,,", line) for line in lines]
    (directory / "results.csv").write_text("\n".join(lines) + "\n")
    page = report.page(directory)
    assert Page(page).headings[0] == "Verdict"
    assert "Not finished: 6 of 8 trials have ended." in page
    (directory / "results.csv").unlink()
    Page(report.page(directory))


def test_the_command_writes_the_file_and_says_where(tmp_path, capsys):
    directory = write_sweep(tmp_path / "one", confirm=False)
    assert cli.main(["report", str(directory)]) == 0
    assert capsys.readouterr().out == f"{directory / 'report.html'}\n"
    before = (directory / "report.html").read_bytes()
    assert cli.main(["report", str(directory), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == before  # the same each time
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert cli.main(["report", str(directory / "trials" / "s000-seed0")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"cllm: no such sweep: {tmp_path / 'nowhere'}",
        f"cllm: {directory / 'trials' / 's000-seed0'} holds no sweep (sweep.toml)",
    ]


CHROMIUM = shutil.which("chromium")
# What a reader would do, and what became of it as the page's title.
CLICKS = """<script>
const table = [...document.querySelectorAll("table")].pop();
const button = table.querySelector("th button");
const first = () => table.tBodies[0].rows[0].cells[0].textContent;
button.click(); const up = first();
button.click(); const down = first();
const heads = [...table.tHead.rows[0].cells], steps = heads.findIndex(head => head.textContent === "step");
heads[steps].querySelector("button").click();
const order = [...table.tBodies[0].rows].map(row => Number(row.cells[steps].textContent));
const wide = document.documentElement.scrollWidth - innerWidth;
const svgs = [...document.querySelectorAll("svg")];
const svg = svgs.length > 0 && svgs.every(one => one.getBoundingClientRect().width > 100);
const ground = getComputedStyle(document.body).backgroundColor;
document.title = JSON.stringify({up, down, wide, svg, ground, order});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_and_sorts_it(tmp_path):
    """In headless Chromium: figures have a size, nothing is too wide, headers sort, no errors."""
    write_sweep(tmp_path / "s")
    page = report.page(tmp_path / "s")
    grounds = set()
    for scheme in ("0", "1"):  # dark, light
        (tmp_path / "page.html").write_text(page.replace("</body>", CLICKS + "</body>"), encoding="utf-8")
        words = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--window-size=1000,800", f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--dump-dom", (tmp_path / "page.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert "CONSOLE" not in done.stderr
        found = json.loads(re.search(r"<title>(.*)</title>", done.stdout)[1].replace("&amp;", "&"))
        assert found["up"] != found["down"] and found["svg"] and found["wide"] <= 0
        assert found["order"] == sorted(found["order"]) and found["order"][0] == 5  # by number: "20" < "5"
        grounds.add(found["ground"])
    assert len(grounds) == 2
