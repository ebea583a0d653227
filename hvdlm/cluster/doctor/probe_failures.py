"""Explains why the probe of a host failed, from the errors of ssh, the shell and Python."""

from __future__ import annotations

import re
import shlex
import sys

from hvdlm.cluster.doctor.findings import Finding
from hvdlm.cluster.doctor.remote_probe import ProbeResult

# Messages of OpenSSH at exit status 255, what they mean, and the remedy; the first that matches is used. {host} is the
# host's name, {file} the file that the message names.
_SSH = [
    (
        r"Could not resolve hostname",
        "the name {host} does not resolve",
        "correct it, or give it an address in DNS or in /etc/hosts on every host",
    ),
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED[\s\S]*Offending .* key in (?P<file>\S+):\d+",
        "the host key of {host} has changed",
        "if it was reinstalled, remove the old key with `ssh-keygen -R {host} -f {file}` and run `ssh {host}` once "
        "by hand; if not, another machine may be impersonating {host}",
    ),
    (
        r"Host key verification failed",
        "the host key of {host} is unknown here",
        "say `ssh {host}` once by hand and compare its fingerprint, or run `ssh-keyscan {host} >> ~/.ssh/known_hosts`",
    ),
    (
        r"UNPROTECTED PRIVATE KEY FILE[\s\S]*Permissions \S+ for '(?P<file>[^']+)'",
        "ssh to {host} does not use the private key {file}, which others can read",
        "run `chmod 600 {file}`",
    ),
    (
        r"Permission denied|Too many authentication failures",
        "{host} does not take your ssh key",
        "run `ssh-copy-id {host}`, after `ssh-keygen` if you have no key; a key with a passphrase needs ssh-agent",
    ),
    (
        r"Connection refused",
        "{host} runs no sshd at its ssh port",
        "start it there, or name the port in ~/.ssh/config",
    ),
    (
        r"No route to host|Network is unreachable",
        "there is no route to {host}",
        "check that it is up and on this network, or comment it out",
    ),
    (
        r"timed out",
        "{host} does not answer",
        "check that it is up and that its firewall allows ssh, or comment it out",
    ),
    (
        r"Connection closed|Connection reset|kex_exchange_identification|Connection to \S+ closed",
        "sshd on {host} closes the connection",
        "read its log there (journalctl -u ssh); MaxStartups and AllowUsers in its configuration are common causes",
    ),
]


def explain_probe_failure(host: str, result: ProbeResult, timeout: float) -> Finding:
    """The finding for a probe that did not report; `timeout`: seconds after which it was ended."""
    what, remedy = _reason(host, result, timeout)
    return Finding("error", what, remedy)


def _reason(host: str, result: ProbeResult, timeout: float) -> tuple[str, str]:
    python = shlex.quote(sys.executable)
    errors = result.errors.replace("\r", "")
    last = errors.strip().rpartition("\n")[2] or "nothing"
    if result.status is None:
        return f"{host} has not answered within {timeout:g} s", f"run `ssh -v {host} true` to see what it waits for"
    if result.status in (124, 137):  # ended by the command `timeout` on the host
        return (
            f"Python on {host} has not answered within {timeout:g} s",
            f"try `ssh {host} {python} --version`; a slow file system may need a longer --timeout",
        )
    if result.status == 255:
        for symptom, what, remedy in _SSH:
            if found := re.search(symptom, errors):
                words = {"host": host, **found.groupdict()}
                return what.format(**words), remedy.format(**words)
        return f"ssh to {host} fails ({last})", f"make `ssh -o BatchMode=yes {host} true` work"
    same_path = "have the same environment at the same path on every host, or on a file system that they share"
    if result.status == 127:
        return f"there is no Python at {sys.executable} on {host}", same_path
    if result.status == 126:
        return f"{sys.executable} cannot be run on {host} ({last})", same_path
    if found := re.search(r"No module named '?([\w.]+)", errors):
        return f"Python on {host} has no {found.group(1)}", f"install there what is installed here, or {same_path}"
    return f"the probe on {host} ends with exit status {result.status} ({last})", f"try `ssh {host} hvdlm --version`"
