"""What a sweep's results say, and what they do not: ranking, uncertainty, the verdict in words.

Functions take a `sweep.Sweep` and its results, {trial name: `sweep.Result`}; they read no files. Results
become standings, those become conclusions with the help of statistics, and these become sentences in words.
docs/conclusions.md has the formulas and their sources.
"""

from cllm.verdict.conclusions import conclude
from cllm.verdict.sentences import table
from cllm.verdict.standings import Standing, confirmed, ranking
from cllm.verdict.words import plus_minus, text, wrap

__all__ = ["Standing", "conclude", "confirmed", "plus_minus", "ranking", "table", "text", "wrap"]
