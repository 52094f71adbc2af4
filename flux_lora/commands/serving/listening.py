"""Where a command listens: checked before minutes of loading."""

import argparse
import errno
import socket

from flux_lora.errors import SettingsError


def port(text: str) -> int:
    """Read a port from the command line."""
    if text.isascii() and text.isdigit() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")


def numeric_address(host: str, port: int) -> str:
    """The numeric address to listen on, in brackets if it is of IPv6: the only form that Cog's server takes.

    Raises:
        SettingsError: it is not an address of this machine, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"Port {port} on {host} is in use: choose another with --port.") from None
        raise SettingsError(f"{host}, port {port}, cannot be listened on: {error.strerror}.") from None
    return f"[{address[0]}]" if family == socket.AF_INET6 else str(address[0])
