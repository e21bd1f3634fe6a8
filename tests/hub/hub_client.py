"""Processes that talk to a Hub of our own.

The tests' own process has no way to any Hub: huggingface_hub reads HF_HUB_OFFLINE when it is imported. So clients run
apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from local_hub import LocalHub

# The client waits up to 23 s for a server that has died; a test has no time for that.
IMPATIENCE = "import time; time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05))"
PRELUDE = """
import json
from pathlib import Path

def error(call, *args, **kwargs):
    "The name and the words of what a call raises."
    try:
        call(*args, **kwargs)
    except Exception as e:
        return [type(e).__name__, str(e)]

answer = None
"""


class Client:
    """Someone with a cache of their own (`home`) and a token, who runs programs against the hub.

    `token` is that of "me", another one ("hf_other" is that of "you"), or "" for none.
    """

    def __init__(self, hub: LocalHub, home: Path) -> None:
        self.hub, self.home = hub, home

    def run(self, *command: str | Path, token: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the hub's environment, and with more variables if given."""
        environment = os.environ | self.hub.environment(self.home, token) | variables
        return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)

    def python(self, code: str, *words: str | Path, token: str | None = None, **variables: str) -> Any:
        """Run Python with `words` as sys.argv[1:]; what it assigns to `answer` comes back, by way of JSON."""
        code = f"{IMPATIENCE}\n{PRELUDE}\n{code}\nprint(json.dumps(answer))"
        done = self.run(sys.executable, "-c", code, *words, token=token, **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def cli(self, *words: str | Path, token: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a lorasurgery command."""
        code = f"{IMPATIENCE}\nimport runpy; runpy.run_module('lorasurgery', run_name='__main__', alter_sys=True)"
        return self.run(sys.executable, "-c", code, *words, token=token, **variables)
