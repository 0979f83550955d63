"""From facts to verdicts: what is fine, what is worth a look, and what keeps training from starting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .machine import Facts, address_of, port_is_free
from .measure import Timing

Verdict = Literal["ok", "warn", "fail"]
FEW_FILES, FEWEST_FILES = 1024, 256
LITTLE_SHARED_MEMORY = 256 * 2**20
CLOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, the verdict, what was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def check_ranks(ranks: Sequence[Facts]) -> Iterator[Check]:
    """What every process of a job, or this one alone, says of its machine."""
    yield _versions(ranks)
    yield _devices(ranks)
    yield _threads(ranks)
    yield _open_files(ranks)
    yield _shared_memory(ranks)
    yield _host_names(ranks)
    if len(ranks) > 1:
        yield _clocks(ranks)


def _versions(ranks: Sequence[Facts]) -> Check:
    names = dict.fromkeys(name for facts in ranks for name in facts.versions)
    differing = [name for name in names if len({facts.versions.get(name) for facts in ranks}) > 1]
    if not differing:
        shown = ", ".join(f"{name} {version}" for name, version in ranks[0].versions.items())
        return Check("versions", "ok", shown)
    name = differing[0]
    found = _by_value(ranks, [facts.versions.get(name, "missing") for facts in ranks])
    more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
    return Check("versions", "fail", f"{name} differs: {found}{more}", "install the same versions on every node")


def _devices(ranks: Sequence[Facts]) -> Check:
    kinds = {facts.device.partition(":")[0] for facts in ranks}
    found = _by_value(ranks, [facts.device_name for facts in ranks])
    if len(kinds) > 1:
        where = _by_value(ranks, [facts.device for facts in ranks])
        return Check("devices", "fail", where, "every rank needs the same kind of device: set device of the strategy")
    if len({facts.device_name for facts in ranks}) > 1:
        return Check("devices", "warn", found, "the slowest device sets the pace of all")
    places = Counter((facts.host, facts.device) for facts in ranks if not facts.device.startswith(("cpu", "xla")))
    shared = [f"{device} on {host}" for (host, device), count in places.items() if count > 1]
    if shared:
        return Check("devices", "fail", f"several processes on {', '.join(shared)}", "one process per device")
    return Check("devices", "ok", f"{len(ranks)} x {ranks[0].device.partition(':')[0]} ({ranks[0].device_name})")


def _threads(ranks: Sequence[Facts]) -> Check:
    for host in dict.fromkeys(facts.host for facts in ranks):
        here = [facts for facts in ranks if facts.host == host]
        threads, cores = sum(facts.threads for facts in here), max(facts.cores for facts in here)
        if threads > cores:
            each = " + ".join(str(facts.threads) for facts in here[:8])
            found = f"{each}{' + ...' if len(here) > 8 else ''} threads on {cores} cores of {host}"
            fix = f"--num-cpu-threads {max(1, cores // len(here))}, or OMP_NUM_THREADS"
            return Check("CPU threads", "warn", found, fix)
    return Check("CPU threads", "ok", f"{ranks[0].threads} each, {ranks[0].cores} cores")


def _open_files(ranks: Sequence[Facts]) -> Check:
    limited = [facts for facts in ranks if facts.open_files >= 0]
    if not limited:
        return Check("open files", "ok", "no limit")
    least = min(limited, key=lambda facts: facts.open_files)
    found = f"at most {least.open_files}" + (f" on rank {least.rank}" if len(ranks) > 1 else "")
    if least.open_files < FEW_FILES:
        verdict: Verdict = "fail" if least.open_files < FEWEST_FILES else "warn"
        return Check("open files", verdict, found, "ulimit -n 65536 before the start: sockets and workers take many")
    return Check("open files", "ok", found)


def _shared_memory(ranks: Sequence[Facts]) -> Check:
    least = min(facts.shared_memory for facts in ranks)
    fix = "workers of a DataLoader pass batches through it; in a container: --shm-size=8g, or --ipc=host"
    if least < 0:
        return Check("shared memory", "warn", "no /dev/shm", fix)
    found = f"/dev/shm of {least / 2**20:,.0f} MiB"
    if least < LITTLE_SHARED_MEMORY:
        return Check("shared memory", "warn", found, fix)
    return Check("shared memory", "ok", found)


def _host_names(ranks: Sequence[Facts]) -> Check:
    hosts = dict.fromkeys((facts.host, facts.address) for facts in ranks)
    fix = "add it to /etc/hosts, or give --local-addr"
    for host, address in hosts:
        if not address:
            verdict: Verdict = "fail" if len(hosts) > 1 else "warn"
            return Check("host name", verdict, f"{host} does not resolve", fix)
        if len(hosts) > 1 and address.startswith("127."):
            return Check("host name", "warn", f"{host} is {address}, which other nodes cannot reach", fix)
    return Check("host name", "ok", ", ".join(f"{host} is {address}" for host, address in hosts))


def _clocks(ranks: Sequence[Facts]) -> Check:
    clocks = [facts.clock for facts in ranks]
    apart = max(clocks) - min(clocks)
    if apart > CLOCK_SECONDS:
        behind = ranks[clocks.index(min(clocks))]
        fix = "set the clocks (chrony, ntpd): logs and files of the nodes cannot be compared"
        return Check("clocks", "warn", f"{apart:.1f} s apart; rank {behind.rank} on {behind.host} is behind", fix)
    return Check("clocks", "ok", f"{apart * 1e3:.0f} ms apart")


def _by_value(ranks: Sequence[Facts], values: Sequence[str]) -> str:
    """`2.13 on rank 0, 1; 2.9 on rank 2`."""
    found: dict[str, list[str]] = {}
    for facts, value in zip(ranks, values, strict=True):
        found.setdefault(value, []).append(str(facts.rank))
    return "; ".join(f"{value} on rank {', '.join(where)}" for value, where in found.items())


def check_meeting_point(host: str, port: int, *, hosts_here: bool) -> Check:
    """Whether the address where processes meet resolves, and its port is free where this node listens on it."""
    address = address_of(host)
    shown = f"{host}:{port}"
    if not address:
        fix = "name a node that every node resolves: --rdzv-endpoint HOST:PORT, or MASTER_ADDR"
        return Check("meeting point", "fail", f"{host} does not resolve", fix)
    if hosts_here and port and not port_is_free(port):
        return Check(
            "meeting point", "fail", f"port {port} is taken here", "choose another port, or end what listens there"
        )
    return Check("meeting point", "ok", f"{shown} is {address}")


def check_collectives(timings: Sequence[Timing]) -> Check:
    """Whether every collective gave the right answer."""
    wrong = [f"{timing.name}: {timing.error}" for timing in timings if timing.error]
    if wrong:
        fix = (
            "the network or its driver changes data: try another backend or interface (GLOO_SOCKET_IFNAME, NCCL_DEBUG)"
        )
        return Check("collectives", "fail", "; ".join(wrong), fix)
    return Check("collectives", "ok", f"{len(timings)} of {len(timings)} right, on small and large tensors")
