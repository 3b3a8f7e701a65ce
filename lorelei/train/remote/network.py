"""Which of this machine's network interfaces leads to another one."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from contextlib import suppress

_SIOCGIFADDR = 0x8915  # of Linux


def address_toward(host: str) -> str:
    """This machine's address on the way to `host`. Raises OSError when there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # nothing is sent
        return probe.getsockname()[0]


def interface_toward(host: str) -> str:
    """The name of the interface on the way to `host`. Raises OSError when there is no way."""
    own = address_toward(host)
    if ipaddress.ip_address(own).is_loopback:
        return "lo0" if sys.platform == "darwin" else "lo"
    names = [name for _, name in socket.if_nameindex()]
    for name in names:
        with suppress(OSError):  # it has no address
            if _address_of(name) == own:
                return name
    raise OSError(f"no interface has the address {own} that leads to {host}; there are {names}")


def _address_of(interface: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("256s", interface.encode()[:15])
        found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
    return socket.inet_ntoa(found[20:24])
