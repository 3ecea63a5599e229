"""``python -m marginflow.sweeps._worker``: tasks come in on standard input, outcomes go out, in JSON lines.

The process ends when the other end of its standard input does: a sweep that is killed leaves nobody
behind that would go on writing runs.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

from marginflow.sweeps._trial import attempt


def main() -> None:
    """Say that all is loaded, then carry out what comes, one task after the other."""
    # What a library prints must not come between the outcomes.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tasks: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    try:
        while True:
            print(json.dumps(attempt(tasks.get())), file=answers, flush=True)
    except KeyboardInterrupt:
        os._exit(0)


def _listen(tasks: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    main()
