"""Golden files: what they hold is right by a formula of the test's own, and a program in C reads and judges them."""

import json
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from refattn.cli import main
from refattn.conventions import profile
from refattn.testing import assert_within, golden
from refattn.testing._configurations import CONFIGURATIONS

ONLY = [
    "mask, rows that see nothing",
    "softcap and bias",
    "grouped heads, causal",
    "packed, causal",
    "sinks",
    "no keys",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("golden")
    golden(out / "torch")
    for name in ("flash_attn", "torch"):
        golden(out / f"{name}16", profile=name, arithmetic="fa2-bf16", only=ONLY, seed=3)
    return out


def dense(x):
    """Return o and lse by the formula, in float64."""
    q, k, v = (np.asarray(x[name], np.float64) for name in "qkv")
    s = q @ k.swapaxes(-1, -2) * x["scale"]
    if "softcap" in x:
        s = x["softcap"] * np.tanh(s / x["softcap"])
    s = np.where(x["seen"] == 1, s + x.get("bias", 0.0), -np.inf)
    beta = np.reshape(x["sink"], (-1, 1, 1)) if "sink" in x else np.full((len(q), 1, 1), -np.inf)
    m = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), beta)
    m = np.where(np.isneginf(m), 0.0, m)
    w = np.exp(s - m)
    z = w.sum(axis=-1, keepdims=True) + np.exp(beta - m)
    o = np.where(z == 0, 0.0, w @ v / np.where(z == 0, 1.0, z))
    with np.errstate(divide="ignore"):
        return o, (m + np.log(z))[..., 0]


def files(folder):
    found = sorted(folder.glob("*/*.safetensors"))
    assert len(found) > 40
    return found


def test_every_answer_is_the_formula(folder):
    for path in files(folder):
        x = load_file(path)
        if all(np.isfinite(np.asarray(x[name], np.float64)).all() for name in "kv"):
            for name, value in zip(("o", "lse"), dense(x), strict=True):
                some = np.isfinite(x[name])
                assert (value[~some] == x[name][~some]).all() or path.parent.name == "flash_attn16"
                assert_within(value[some], x[name][some], x[f"{name}_bound"][some] + 1e-300, empty=True)


def test_the_sizes_are_those_of_the_tensors(folder):
    for path in files(folder):
        x = load_file(path)
        N, T, S, D, E = x["sizes"]
        shapes = {"q": (N, T, D), "k": (N, S, D), "v": (N, S, E), "seen": (N, T, S), "o": (N, T, E), "lse": (N, T)}
        shapes |= {"o_bound": (N, T, E), "lse_bound": (N, T), "scale": (1,)}
        assert {name: x[name].shape for name in shapes} == shapes


def test_both_kinds_of_file_hold_the_same(folder):
    for path in files(folder):
        x, stored = load_file(path), np.load(path.with_suffix(".npz"))
        dtypes = json.loads(str(stored["dtypes"]))
        assert set(x) == set(dtypes) == set(stored) - {"dtypes", "about"}
        for name, dtype in dtypes.items():
            raw = stored[name].view(ml_dtypes.bfloat16) if dtype == "bfloat16" else stored[name]
            assert raw.dtype == x[name].dtype and raw.tobytes() == x[name].tobytes()


def test_inputs_have_the_arithmetics_dtype(folder):
    assert {load_file(p)["q"].dtype for p in files(folder) if p.parent.name == "torch"} == {np.dtype("float32")}
    assert {load_file(p)["q"].dtype for p in files(folder) if "16" in p.parent.name} == {np.dtype(ml_dtypes.bfloat16)}


def test_the_header_says_what_made_it(folder):
    path = folder / "torch16" / "grouped_heads_causal.safetensors"
    with safe_open(path, "np") as stored:
        about = json.loads(stored.metadata()["about"])
    assert about["profile"] == "torch" and about["seed"] == 3 and "bfloat16" in about["arithmetic"]
    words = about["call"]
    assert words["function"] == "scaled_dot_product_attention" and words["is_causal"] and words["enable_gqa"]
    assert json.loads((path.parent / "golden.json").read_text())["files"][path.stem]["name"] == "grouped heads, causal"


def test_an_empty_row_answers_as_the_library_does(folder):
    path = folder / "torch16" / "mask_rows_that_see_nothing.safetensors"
    x = load_file(path)
    empty = ~x["seen"].any(axis=-1)
    assert empty.any() and not x["o"][empty].any() and np.isneginf(x["lse"][empty]).all()
    assert profile("torch").convention.empty_lse == "-inf"


def test_the_same_seed_writes_the_same_numbers(folder, tmp_path):
    golden(tmp_path / "again", only=["bias"])
    golden(tmp_path / "other", only=["bias"], seed=1)
    one, again, other = (p / "bias.safetensors" for p in (folder / "torch", tmp_path / "again", tmp_path / "other"))
    assert one.read_bytes() == again.read_bytes() != other.read_bytes()


def test_a_library_without_words_for_it_has_no_file(folder):
    assert not (folder / "torch" / "softcap.npz").exists()
    assert any(one.name == "softcap" for one in CONFIGURATIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "torchx"}, "profile is 'torchx'"),
        ({"arithmetic": "fp31"}, "arithmetic is 'fp31'"),
        ({"only": ["everything"]}, "only holds 'everything'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        golden(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    out = tmp_path_factory.mktemp("c") / "check"
    source = "docs/golden/check.c"
    subprocess.run([compiler, "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", source, "-lm", "-o", out], check=True)
    return lambda *paths: subprocess.run([out, *paths], capture_output=True, text=True)


def test_a_kernel_in_c_passes_all_files(folder, judge):
    paths = sorted((folder / "torch").glob("*.safetensors"))
    done = judge(*paths)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(f"0 of {len(paths)} wrong\n")


@pytest.mark.parametrize("name", ["o", "lse"])
@pytest.mark.parametrize("kind", ["off", "nan", "inf"])
def test_the_judge_in_c_convicts_one_wrong_element(folder, judge, tmp_path, name, kind):
    x = load_file(folder / "torch" / "ragged_sizes.safetensors")
    at = (-1,) * x[name].ndim
    x[name][at] = {"off": x[name][at] + 3 * x[f"{name}_bound"][at], "nan": np.nan, "inf": np.inf}[kind]
    (tmp_path / "wrong.safetensors").write_bytes(save(x))
    done = judge(tmp_path / "wrong.safetensors", folder / "torch" / "ragged_sizes.safetensors")
    assert done.returncode == 1 and done.stdout.endswith("1 of 2 wrong\n")


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["golden", *map(str, arguments)])
    return stopped.value.code


def test_the_command_writes_what_the_function_does(folder, tmp_path, capsys):
    assert run("--out", tmp_path / "a", "--only", "bias", "--only", "packed, causal") == 0
    assert capsys.readouterr().out.startswith("4 problems, each as .npz and .safetensors")
    same = "strong_bias.safetensors"
    assert (tmp_path / "a" / same).read_bytes() == (folder / "torch" / same).read_bytes()


@pytest.mark.parametrize("bad", [("--profile", "torchx"), ("--arithmetic", "fp31"), ("--only", "everything")])
def test_a_bad_call_of_the_command_is_one_line(tmp_path, capsys, bad):
    assert run("--out", tmp_path / "a", *bad) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and bad[1] in said
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "a").write_text("a file")
    assert run("--out", tmp_path / "a" / "b") == 2
    assert capsys.readouterr().err.count("\n") == 1
