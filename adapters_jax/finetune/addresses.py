"""The addresses that a server listens on; without jax, so that a taken port is found at once."""

import contextlib
import errno
import socket

from adapters_jax.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WAITING = 2048  # connections that the system holds until they are taken
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # as IPv6 is on some machines


def bind(host: str, port: int) -> list[socket.socket]:
    """Listens on every address of a host; the system holds connections until they are taken.

    Args:
        host: a name or an address of this machine.
        port: the port; 0 takes a free one.

    Raises:
        UserError: the port is taken, or the host is not this machine.

    Example:
        >>> (first,) = bind("127.0.0.1", 0)
        >>> with first:
        ...     bind("127.0.0.1", first.getsockname()[1])
        Traceback (most recent call last):
        adapters_jax.errors.UserError: --port ... is taken by another program; ...
    """
    bound: list[socket.socket] = []
    problem: OSError | None = None
    with contextlib.ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, *_, address in found:
                at = (address[0], bound[0].getsockname()[1] if bound else port, *address[2:])
                try:
                    one = socket.create_server(at, family=family, backlog=_WAITING)
                except OSError as error:
                    if error.errno not in _ABSENT:
                        raise
                    problem = error
                else:
                    bound.append(opened.enter_context(one))
            if problem and not bound:
                raise problem
        except (OSError, UnicodeError) as error:  # UnicodeError: of names that cannot be
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise UserError(
                    f"--port {port} of --host {host} is taken by another program; give another "
                    "one, or 0 for a free one"
                ) from error
            raise UserError(
                f"--host {host} --port {port}: the system refuses to listen there: "
                f"{getattr(error, 'strerror', None) or error}"
            ) from error
        opened.pop_all()
    return bound
