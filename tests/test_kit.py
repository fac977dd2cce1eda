"""The conformance kit: each verdict has an innocent and a guilty, and the run goes on whatever a function does."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import cli
from refattn.conventions import LIBRARIES, Call, Profile, profile
from refattn.engines import Unsupported
from refattn.testing import Report, check, conformance, strategies
from refattn.testing._calling import mapped
from refattn.testing._configurations import CAPABILITIES, CONFIGURATIONS
from refattn.testing._kit import conclude
from refattn.testing._places import cast
from refattn.testing._run import DRAWN, names, prepare
from refattn.testing._verdicts import KINDS
from refattn.testing._worker import Worker

HERE = Path(__file__).parent
KERNELS = HERE / "kernels.py"
FEW = ("one row past a tile", "causal, fewer rows than keys")


def run(name: str, only: Sequence[str] = FEW, **options: Any) -> Report:
    return check(f"{KERNELS}:{name}", "torch", only=only, **{"framework": "numpy", **options})


def kinds(report: Report) -> list[str]:
    return [one.verdict.kind for one in report.results if one.asked == "forward"]


def test_a_right_kernel_is_acquitted_of_everything() -> None:
    report = run("right", only=[])
    assert report.ok and not report.suspect, str(report)
    assert report.capabilities["plain"]["right"] == 8
    assert "right on all" in report.headline


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("raises", "raised", "ValueError: head size 16 is odd and more"),
        ("refuses", "unsupported", "no such thing"),
        ("crashes", "crashed", "SIGKILL"),
        ("exits", "crashed", "exit status 7"),
        ("wrong_shape", "wrong shape", "expected (2, 2, 65, 16)"),
        ("wrong_dtype", "wrong dtype", "o has dtype float64; expected float32"),
        ("no_array", "wrong shape", "NoneType"),
        ("writes", "wrote to its inputs", "array 0"),
        ("same_buffer", "returned the same buffer twice", "changed"),
    ],
)
def test_what_a_kernel_does_is_a_verdict_with_its_name_and_the_run_goes_on(name: str, kind: str, words: str) -> None:
    report = run(name)
    assert kinds(report)[0] == kind
    assert words in str(report.results[0].verdict)
    assert len(kinds(report)) == 2
    assert report.ok == (kind == "unsupported")


def test_a_number_that_is_none_is_named_with_its_place() -> None:
    report = run("not_a_number", only=["one key"])
    assert kinds(report) == ["non-finite"] and "nan first at [0, 0, 2, 1]" in str(report)


def test_an_answer_beyond_the_usual_is_suspect_and_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", f"{KERNELS}:a_little_off", "--framework", "numpy", "--only", "4099 keys"])
    assert stopped.value.code == 3 and "suspect" in capsys.readouterr().out


PROFILES = [
    own for library in LIBRARIES for own in importlib.import_module(f"refattn.conventions.{library}").PROFILES.values()
]


@pytest.mark.parametrize("own", PROFILES, ids=lambda own: own.name)
def test_what_a_profile_answers_itself_is_right_as_that_profile(own: Profile) -> None:
    def rounded(*args: Any, **named: Any) -> Any:
        return mapped(own.function(*args, **named), lambda x: x.astype(np.float32))

    report = check(
        rounded,
        own,
        "fp32",
        framework="numpy",
        only=["causal, more rows than keys", "grouped heads", "size 0"],
        gradients=False,
    )
    assert set(kinds(report)) <= {"right", "unsupported"} and "right" in kinds(report), str(report)


def test_a_kernel_that_hangs_has_that_verdict_after_its_time_and_the_next_case_is_asked() -> None:
    report = run("hangs", timeout=0.3)
    assert kinds(report) == ["hung", "hung"]
    assert "0.3 s" in str(report.results[0].verdict)


def test_what_a_kernel_prints_is_not_taken_for_its_answer() -> None:
    assert kinds(run("prints")) == ["right", "right"]


def test_a_wrong_alignment_is_convicted_where_it_shows_and_nowhere_else() -> None:
    report = run("bottom_right", only=["plain", "causal"])
    guilty = {one.configuration for one in report.wrong}
    assert guilty == {"causal, fewer rows than keys", "causal, more rows than keys", "causal, one row"}
    why = str(report).rpartition("what explains 3 of 3 wrong answers")[2]
    assert "your kernel aligns rows to the bottom-right" in why


def test_a_transposed_view_that_is_read_in_order_is_convicted() -> None:
    assert [one.configuration for one in run("flattened", only=["layout"]).wrong] == ["transposed arrays"]


def test_a_drawn_fault_is_shrunk_and_replayed_by_its_seed() -> None:
    first, again = (run("bottom_right", only=[DRAWN], seed=5) for _ in range(2))
    call = first.wrong[0].call
    assert call is not None and np.size(call.q) == 1 and call.causal and np.shape(call.k)[-2] == 2
    assert str(first.wrong[0].verdict).partition("problems")[0] == str(again.wrong[0].verdict).partition("problems")[0]
    assert "seed=5" in str(first) and "the smallest problem that fails: q=[[[[" in str(first)


def test_gradients_are_judged_where_they_are_given() -> None:
    mine = ["ragged sizes", "causal, square", "scale 1"]
    good, bad = (run("right", only=mine, vjp=f"{KERNELS}:{name}") for name in ("right_vjp", "unscaled_vjp"))
    assert [one.verdict.kind for one in good.results] == ["right"] * 6
    assert [one.configuration for one in bad.wrong] == ["ragged sizes", "causal, square"]
    assert all(one.asked == "gradients" and "dk: worst" in str(one.verdict) for one in bad.wrong)


def test_what_is_not_claimed_is_a_gap_and_not_a_pass() -> None:
    report = run("raises", only=["causal", "mask"], unsupported=["causal", "mask, the same for all"])
    assert report.capabilities["causal"] == {"unsupported": 5}
    assert report.capabilities["mask"] == {"unsupported": 1, "raised": 3}
    gone = run("refuses")
    assert gone.ok and "answered nothing" in gone.headline


def test_what_a_profile_has_no_words_for_is_a_gap() -> None:
    assert "no argument for window" in str(run("right", only=["causal window"]).results[0].verdict)


def test_a_function_without_a_name_is_called_in_a_copy_of_this_process() -> None:
    def local(query: Any, key: Any, value: Any, **_: Any) -> Any:
        raise SystemError("from inside")

    def dies(*_: Any, **__: Any) -> Any:
        import os

        os._exit(3)

    reports = [check(f, "torch", only=["one row"], framework="numpy") for f in (local, dies)]
    assert [kinds(report) for report in reports] == [["raised"], ["crashed"]]


def test_where_processes_are_not_copied_it_is_called_here_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refattn.testing._worker._no_fork", lambda: "as it has no name")
    report = check(lambda *_, **__: None, "torch", only=["one row"], framework="numpy")
    assert kinds(report) == ["wrong shape"] and "in this process" in report.notes[0] in str(report)


@pytest.mark.parametrize(
    ("fn", "options", "words"),
    [
        ("nowhere:f", {}, "nowhere cannot be imported"),
        ("math:nothing", {}, "math has no nothing"),
        ("math:pi", {}, "is a float; expected a function"),
        ("math", {}, "expected module:function or file.py:function"),
        ("nowhere.py:f", {}, "no such file"),
        (3, {}, "fn is a int"),
        ("math:hypot", {"profile": "numpi"}, "profile is 'numpi'"),
        ("math:hypot", {"arithmetic": "bf17"}, "arithmetic is 'bf17'"),
        ("math:hypot", {"unsupported": ["flying"]}, "unsupported holds 'flying'"),
        ("math:hypot", {"unsupported": "mask"}, "expected a sequence of names"),
        ("math:hypot", {"only": ["flying"]}, "only holds 'flying'"),
        ("math:hypot", {"seed": -1}, "seed is -1"),
        ("math:hypot", {"timeout": 0}, "timeout is 0"),
        ("math:hypot", {"vjp": 3}, "vjp is a int"),
    ],
)
def test_a_bad_call_is_refused_in_one_sentence(fn: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(words)):
        check(fn, **options)


def test_every_configuration_has_a_name_and_an_answer_of_its_own() -> None:
    assert len({one.name for one in CONFIGURATIONS}) == len(CONFIGURATIONS) >= 70
    how = profile("torch").convention
    for one in CONFIGURATIONS:
        if not one.thorough:
            call = one.make(np.random.default_rng(0), how)
            o = call.under(how).answer().o
            assert o.shape == (*call.q.shape[:-1], call.v.shape[-1])
            assert np.isfinite(o).all() or not one.promised


def test_configurations_are_drawn_by_their_seed_alone() -> None:
    how = profile("torch").convention
    one = CONFIGURATIONS[2]
    a, b, c = (one.make(np.random.default_rng(seed), how).q for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_numbers_are_rounded_before_anybody_sees_them() -> None:
    x = np.full((1, 1, 1, 1), 1 + 2.0**-12)
    call = cast(Call(q=x, k=x, v=x, sink=np.array([1 + 2.0**-12])), "float16")
    assert call.q.dtype == "float16" and call.q.item() == 1.0
    assert call.sink.dtype == "float32" and call.sink.item() == 1 + 2.0**-12


@pytest.mark.parametrize("name", ["torch", "flash_attn"])
def test_drawn_problems_are_what_the_profile_can_say(name: str) -> None:
    from hypothesis import given, seed, settings

    own = profile(name)
    met: set[str] = set()

    @seed(0)
    @settings(max_examples=100, database=None)
    @given(strategies.problems(own, without=["causal"]))
    def trial(call: Call) -> None:
        own.write(call)
        assert not call.causal
        met.update(field for field in ("mask", "window", "softcap") if getattr(call, field) is not None)

    trial()
    assert met == ({"mask"} if name == "torch" else {"window", "softcap"})
    with pytest.raises(Unsupported):
        own.write(
            CONFIGURATIONS[[one.name for one in CONFIGURATIONS].index("sinks")].make(
                np.random.default_rng(0), own.convention
            )
        )


def test_the_report_reads_at_once_and_stands_alone_as_a_page(tmp_path: Path) -> None:
    report = run("bottom_right", only=["causal", "window"])
    said = str(report)
    assert "causal  " in said and "unsupported 11 of 11" in said and report.headline in said
    assert report.smallest is not None and "error ÷ bound" in str(report.smallest.verdict)
    path = tmp_path / "report.html"
    report.to_html(path, command="refattn check <it>")
    page = path.read_text(encoding="utf-8")
    assert "refattn check &lt;it&gt;" in page and "causal, one row" in page and "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert report.headline in report._repr_html_()


@pytest.mark.parametrize(
    ("name", "more", "code", "words"),
    [
        ("right", [], 0, "is right on all 2"),
        ("bottom_right", [], 1, "the smallest problem that fails"),
        ("missing", [], 2, "has no missing"),
        ("right", ["--profile", "none"], 2, "profile is 'none'"),
        ("right", ["--out", "nowhere/report.html"], 2, "its folder is not there"),
    ],
)
def test_the_command_exits_as_the_verdicts_say(
    name: str, more: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    only = [part for one in FEW for part in ("--only", one)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", f"{KERNELS}:{name}", "--framework", "numpy", *only, *more])
    said = capsys.readouterr()
    assert stopped.value.code == code
    assert words in (said.err if code == 2 else said.out)
    assert said.err.count("\n") == (code == 2)


def ended(f: Callable[[], None]) -> str:
    try:
        f()
    except BaseException as error:
        return type(error).__name__
    return "passed"


def test_a_parametrised_test_ends_as_the_verdicts_say() -> None:
    test = conformance(f"{KERNELS}:bottom_right", "torch", framework="numpy")
    found = [ended(lambda name=name: test(name)) for name in (*FEW, "causal window")]
    assert found == ["passed", "Failed", "Skipped"]


def test_every_kind_of_verdict_ends_a_test() -> None:
    from refattn.testing._report import Result
    from refattn.testing._verdicts import Verdict

    trial = prepare("math:hypot")
    ends = {
        kind: ended(lambda kind=kind: conclude(trial, [Result("", "", "", Verdict(kind), None, 0)])) for kind in KINDS
    }
    assert ends.pop("right") == "passed"
    assert (ends.pop("unsupported"), ends.pop("does not hold"), ends.pop("suspect")) == (
        "Skipped",
        "Skipped",
        "XFailed",
    )
    assert set(ends.values()) == {"Failed"}


def test_the_plugin_adds_an_item_a_configuration_and_nothing_unasked(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    base = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "refattn.testing.plugin",
        "-p",
        "no:cacheprovider",
        "-W",
        "error",
    ]
    # where refattn is installed its entry point would load the plugin once more
    env = {
        "PYTHONPATH": str(HERE.parent),
        "PATH": "",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }

    def ask(*more: str) -> str:
        return subprocess.run([*base, *more], cwd=tmp_path, env=env, capture_output=True, text=True).stdout

    kernel = ["--refattn", f"{KERNELS}:bottom_right", "--refattn-framework", "numpy"]
    assert "1 passed" in ask()
    listed = ask("--collect-only", *kernel)
    assert all(f"kernels.py:bottom_right::{name}\n" in listed for name in names())
    told = ask(*kernel, "-k", "test_own or fewer or (window and causal)", "-rf")
    assert "FAILED" in told and "causal, fewer rows than keys" in told
    assert "unknown" not in told and "test_own" not in [line for line in told.splitlines() if "FAILED" in line]
    assert (
        "has no missing"
        in subprocess.run(
            [*base, "--refattn", f"{KERNELS}:missing"], cwd=tmp_path, env=env, capture_output=True, text=True
        ).stderr
    )


def test_a_worker_is_started_again_after_it_died() -> None:
    with Worker(f"{KERNELS}:right") as worker:
        first = worker._process
        worker._stop()
        from refattn.testing._calling import Ask

        x = np.ones((1, 1, 2, 2), np.float32)
        told = worker.ask(Ask(args=(x, x, x), kwargs={}, framework="numpy"), 20.0)
        assert told.kind == "right" and np.array_equal(told.returned, x) and worker._process is not first


def test_capabilities_are_words_without_commas() -> None:
    assert not [name for name in CAPABILITIES if "," in name or not name.isascii()]
