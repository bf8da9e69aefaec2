"""The interface that every Varlink service has, org.varlink.service, and its errors; sans-IO.

Owns how the daemon describes itself and how it refuses calls that it does not know. The description of
our own interface is the file io.heapsnapd.varlink beside this one.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from snapd import __version__
from snapd.errors import INTERFACE
from snapd.protocol.varlink import SERVICE, Call, Parameters, Reply

if TYPE_CHECKING:
    import re

_SERVICE_DESCRIPTION: Final = """\
# What every Varlink service can say about itself
interface org.varlink.service

# Who made the service, and which interfaces it has
method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

# The text of one interface's description
method GetInterfaceDescription(interface: string) -> (description: string)

# The service has no such interface
error InterfaceNotFound (interface: string)

# The interface has no such method
error MethodNotFound (method: string)

# The interface has the method, but this service does not offer it
error MethodNotImplemented (method: string)

# A parameter is missing, unknown, of the wrong type or out of range
error InvalidParameter (parameter: string)

# The caller may not do that
error PermissionDenied ()

# The method only makes sense with "more"
error ExpectedMore ()
"""


@cache
def interface_description() -> str:
    """Return the text of io.heapsnapd.varlink."""
    return files("snapd.protocol").joinpath(f"{INTERFACE}.varlink").read_text("utf-8")


class RefusedError(Exception):
    """A call was refused with one of the errors of org.varlink.service; `reply` says so to the caller."""

    def __init__(self, name: str, **parameters: str) -> None:
        """Refuse with the error `name`."""
        super().__init__(name, parameters)
        self.reply = Reply(parameters, error=f"{SERVICE}.{name}")


def parameters(call: Call, *allowed: str) -> Parameters:
    """Return the parameters of `call`; raises RefusedError when one is not `allowed`."""
    if extra := sorted(call.parameters.keys() - set(allowed)):
        raise RefusedError("InvalidParameter", parameter=extra[0])
    return call.parameters


def optional_integer(given: Parameters, name: str, low: int, high: int | None = None) -> int | None:
    """Return an integer parameter, None when absent or null; raises RefusedError outside `low` to `high`."""
    value = given.get(name)
    if value is None:
        return None
    if type(value) is not int or value < low or (high is not None and value > high):
        raise RefusedError("InvalidParameter", parameter=name)
    return value


def integer(given: Parameters, name: str, low: int, high: int | None = None) -> int:
    """Return an integer parameter that must be there; raises RefusedError as `optional_integer` does."""
    value = optional_integer(given, name, low, high)
    if value is None:
        raise RefusedError("InvalidParameter", parameter=name)
    return value


def flag(given: Parameters, name: str) -> bool:
    """Return a Boolean parameter, False when absent or null; raises RefusedError for another type."""
    value = given.get(name)
    if value is not None and type(value) is not bool:
        raise RefusedError("InvalidParameter", parameter=name)
    return bool(value)


def optional_name(given: Parameters, name: str, allowed: re.Pattern[str]) -> str | None:
    """Return a text parameter, None when absent or null; raises RefusedError for one that is not `allowed`."""
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not allowed.fullmatch(value):
        raise RefusedError("InvalidParameter", parameter=name)
    return value


def answer(call: Call) -> Reply:
    """Return the reply to a call of org.varlink.service; raises RefusedError for any other call."""
    interface, _, method = call.method.rpartition(".")
    if interface not in (SERVICE, INTERFACE):
        raise RefusedError("InterfaceNotFound", interface=interface)
    if interface == SERVICE and method == "GetInfo":
        parameters(call)
        return Reply(
            {
                "vendor": "heap-snapd",
                "product": "snapd, the heap snapshot daemon",
                "version": __version__,
                "url": "",
                "interfaces": [SERVICE, INTERFACE],
            }
        )
    if interface == SERVICE and method == "GetInterfaceDescription":
        return Reply({"description": _description(parameters(call, "interface").get("interface"))})
    raise RefusedError("MethodNotFound", method=call.method)


def _description(interface: object) -> str:
    if not isinstance(interface, str):
        raise RefusedError("InvalidParameter", parameter="interface")
    if interface == SERVICE:
        return _SERVICE_DESCRIPTION
    if interface == INTERFACE:
        return interface_description()
    raise RefusedError("InterfaceNotFound", interface=interface)
