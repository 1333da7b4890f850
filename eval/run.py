# SPDX-License-Identifier: Apache-2.0
"""The results file of a long measurement: written after every step, continued after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.paired import PairedSums
from eval.results_io import write_json
from eval.settings import Setting, same_options


class Run:
    """A results file, filled in window by window.

    Args:
        path: The file; if it exists, its records are kept and not measured again.
        head: Command, commit and environment.
        config: All that every record of the file has in common.

    Raises:
        ValueError: The file holds another measurement.
    """

    def __init__(self, path: Path, head: dict[str, Any], config: dict[str, Any]) -> None:
        self.path = path
        self.content = {**head, "config": config, "settings": {}, "skipped": {}, "records": []}
        if path.is_file():
            old = json.loads(path.read_text())
            self._check(old)
            self.content |= {key: old[key] for key in ("settings", "records")}

    def _check(self, old: dict[str, Any]) -> None:
        for part in ("environment", "config"):
            before, now = old[part], self.content[part]
            other = [key for key in now if before.get(key) != now[key]]
            if other:
                raise ValueError(
                    f"{self.path} holds results of another {part} ({', '.join(other)}): choose "
                    "another --out, or remove the file"
                )

    def add_setting(self, setting: Setting) -> None:
        """Notes what a label stands for.

        Raises:
            ValueError: It stood for something else when the file was begun.
        """
        before = self.content["settings"].setdefault(setting.label, setting.options)
        if not same_options(before, setting.options):
            raise ValueError(
                f"{self.path} holds {setting.label} with other options: choose another --out"
            )

    def has(self, window: int, label: str) -> bool:
        records = self.content["records"]
        return any(r["window"] == window and r["setting"] == label for r in records)

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record and writes the file."""
        self.content["records"].append(record | {"commit": self.content["commit"]})
        self.save()

    def save(self) -> None:
        self.content["summary"] = [self._summarise(name) for name in self.content["settings"]]
        write_json(self.path, self.content)

    def _summarise(self, label: str) -> dict[str, Any]:
        records = [r for r in self.content["records"] if r["setting"] == label]
        if not records:
            return {"setting": label, "windows": 0}
        sums = PairedSums.total([PairedSums(**r["sums"]) for r in records])
        return {
            "setting": label,
            "windows": len(records),
            "bits_nominal": records[-1]["bits_nominal"],
            "bits_held": records[-1]["bits_held"],
            **sums.metrics(),
            "seconds_per_window": sum(r["seconds"] for r in records) / len(records),
        }
