"""What all tests share: a token cache of their own and a small text."""

import atexit
import os
import shutil
import signal
import tempfile

# Set before cllm is imported, so that workers and subprocesses inherit it; the user's cache stays untouched.
_cache = tempfile.mkdtemp(prefix="cllm-test-cache-")
os.environ["CLLM_CACHE"] = _cache
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

import cllm  # noqa: E402
from cllm.kernels import threads  # noqa: E402

threads.CORES = threads.MAX_THREADS  # tests may ask for more threads than this machine has cores

# Subprocesses in other folders test the same package, installed or not.
_root = os.path.dirname(os.path.dirname(cllm.__file__))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_root, os.environ.get("PYTHONPATH"))))

# A background job of a script inherits SIGINT as ignored; tests of Ctrl-C need it in their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure. CI draws the same examples each time, so that a change is not refused for what
# an older one left; everyone else draws new ones.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("patient")


@pytest.fixture
def text_file(tmp_path):
    """A text file of 6 kB: enough for a few windows of 32 characters in each split."""
    lines = [f"line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(120)]
    path = tmp_path / "text.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path
