"""Whether a Ray cluster answers at an address, and takes our token; asked before Ray tries to join.

Ray itself tries for minutes and ends the process when it gives up. Knows sockets, gRPC and where
Ray keeps tokens. Knows nothing of groups.
"""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any

from ...errors import LoadmasterError, UsageError

ANSWER_S = 3.0
_ASK = "/ray.rpc.NodeInfoGcsService/GetClusterId"


class NothingAnswersError(LoadmasterError):
    """Nothing listens at the address, or not a Ray cluster."""


def require_cluster(address: str) -> str:
    """HOST:PORT of the Ray cluster that has answered there. auto: the one on this machine.

    Raises UsageError for an address or a token that cannot be, NothingAnswersError within seconds
    where nothing listens, LoadmasterError where the token is not the cluster's.
    """
    if address == "auto":
        address = _running_here()
    host, port = _parts(address)
    require_token(address, host)
    _require_listener(address, host, port)
    _ask(address, host, port)
    return address


def _require_listener(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:      # a name that cannot be one is a ValueError
        late = isinstance(error, TimeoutError)
        reason = "no answer" if late else getattr(error, "strerror", None) or str(error)
        raise NothingAnswersError(
            f"no Ray cluster answers at {address} ({reason}): check that it runs, and that host "
            "and port are the ones that `ray start --head` printed"
        ) from error


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{address!r} is no address of a Ray cluster: HOST:PORT, or auto")
    return host.strip("[]"), int(port)


def _running_here() -> str:
    """The cluster that RAY_ADDRESS names, or the one that runs on this machine."""
    services: Any = importlib.import_module("ray._private.services")
    try:
        return str(services.canonicalize_bootstrap_address("auto"))
    except (ConnectionError, ValueError) as error:
        raise NothingAnswersError(
            "no Ray cluster runs on this machine: `ray start --head` starts one; or name the "
            "HOST:PORT of one elsewhere"
        ) from error


def on_this_machine(host: str) -> bool:
    """Whether the host is this machine: only such a one can be bound here."""
    if host in ("localhost", "127.0.0.1", "::1"):
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except (OSError, ValueError):
            return False
    return True


def require_token(address: str, host: str) -> None:
    """Raises UsageError where a token is wanted and there is none."""
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    if mode != "token" and not on_this_machine(host):
        raise UsageError(
            f"{address}: RAY_AUTH_MODE is {mode!r}: another machine's cluster is used with "
            "token authentication only; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        )
    if mode == "token" and not _token_header():
        raise UsageError(
            f"{address}: no token to join the cluster with: set RAY_AUTH_TOKEN, or "
            "RAY_AUTH_TOKEN_PATH to the file that holds it"
        )


def token_refused(address: str) -> LoadmasterError:
    """What to say where the cluster wants another token, or one at all."""
    return LoadmasterError(
        f"the Ray cluster at {address} does not take our token: set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN to the cluster's own"
    )


def _token_header() -> dict[str, str]:
    """The token as Ray sends it, from wherever Ray takes it; empty where there is none."""
    loader = importlib.import_module("ray._raylet").AuthenticationTokenLoader.instance()
    if os.environ.get("RAY_AUTH_MODE") != "token" or not loader.has_token(ignore_auth_mode=True):
        return {}
    return dict(loader.get_token_for_http_header())


def _ask(address: str, host: str, port: int) -> None:
    """One call that any head of a cluster answers."""
    grpc: Any = importlib.import_module("grpc")
    numbers = f"[{host}]" if ":" in host else host
    direct = (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(f"{numbers}:{port}", options=direct) as line:
        try:
            line.unary_unary(_ASK)(
                b"", timeout=ANSWER_S,
                metadata=[(k.lower(), v) for k, v in _token_header().items()],
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise token_refused(address) from error
            raise NothingAnswersError(
                f"what answers at {address} is no head of a Ray cluster: check the port (`ray "
                "start --head` prints it)"
            ) from error
