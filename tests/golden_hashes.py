"""Stored fingerprints of the worlds: tests/hashes_<world>.json holds {"version": WORLD_VERSION, "hashes": {configuration: fingerprint}}."""
import json
import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def check_hashes(world: str, version: int, hashes: dict[str, str]) -> None:
    """Fails if a configuration's data changed while WORLD_VERSION did not. With KDBOOK_WRITE_HASHES=1 it writes the file instead."""
    path = FOLDER / f"hashes_{world}.json"
    if os.environ.get("KDBOOK_WRITE_HASHES") == "1":
        path.write_text(json.dumps({"version": version, "hashes": hashes}, indent=1, sort_keys=True) + "\n")
    stored = json.loads(path.read_text())
    assert stored["version"] == version, f"WORLD_VERSION of {world} is {version}, stored hashes are of {stored['version']}: write them anew"
    changed = sorted(name for name in {*stored["hashes"], *hashes} if stored["hashes"].get(name) != hashes.get(name))
    assert not changed, f"{world} makes other data for {', '.join(changed)}: raise WORLD_VERSION if that is meant"
