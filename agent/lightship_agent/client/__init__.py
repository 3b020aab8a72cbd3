"""Client: asking an agent from Python, over HTTP, a Unix socket, frames or a broker, with or without asyncio.

    http://127.0.0.1:8500                     HTTP
    unix:/run/lightship-agent/http.sock       the same on a Unix socket
    frames:/run/lightship-agent/frames.sock   frames
    mqtt://127.0.0.1:1883                     frames over a broker, where the agent's bindings have the model answer

Rules:
* what is asked and what comes back is the same whichever way it goes;
* every failure is a LightshipError with a stable code: the agent's own, or `link.*` where it can't be reached;
* a time-out is for the whole call, retries and all; only what can be asked twice is;
* httpx is loaded only by whoever speaks HTTP, paho only by whoever goes over a broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightship_agent.contract.app_metrics import AppSample

from .answers import Answer, Explained, Reason

if TYPE_CHECKING:
    from .aio import AsyncClient
    from .sync import Client

__all__ = ["Answer", "AppSample", "AsyncClient", "Client", "Explained", "Reason"]


def __getattr__(name: str) -> Any:
    """Load asyncio only for whoever asks for it."""
    if name == "Client":
        from .sync import Client

        return Client
    if name == "AsyncClient":
        from .aio import AsyncClient

        return AsyncClient
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
