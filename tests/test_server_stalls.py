"""Connections that stall: cut off at any request, and whatever they send instead of reading."""

import asyncio

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from adapters_jax.finetune.serving.guard import Limits
from adapters_jax.finetune.serving.listening import protocol

ONE = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"


async def small(_):
    return PlainTextResponse("x")


async def large(_):
    return PlainTextResponse("x" * 2**26)


async def closes(steps):
    """Whether the server ends a connection that sends these bytes, and reads nothing between."""
    app = Starlette(routes=[Route("/small", small), Route("/large", large)])
    config = uvicorn.Config(
        app,
        port=0,
        http=protocol(Limits(receiving=0.3)),
        ws="none",
        lifespan="off",
        log_level="error",
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    port = server.servers[0].sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
    for data in steps:
        writer.write(data)
        await asyncio.sleep(0.1)
    for _ in range(100):
        if not server.server_state.connections:
            break
        await asyncio.sleep(0.03)
    ended = not server.server_state.connections
    writer.transport.abort()
    await server.shutdown()
    return ended


@pytest.mark.witness("steps0", "steps2")
@pytest.mark.parametrize(
    "steps",
    [
        [b"GET / HT"],
        [ONE % b"small", b"GET / HT"],
        [ONE % b"large"],
        [ONE % b"large", b"G", b"E"],
    ],
)
def test_a_connection_that_stalls_is_cut_off(steps):
    assert asyncio.run(closes(steps))
