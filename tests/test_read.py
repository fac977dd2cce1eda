"""Files that a study reads: every format bit for bit, what their axes are called, and what is said about bad ones."""

import io
import json
import sys
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from refattn import cli, study

RNG = np.random.default_rng(7)
Q, K, V = RNG.standard_normal((2, 4, 24, 6)), RNG.standard_normal((2, 2, 32, 6)), RNG.standard_normal((2, 2, 32, 5))
TOKENS = [f"token {n}" for n in range(32)]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def saved(path: Path, **arrays: Any) -> str:
    np.savez(path, **{"q": Q, "k": K, "v": V} | arrays)
    return str(path)


def tensors(path: Path, arrays: dict[str, Any], **metadata: str) -> str:
    path.write_bytes(save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, metadata))
    return str(path)


def written(path: Path, arrays: dict[str, Any]) -> str:
    """Write an archive or tensors, as the name ends."""
    if path.suffix == ".safetensors":
        return tensors(path, arrays)
    np.savez(path, **arrays)
    return str(path)


def same(x: Any, y: Any) -> bool:
    return x.dtype == y.dtype and np.array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64])
@pytest.mark.parametrize("kind", ["npz", "safetensors", "npy"])
def test_arrays_come_back_bit_for_bit(kind: str, dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    stacked = (8 * RNG.standard_normal((3, 2, 5, 4))).astype(dtype)
    if kind == "npy":
        np.save(path, stacked)
    else:
        written(path, dict(zip("qkv", stacked, strict=True)))
    capture = study.read(path)
    assert all(same(x, y) for x, y in zip(capture[:3], stacked, strict=True))
    assert (capture.tokens, capture.layers) == (None, None)


def test_every_finite_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    x = bits[bits & 0x7F80 != 0x7F80].view(ml_dtypes.bfloat16).reshape(-1, 8)
    q = study.read(tensors(tmp_path / "a.safetensors", {"q": x, "k": x, "v": x})).q
    assert same(q, x.astype(np.float32)) and np.array_equal(np.signbit(q), np.signbit(x.astype(np.float64)))


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    archive, whole = tmp_path / "a.npz", tmp_path / "a.safetensors"
    saved(archive)
    tensors(whole, {"q": Q, "k": K, "v": V})
    np.save(tmp_path / "b.npy", np.stack([V, V, V]))
    for path, q in ((archive, Q), (whole, Q), (tmp_path / "b.npy", V)):
        assert same(study.read(path.rename(tmp_path / f"{path.stem}.capture")).q, q)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_layers_stored_one_by_one_are_stacked_in_natural_order(kind: str, tmp_path: Path) -> None:
    labels = ["10", "2", "enc.9", "enc.10"]
    layer = {"q": Q, "k": K, "v": V}
    arrays = {f"{label}.{name}": x + n for n, label in enumerate(labels) for name, x in layer.items()}
    capture = study.read(written(tmp_path / f"a.{kind}", arrays | {"rope": Q[0]}))
    assert capture.layers == ("2", "10", "enc.9", "enc.10")
    for x, y in zip(capture[:3], layer.values(), strict=True):
        assert same(x, np.stack([y + 1, y, y + 2, y + 3]))


def test_layers_stored_one_by_one_do_not_become_heads(tmp_path: Path) -> None:
    def stored(q: Any, k: Any, v: Any) -> list[tuple[int, ...]]:
        arrays = {f"{n}.{name}": x for n in range(3) for name, x in zip("qkv", (q, k, v), strict=True)}
        return [x.shape for x in study.read(written(tmp_path / "a.npz", arrays))[:3]]

    assert stored(Q[0, 0], K[0, 0], V[0, 0]) == [(3, 1, 24, 6), (3, 1, 32, 6), (3, 1, 32, 5)]
    assert stored(Q, K[0], V[0]) == [(3, 2, 4, 24, 6), (3, 1, 2, 32, 6), (3, 1, 2, 32, 5)]


def test_labels_are_read_from_an_archive(tmp_path: Path) -> None:
    capture = study.read(saved(tmp_path / "a.npz", tokens=np.array(TOKENS), layers=np.array([3, 11])))
    assert (capture.tokens, capture.layers) == (tuple(TOKENS), ("3", "11"))
    assert study.read(saved(tmp_path / "b.npz", layers=np.array(["low", "high"]))).layers == ("low", "high")


def test_labels_are_read_from_metadata(tmp_path: Path) -> None:
    metadata = {"tokens": json.dumps(TOKENS), "layers": '[3, "high"]', "format": "pt"}
    capture = study.read(tensors(tmp_path / "a.safetensors", {"q": Q, "k": K, "v": V}, **metadata))
    assert (capture.tokens, capture.layers) == (tuple(TOKENS), ("3", "high"))


def test_a_study_runs_on_every_kind_of_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in (("q", Q), ("k", K), ("v", V))}
    files = [saved(tmp_path / "a.npz"), tensors(tmp_path / "a.safetensors", half), str(tmp_path / "a.npy")]
    np.save(files[2], np.stack([V, V, V]))
    assert run(*files, "--methods", "linear_transformer") == 0
    assert capsys.readouterr().err == ""


def test_the_sample_is_shipped_with_its_provenance(capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v, tokens, layers = study.sample()
    assert q.shape == k.shape == v.shape == (2, 2, 304, 32) and q.dtype == np.float32
    assert tokens is not None and len(tokens) == 304 and tokens[:2] == ("[CLS]", "alice") and layers == ("2", "5")
    folder = resources.files("refattn.study")
    assert len((folder / "sample.npz").read_bytes()) < 600_000
    note = (folder / "sample.md").read_text(encoding="utf-8")
    assert all(words in note for words in ("all-MiniLM-L6-v2", "Apache License 2.0", "Public domain"))
    assert run("--methods", "linear_transformer") == 0
    assert "the shipped sample" in capsys.readouterr().out


class Trap:
    """What leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "tokens"])
def test_nothing_is_unpickled(name: str, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = np.array([Trap(sprung)], object)
    path = tmp_path / ("a.npy" if name == "a.npy" else "a.npz")
    if name == "a.npy":
        np.save(path, trap)
    else:
        saved(path, **{"q" if name == "a.npz" else "tokens": trap})
    with pytest.raises(TypeError, match="never unpickled"):
        study.read(path)
    assert not sprung.exists()


def ragged() -> Any:
    rows = np.empty(2, object)
    rows[:] = [[1.0], [1.0, 2.0]]
    return rows


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "bool": ({"k": K > 0}, "k has dtype bool"),
    "complex": ({"v": V + 0j}, "v has dtype complex128"),
    "string": ({"q": Q.astype(str)}, "q has dtype"),
    "ragged": ({"k": ragged()}, "k holds Python objects"),
    "nan": ({"v": np.where(V == V[1, 1, 2, 3], np.nan, V)}, "v holds nan at [1, 1, 2, 3]"),
    "infinite": ({"q": np.full((3, 6), -np.inf)}, "q holds -inf at [0, 0]"),
    "one axis": ({"q": Q[0, 0, 0]}, "q has shape (6,)"),
    "depths differ": ({"k": K[..., :5]}, "k has D = 5; expected 6"),
    "lengths differ": ({"v": V[..., :30, :]}, "v has S = 30; expected 32"),
    "heads do not divide": ({"q": Q[:, :3]}, "k has 2 heads"),
    "batches differ": ({"v": np.concatenate([V, V[:1]])}, "v has leading axes"),
    "empty": ({"q": Q[..., :0, :]}, "nothing to compare"),
    "tokens of rows": ({"tokens": np.array(TOKENS[:24])}, "tokens has 24 entries; expected 32, one for each key"),
    "tokens in lines": ({"tokens": np.array(TOKENS).reshape(4, 8)}, "tokens holds ['token 0', "),
    "one token": ({"tokens": np.array("word")}, "tokens is 'word'; expected strings"),
    "tokens as numbers": ({"tokens": np.arange(32)}, "tokens holds 0; expected strings"),
    "tokens as bytes": ({"tokens": np.array(TOKENS, "S")}, "tokens holds b'token 0'; expected strings"),
    "tokens as objects": ({"tokens": np.array(TOKENS, object)}, "tokens holds Python objects"),
    "layers too many": ({"layers": np.arange(3)}, "layers has 3 entries; expected 2, one for each layer"),
    "layers as floats": ({"layers": np.arange(2.0)}, "layers holds 0.0; expected strings or integers"),
    "layers as bool": ({"layers": np.array([True, False])}, "layers holds True; expected strings or integers"),
    "layers without an axis": ({"q": Q[0], "k": K[0], "v": V[0], "layers": np.arange(4)}, "layers is given, and q, k"),
    "both forms": ({"0.k": K}, "0.k is there beside q; expected layers one by one, or in one array"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_of_bad_arrays_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, words = BAD[case]
    refused(capsys, tmp_path, saved(tmp_path / "bad.npz", **arrays), words)


BAD_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "one missing": ({"1.v": None}, "1.v is missing; expected q, k and v of every layer"),
    "another shape": ({"1.k": K[:, :1]}, "1.k has shape (2, 1, 32, 6); expected (2, 2, 32, 6), as 0.k has"),
    "infinite": ({"1.q": np.full_like(Q, np.inf)}, "1.q holds inf at [0, 0, 0, 0] (1152 such)"),
    "one axis": ({"0.q": Q[0, 0, 0]}, "0.q has shape (6,)"),
}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("case", BAD_LAYERS)
def test_layers_that_do_not_fit_are_refused_in_one_line(
    case: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays, words = BAD_LAYERS[case]
    whole = {f"{label}.{name}": x for label in "01" for name, x in zip("qkv", (Q, K, V), strict=True)} | arrays
    kept = {name: x for name, x in whole.items() if x is not None}
    refused(capsys, tmp_path, written(tmp_path / f"bad.{kind}", kept), words)


def test_layers_that_are_named_twice_are_refused(tmp_path: Path) -> None:
    layer = {"0.q": Q, "0.k": K, "0.v": V, "layers": np.array([0])}
    with pytest.raises(ValueError, match=r"layers is given beside 0\.q"):
        study.read(written(tmp_path / "a.npz", layer))


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"tokens": "token 0, token 1"}, "tokens of the file's metadata is not JSON; expected a list"),
        ({"tokens": "[" * 100_000}, "tokens of the file's metadata is not JSON; expected a list"),
        ({"tokens": '{"0": "token 0"}'}, "tokens is {'0': 'token 0'}; expected strings"),
        ({"tokens": json.dumps(TOKENS[1:])}, "tokens has 31 entries; expected 32"),
        ({"layers": "[0, null]"}, "layers holds None; expected strings or integers"),
        ({"layers": "[0]"}, "layers has 1 entries; expected 2"),
    ],
)
def test_metadata_that_does_not_fit_is_refused_in_one_line(
    metadata: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tensors(tmp_path / "bad.safetensors", {"q": Q, "k": K, "v": V}, **metadata)
    refused(capsys, tmp_path, path, words)


@pytest.mark.parametrize("dtype, name", [("bool", "BOOL"), ("float8_e4m3fn", "F8_E4M3")])
def test_tensors_of_other_numbers_are_refused_in_one_line(
    dtype: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    k = K.astype(ml_dtypes.float8_e4m3fn if dtype == "float8_e4m3fn" else dtype)
    path = tensors(tmp_path / "bad.safetensors", {"q": Q, "k": k, "v": V})
    refused(capsys, tmp_path, path, f"k has dtype {name} of safetensors; expected real numbers")


@pytest.mark.parametrize("shape", [(2, 4, 24, 6), (3, 6), ()])
def test_one_array_that_is_no_stack_is_refused_in_one_line(
    shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.npy"
    np.save(path, np.ones(shape))
    words = f"the file holds one array, of shape {shape}; expected (3, ..., T, D), q, k and v stacked"
    refused(capsys, tmp_path, str(path), words)


@pytest.mark.parametrize("case", ["missing", "folder", "empty", "text", "truncated", "damaged", "no v"])
def test_a_file_that_is_no_capture_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.npz"
    whole = Path(saved(path)).read_bytes()
    words = "truncated"
    if case == "missing":
        path.unlink()
        words = "No such file"
    elif case == "folder":
        path.unlink()
        path.mkdir()
        words = "directory"
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "text":
        path.write_text("q, k, v")
    elif case == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif case == "damaged":
        path.write_bytes(whole[:900] + bytes(100) + whole[1000:])
        words = "q cannot be read"
    else:
        np.savez(path, q=Q, k=K, values=V)
        words = "v is missing; expected q, k and v, and the file holds q, k, values"
    refused(capsys, tmp_path, str(path), words)


@pytest.mark.parametrize("case", ["empty", "text", "header cut", "truncated", "header odd", "no v"])
def test_tensors_that_are_no_capture_are_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.safetensors"
    whole = Path(tensors(path, {"q": Q, "k": K, "values" if case == "no v" else "v": V})).read_bytes()
    cut = {"empty": b"", "text": b"q, k, v", "header cut": whole[:40], "truncated": whole[:-8]}
    path.write_bytes(cut.get(case, whole.replace(b'"F64"', b'"F99"') if case == "header odd" else whole))
    words = "v is missing" if case == "no v" else "the file is not in the format of safetensors, or is truncated"
    refused(capsys, tmp_path, str(path), words)


@pytest.mark.parametrize("case", ["truncated", "shape beyond memory"])
def test_an_array_alone_that_cannot_be_read_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = tmp_path / "bad.npy", bytes_of(np.stack([V, V, V]))
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': (3, {10**16}, 3), }}\n"
    path.write_bytes(whole[:-8] if case == "truncated" else header(text) + bytes(24))
    words = "the array cannot be read; the file is truncated" if case == "truncated" else "the array is too large"
    refused(capsys, tmp_path, str(path), words)


def header(text: str) -> bytes:
    """Return the head of an .npy file."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("case", ["header cut", "header odd", "shape beyond integers", "shape beyond memory", "LZMA"])
def test_an_array_that_cannot_be_read_is_named_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s, 3), }\n"
    member = {
        "header cut": header(text[:20]),
        "header odd": header("{'descr': }"),
        "shape beyond integers": header(text % 10**31),
        "shape beyond memory": header(text % 10**17) + bytes(24),
        "LZMA": header(text % 400) + RNG.bytes(9600),
    }[case]
    how = zipfile.ZIP_LZMA if case == "LZMA" else zipfile.ZIP_STORED
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("q.npy", bytes_of(Q))
        file.writestr("k.npy", member, how)
        file.writestr("v.npy", bytes_of(V))
    if case == "LZMA":
        whole = path.read_bytes()
        at = whole.index(b"k.npy") + 5
        path.write_bytes(whole[: at + 40] + b"\xff" * 400 + whole[at + 440 :])
    refused(capsys, tmp_path, str(path), ": k ")


def bytes_of(x: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str, words: str) -> None:
    good, out = saved(tmp_path / "good.npz"), tmp_path / "out"
    assert run(good, file, "--methods", "linear_transformer", "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and file in said and words in said and "Traceback" not in said
    assert not out.exists()


def test_a_missing_library_is_named_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tensors(tmp_path / "a.safetensors", {"q": Q, "k": K, "v": V})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    words = "refattn needs safetensors, which is not installed; install it with: pip install 'refattn[study]'"
    refused(capsys, tmp_path, path, words)
    with pytest.raises(ImportError, match="refattn needs safetensors"):
        study.read(path)
