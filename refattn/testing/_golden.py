"""Golden files: problems with their right answers and what is allowed, for projects that have no Python.

Every file is one call, flattened so that a reader needs no convention: N problems of one head each, with the pairs that
are seen spelt out. ``docs/golden.md`` describes the arrays, and ``docs/golden/check.c`` reads them.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import refattn
from refattn import _check, engines
from refattn._need import need
from refattn.conventions import Call, Profile
from refattn.conventions import profile as profile_of
from refattn.engines import Unsupported
from refattn.testing._arithmetic import Arithmetic, arithmetic_of
from refattn.testing._configurations import CONFIGURATIONS, Configuration
from refattn.testing._places import cast
from refattn.testing._tolerance import tolerance

INDEX = "golden.json"


def golden(
    out: str | Path,
    *,
    profile: str | Profile = "torch",
    arithmetic: Arithmetic | str = "fp32",
    only: Sequence[str] = (),
    seed: int = 0,
) -> list[Path]:
    """Write problems, their right answers and what is allowed of each element, as .npz and as .safetensors.

    Parameters
    ----------
    out
        A folder, which is made.
    profile
        Whose meaning: configurations that the library has no words for are left out.
    arithmetic
        What the kernel that is tried computes in; inputs have its dtype.
    only
        Configurations or capabilities that alone are written.
    seed
        Of what is drawn: the same seed writes the same numbers.

    Returns
    -------
    list of Path
        What was written: two files for each configuration, and ``golden.json``, which lists them.

    Raises
    ------
    ValueError, TypeError
        A profile, an arithmetic or a configuration that there is none of, before any work.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in golden(folder, only=["one row, one key"])]
    ['one_row_one_key.npz', 'one_row_one_key.safetensors', 'golden.json']
    """
    own, known = profile if isinstance(profile, Profile) else profile_of(profile), arithmetic_of(arithmetic)
    _check.integer("seed", seed, 0)
    names = {name for one in CONFIGURATIONS for name in (one.name, one.capability)}
    for name in only:
        if name not in names:
            raise ValueError(f"only holds {name!r}; expected configurations or capabilities of the conformance kit")
    save = need("safetensors.numpy").save
    folder, written = Path(out), list[Path]()
    folder.mkdir(parents=True, exist_ok=True)
    notes = {"refattn": refattn.__version__, "profile": own.name, "arithmetic": str(known), "seed": seed}
    index: dict[str, Any] = {**notes, "files": {}}
    for one in CONFIGURATIONS:
        if not {one.name, one.capability} & set(only) if only else one.thorough:
            continue
        call = _call(one, own, known, seed)
        if call is None:
            continue
        numbers = tensors(call, own, known)
        about = {"name": one.name, "order": own.convention.order, "call": _words(call, own)}
        stem = re.sub(r"\W+", "_", one.name).strip("_")
        index["files"][stem] = {**about, "shapes": {name: list(x.shape) for name, x in numbers.items()}}
        bits: dict[str, Any] = {
            name: x if x.dtype.kind in "fiu" else x.view(f"u{x.itemsize}") for name, x in numbers.items()
        }
        dtypes = json.dumps({name: x.dtype.name for name, x in numbers.items()})
        header = json.dumps({**notes, **about}, default=str)  # in one: safetensors writes several in any order
        np.savez(folder / f"{stem}.npz", **bits, dtypes=np.array(dtypes), about=np.array(header))
        (folder / f"{stem}.safetensors").write_bytes(save(numbers, {"about": header}))
        written += [folder / f"{stem}.npz", folder / f"{stem}.safetensors"]
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [*written, folder / INDEX]


def _call(one: Configuration, profile: Profile, arithmetic: Arithmetic, seed: int) -> Call | None:
    """Return a configuration's call; None where the library has no words for it."""
    rng = np.random.default_rng([seed, zlib.crc32(one.name.encode())])
    call = cast(one.make(rng, profile.convention), arithmetic.formats.inputs.name)
    try:
        profile.write(call)
    except Unsupported:
        return None
    return call


def tensors(call: Call, profile: Profile, arithmetic: Arithmetic) -> dict[str, NDArray[Any]]:
    """Return what a golden file holds, by name."""
    meaning = call.under(profile.convention)
    q, k, v = meaning.arrays
    problem = engines.problem(q, k, v, **meaning.options)
    lead, (T, S, D, E) = problem.leads.shape, problem.sizes
    count = math.prod(lead)
    own = meaning.back(np.arange(count).reshape(lead), -1).ravel()
    ones, rows, keys = [problem.one(int(n)) for n in own], np.arange(T), np.arange(S)
    right = meaning.answer()
    # the answer is itself off by what float64 may be
    bounds = [meaning.allowance(partial(tolerance, a)) for a in (arithmetic, "fp64")]
    parts = {
        "q": ([one.q for one in ones], (T, D), q.dtype),
        "k": ([one.k for one in ones], (S, D), k.dtype),
        "v": ([one.v for one in ones], (S, E), v.dtype),
        "seen": ([one.seen() for one in ones], (T, S), np.uint8),
        "bias": ([one.bias(rows, keys) for one in ones], (T, S), np.float64),
        "sink": ([one.sink for one in ones], (), np.float64),
        "o": (right.o, (T, E), np.float64),
        "o_bound": (bounds[0].o + bounds[1].o, (T, E), np.float64),
        "lse": (right.lse, (T,), np.float64),
        "lse_bound": (bounds[0].lse + bounds[1].lse, (T,), np.float64),
    }
    for name in ("bias", "sink"):
        if getattr(problem, name) is None:
            del parts[name]
    out = {"sizes": np.array([count, T, S, D, E], np.int64), "scale": np.array([problem.multiplier])}
    if problem.softcap is not None:
        out["softcap"] = np.array([problem.softcap])
    for name, (values, shape, dtype) in parts.items():
        out[name] = np.ascontiguousarray(np.asarray(values, dtype).reshape(count, *shape))
    return out


def _words(call: Call, profile: Profile) -> dict[str, Any]:
    """Return the call in the library's words: arrays by shape."""
    args, named = profile.write(call)

    def shown(x: Any) -> Any:
        shape = getattr(x, "shape", ())
        return f"array of shape {shape}" if shape else x

    said = {"function": profile.function.__name__, "args": [shown(x) for x in args]}
    return {**said, **{name: shown(x) for name, x in named.items()}}
