"""Kills the whole group of processes, as a machine that goes down does, when a command is about to change the files of
a round for the n-th time. Python imports this in every process that has this folder on its PYTHONPATH.

KILL_AT is JSON: `word`, which the command must have, `path`, which must be part of what is changed, and `nth`.
"""

import json
import os
import signal
import sys

ASKED = json.loads(os.environ.get("KILL_AT", "null"))
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "sqlite3.connect")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

if ASKED and ASKED["word"] in sys.orig_argv:
    count = 0

    def watch(event, args):
        global count
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            count += ASKED["path"] in str(args[0])
            if count >= ASKED["nth"]:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
