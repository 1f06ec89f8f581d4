"""Ways in which a file of a run can be damaged."""

import json
import shutil

from hf_ensemble._records import with_checksum


def _emptied(path):
    path.write_bytes(b"")


def _halved(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _flipped(path):
    """One bit, in the middle of a binary file; of a JSON file in a digit, so that it stays JSON and says another."""
    data = bytearray(path.read_bytes())
    positions = [len(data) // 2]
    if path.suffix == ".json":
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        # The first one is the format's version. The last one of a number may make no difference.
        positions = digits[1 + len(digits) // 2 :]
    for position in positions:
        damaged = data.copy()
        damaged[position] ^= 1
        if path.suffix != ".json" or _parsed(damaged) not in (None, json.loads(data)):
            path.write_bytes(bytes(damaged))
            return
    raise ValueError(f"No digit of {path} makes a difference.")


def _parsed(data):
    try:
        return json.loads(data)
    except ValueError:  # such as a zero before another digit
        return None


def _as_list(path):
    path.write_text("[1, 2]")


def _without_key(path):
    data = json.loads(path.read_text())
    data.pop("checksum")
    del data[list(data)[min(2, len(data) - 1)]]
    path.write_text(json.dumps(with_checksum(data)))


def _without_checksum(path):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in data.items() if key != "checksum"}))


def _newer(path):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(with_checksum({**data, "format_version": 99})))


def _folder(path):
    path.unlink()
    path.mkdir()


def _deleted(path):
    path.unlink()


DAMAGES = {
    "emptied": _emptied,
    "halved": _halved,
    "a bit flipped": _flipped,
    "replaced by a folder": _folder,
    "deleted": _deleted,
}
JSON_DAMAGES = {
    **DAMAGES,
    "another type": _as_list,
    "without a key": _without_key,
    "without its checksum": _without_checksum,
    "of a newer release": _newer,
}


def replaced_by(other):
    """The file of another run in its place."""

    def damage(path):
        shutil.copy(other, path)

    return damage
