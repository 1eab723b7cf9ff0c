"""The fields of upstream's config.json files: which are known, and their values by our names."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

NONE: Mapping[str, Any] = MappingProxyType({})


def read(
    name: str, upstream: Mapping[str, Any], names: Mapping[str, str], *, fixed: Mapping[str, Any] = NONE,
    unread: Collection[str] = (), null: Collection[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Values, by our names, of the fields that a config has.

    Args:
        name: upstream's class, for messages. names: upstream's field -> ours.
        fixed: fields that may have one value. unread: fields that change no number here.
        null: those of `names` that may be null; None where any may.

    Raises:
        ValueError: a field that is not known, or a value that it may not have.
    """
    fields = {k: v for k, v in upstream.items() if not k.startswith("_") and k not in unread}
    if wrong := [f"{k}={fields[k]!r} (it may be {v!r})" for k, v in fixed.items() if fields.get(k, v) != v]:
        raise ValueError(f"{name}: {', '.join(wrong)} is not supported")
    if unknown := sorted(fields.keys() - names.keys() - fixed.keys()):
        raise ValueError(f"{name}: unknown config fields {unknown}; known are {sorted({*names, *fixed, *unread})}")
    values = {names[k]: v for k, v in fields.items() if k in names}
    if null is not None and (none := sorted(k for k in names if fields.get(k, 0) is None and k not in null)):
        raise ValueError(f"{name}: {', '.join(none)} is null; only {' and '.join(null)} may be")
    return values
