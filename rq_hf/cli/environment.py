# SPDX-License-Identifier: Apache-2.0
"""Which versions are installed, and on which device the cache would run."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement

from rq_hf import __version__

DISTRIBUTION = "rq-hf"
GIB = 1 << 30


@dataclass(frozen=True)
class Version:
    """One package: what is installed, what is asked for.

    Attributes:
        name: Of the package.
        installed: Its version; None if it is missing.
        wanted: The versions that fit, as a requirement writes them; empty for any.
        good: Whether it fits.
    """

    name: str
    installed: str | None
    wanted: str
    good: bool

    def row(self) -> list[str]:
        """Returns a row of the table."""
        state = "good" if self.good else f"needs {self.wanted or 'any version'}"
        return [self.name, self.installed or "missing", state]


def versions() -> list[Version]:
    """Returns this package, Python, what the package needs, and triton.

    From a folder that was never installed, nothing says which versions fit.
    """
    own = Version(DISTRIBUTION, __version__, "", True)
    return [
        own,
        Version("python", platform.python_version(), "", True),
        *map(_check, _requirements()),
        Version("triton", _installed("triton") or "not installed (optional)", "", True),
    ]


def _requirements() -> list[Requirement]:
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [Requirement(name) for name in ("torch", "transformers")]
    found = map(Requirement, lines)
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _check(requirement: Requirement) -> Version:
    installed = _installed(requirement.name)
    # a build for one kind of hardware, as 2.13.0+cpu, counts as its release
    good = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return Version(requirement.name, installed, str(requirement.specifier), good)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_device(name: str | None) -> torch.device:
    """Returns the device of that name; a GPU, if there is one, for None.

    Raises:
        ValueError: There is no such device here.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        build = torch.version.cuda or "none: this is a build for the CPU"
        raise ValueError(f"torch sees no GPU (torch {torch.__version__}, CUDA {build})")
    return device


def describe_device(device: torch.device) -> str:
    """Returns name, memory and compute capability of a GPU; the number of threads of a CPU."""
    if device.type != "cuda":
        return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} thread(s)"
    found = torch.cuda.get_device_properties(device)
    free, total = (size / GIB for size in torch.cuda.mem_get_info(device))
    return (
        f"{found.name}, compute capability {found.major}.{found.minor}, {free:.1f} of "
        f"{total:.1f} GiB free, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU(s)"
    )
