"""The frozen key under which timings are kept: what was measured, how large it was, and on what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .fingerprint import Fingerprint

if TYPE_CHECKING:
    from torchaccel.kernels.candidates import Spec

# Symbols that stand for a number of rows, queries or tokens; all others count as they are.
BUCKETED = ("B", "M", "Q", "S")


@dataclass(frozen=True)
class Key:
    """One entry of the cache; equal keys, comparable timings.

    kernel: a name of ``candidates.KERNELS``, such as "decode_attention", "linear" or "fused". spec: canonical JSON of
    the frozen spec, which holds dtypes, formats, head sizes and modifiers. bucket: canonical text of the bucketed
    shape, "B=1,H_kv=4,Q=1,S=32768". fingerprint: device and versions.
    """

    kernel: str
    spec: str
    bucket: str
    fingerprint: Fingerprint

    @staticmethod
    def of(spec: Spec, shape: Mapping[str, int], fingerprint: Fingerprint) -> Key:
        """The key of a spec at a shape (B, H_kv, Q, S for attention and selection; M, K, N for linear; M for fused)."""
        from torchaccel.kernels.candidates import kernel_name

        return Key(kernel_name(spec), spec.key(), bucket(shape), fingerprint)

    def to_dict(self) -> dict[str, str | int]:
        """All fields, those of the fingerprint beside the others, as JSON values."""
        return {"kernel": self.kernel, "spec": self.spec, "bucket": self.bucket, **self.fingerprint.to_dict()}

    @staticmethod
    def from_dict(found: Mapping[str, object]) -> Key:
        """The key whose ``to_dict()`` is ``found``; ``ValueError`` for anything else."""
        rest = {name: value for name, value in found.items() if name not in ("kernel", "spec", "bucket")}
        own = [found.get(name) for name in ("kernel", "spec", "bucket")]
        for value in own:
            if not isinstance(value, str) or not value:
                raise ValueError(f"a key has a kernel, a spec and a bucket; found {own!r}")
        parse_bucket(str(own[2]))
        return Key(str(own[0]), str(own[1]), str(own[2]), Fingerprint.from_dict(rest))

    def differences(self, other: Key) -> list[str]:
        """A line per field, and per field of the spec and the bucket, in which ``other`` differs."""
        mine, theirs = _flat(self), _flat(other)
        return [
            f"{name}: asked {mine.get(name, 'absent')!r}, found {theirs.get(name, 'absent')!r}"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]


def representative(shape: Mapping[str, int]) -> dict[str, int]:
    """The largest shape of the bucket ``shape`` falls into: B, M, Q and S rounded up to powers of two.

    It is the one that is measured, so that all timings of an entry belong to one shape.
    """
    for name, size in shape.items():
        if size < 1:
            raise ValueError(f"a shape has positive sizes; found {name}={size}")
    return {name: 1 << (size - 1).bit_length() if name in BUCKETED else size for name, size in shape.items()}


def bucket(shape: Mapping[str, int]) -> str:
    """Canonical text of the bucket of ``shape``, such as ``B=1,H_kv=4,Q=1,S=32768``."""
    return ",".join(f"{name}={size}" for name, size in sorted(representative(shape).items()))


def parse_bucket(text: str) -> dict[str, int]:
    """The shape that ``bucket`` wrote as ``text``; ``ValueError`` for anything else."""
    try:
        shape = {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"a bucket looks like 'B=1,H_kv=4,Q=1,S=32768'; found {text!r}") from None
    if bucket(shape) != text:
        raise ValueError(f"{text!r} is no bucket: its sizes must be sorted powers of two, {bucket(shape)!r}")
    return shape


def _flat(key: Key) -> dict[str, object]:
    """The fields of a key with those of its spec and its bucket named one by one."""
    fields: dict[str, object] = dict(key.to_dict())
    try:
        spec = json.loads(str(fields.pop("spec")))
    except json.JSONDecodeError:
        spec = {"text": key.spec}
    fields.update(_paths("spec", spec))
    fields.pop("bucket")
    fields.update({f"bucket.{name}": size for name, size in parse_bucket(key.bucket).items()})
    return fields


def _paths(prefix: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, object] = {}
    for name, item in value.items():
        found.update(_paths(f"{prefix}.{name}", item))
    return found


def nearest(key: Key, others: list[Key]) -> Key | None:
    """The one of ``others`` that differs from ``key`` in the fewest fields; None for none."""
    alike = [other for other in others if other.kernel == key.kernel] or others
    return min(alike, key=lambda other: len(key.differences(other)), default=None)
