"""Bench serving, in the agent's environment: its faces and its data plane, and nothing that watches or reports.

Usage: without.py BUNDLE PORT. Says `ready`, and serves until its input ends.
"""

import sys
from pathlib import Path

from lightship_agent.contract.bundle import read_bundle
from lightship_agent.runtime.memory import trim_memory
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer


def nothing(*_):
    """Nobody watches."""


def main():
    plane = DataPlane(nothing, observe_row=nothing, observe_rows=nothing)
    plane.install(load_model(read_bundle(Path(sys.argv[1]).read_bytes())))
    trim_memory()
    server = HttpServer(create_app(plane, status=dict, metrics=str), port=int(sys.argv[2]))
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
