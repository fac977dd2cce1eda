"""The budget question, some rows alone, and what the command line is asked of them."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import cli, masks, rounding, softmax, study
from refattn.sparse import longformer, sparse_transformer
from refattn.study import _expression, _report
from refattn.testing import assert_within

RNG = np.random.default_rng(11)
Q, K, V = RNG.standard_normal((3, 2, 24, 6))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def errors(window: int) -> tuple[float, float]:
    """Error and bound of Longformer ÷ spread, root mean squares, by the verbs alone."""
    spread = (V.max(axis=1) - V.min(axis=1))[:, None, :]
    error = np.abs(longformer.attend(Q, K, V, window=window) - softmax.attend(Q, K, V)) / spread
    bound = longformer.bound(Q, K, V, window=window) / spread
    return float(np.sqrt((error**2).mean())), float(np.sqrt((bound**2).mean()))


def test_the_cheapest_window_is_the_first_of_all_that_meets_the_target() -> None:
    found, _ = study.target(Q, K, V, target=0.05, methods=["longformer"]).rows
    every = [errors(window) for window in range(1, 24)]
    first = [next(w for w, both in enumerate(every, 1) if both[which] <= 0.05) for which in (0, 1)]
    assert found.error is not None and found.bound is not None
    assert [found.error.budget, found.bound.budget] == [f"window={w}" for w in first]
    pairs = sum(min(23, i + first[0]) - max(0, i - first[0]) + 1 for i in range(24))
    assert found.error.cost == pairs / 24**2
    room = rounding.gamma(V.size + 8) * np.array(every[first[0] - 1]).max()
    assert_within(found.error.value, every[first[0] - 1][0], room)


@pytest.mark.parametrize("most", [0.02, 0.05, 0.1, 0.2])
def test_where_cost_rises_and_falls_the_cheapest_of_all_is_found(most: float) -> None:
    found, _ = study.target(Q, K, V, target=most, mask=masks.causal(), methods=["sparse_transformer"]).rows
    exact, spread = softmax.attend(Q, K, V, mask=masks.causal()), np.ptp(V, axis=1)[:, None, :]
    whole = softmax.cost(24, 24, 6, 6, mask=masks.causal()).flops
    meets: list[tuple[float, int]] = []
    for length in range(1, 25):
        o = sparse_transformer.attend(Q, K, V, length=length)
        if np.sqrt((((o - exact) / spread) ** 2).mean()) <= most:
            meets.append((sparse_transformer.cost(24, 24, 6, 6, length=length).flops / whole, length))
    assert found.error is not None and (found.error.cost, found.error.budget) == (
        min(meets)[0],
        f"length={min(meets)[1]}",
    )


def test_no_key_beside_the_own_is_a_budget_too() -> None:
    far = 40 * np.eye(12)
    found, _ = study.target(far, far, V[0, :12], target=1e-3, methods=["longformer"]).rows
    assert found.error is not None and found.bound is not None
    assert (found.error.budget, found.bound.budget) == ("window=0", "window=0")


def test_a_search_that_is_stopped_keeps_what_was_found() -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.target(Q, K, V, target=0.05, progress=stop)
    answer = study.target(Q, K, V, target=0.05, progress=stop, partial=True)
    assert answer.partial and len(answer.rows) == 1 and answer.notes[0].startswith("partial")


def test_fewer_segments_are_cheaper_and_are_looked_at_first() -> None:
    same = np.repeat(K[:, ::2], 2, axis=1), np.repeat(V[:, ::2], 2, axis=1)
    (found,) = study.target(Q, *same, target=1e-9, methods=["pooling"]).rows
    assert found.error is not None and found.error.budget == "size=2" and found.error.cost == 0.5


def test_what_no_budget_reaches_is_none_and_what_has_no_bound_says_so() -> None:
    answer = study.target(Q, K, V, target=1e-3, methods=["linear_transformer", "memformer"], title="toy")
    linear, memory = answer.rows
    assert linear.error is None and linear.bound is None and linear.claimed
    assert memory.bound is None and not memory.claimed
    cells = {line[0]: line[1:] for line in answer.lines}
    assert cells["linear_transformer"] == ("none", "—", "—", "none", "—", "—")
    assert cells["memformer"][3] == "no bound"
    assert str(answer).startswith("toy: the cheapest budget found")


def test_a_method_without_a_budget_meets_a_target_or_not() -> None:
    (found,) = study.target(Q, K, V, target=10.0, methods=["linear_transformer"]).rows
    assert found.error is not None and found.error.budget == ""


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan])
def test_a_target_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="target is"):
        study.target(Q, K, V, target=wrong)


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(9, 3)], ids=["none", "causal", "window"])
def test_some_rows_say_what_all_rows_say_of_them(mask: Any) -> None:
    names = ["longformer", "segments", "sparse_transformer", "linear_transformer", "polynomial", "pooling"]
    some = study.compare(Q, K, V, mask=mask, methods=names, rows=5, seed=3)
    assert some.setting is not None and some.setting.rows is not None and len(some.setting.rows) == 5
    whole = study.compare(Q, K, V, mask=mask, methods=names, seed=3)
    assert [(row.method, row.budget, row.cost) for row in some.rows] == [
        (row.method, row.budget, row.cost) for row in whole.rows
    ]
    for few, every in zip(some.rows, whole.rows, strict=True):
        assert few.holds and few.reference == every.reference
        assert {n for head in few.heads for n in head.worst} == set(some.setting.rows)


def test_rows_leave_out_what_cannot_answer_them_and_say_so() -> None:
    table = study.compare(Q, K, V, methods=["memformer", "linformer"], rows=4)
    assert {row.method for row in table.rows} == {"linformer"}
    assert set(table.left_out) == {"memformer", "linformer (fit)"}
    assert "measured on 4 of 24 rows of each head" in str(table)


def test_a_study_that_is_stopped_keeps_what_is_done() -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.compare(Q, K, V, methods=["longformer"], progress=stop)
    table = study.compare(Q, K, V, methods=["longformer"], progress=stop, partial=True)
    assert table.partial and len(table.rows) == 2 and "partial" in str(table)


def test_budgets_are_swept_from_the_cheapest_and_cost_is_a_limit() -> None:
    table = study.compare(Q, K, V, methods=["longformer", "pooling"], budgets={"longformer": (4, 1), "pooling": (2, 8)})
    assert [row.budget for row in table.rows][-2:] == ["size=8", "size=2"]
    assert [row.budget for row in table.rows][:2] == ["window=1", "window=4"]
    cheap = study.compare(Q, K, V, methods=["longformer"], cost=0.2)
    assert cheap.rows and all(row.cost <= 0.2 for row in cheap.rows)


def test_progress_runs_to_the_end_where_costs_leave_methods_out() -> None:
    seen: list[tuple[int, int]] = []
    study.compare(Q, K, V, methods=["performer"], cost=0.01, trials=20, progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == len(seen) - 1


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("causal", masks.causal()),
        ("causal()", masks.causal()),
        ("window(3, None) & ~prefix(2)", masks.window(3, None) & ~masks.prefix(2)),
        ("global_tokens([0, 5]) | window(left=1, right=1)", masks.global_tokens([0, 5]) | masks.window(1, 1)),
    ],
)
def test_a_mask_is_said_in_text(text: str, same: masks.Mask) -> None:
    assert str(_expression.mask(text).on(9, 9)) == str(same.on(9, 9))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "causal +",
        "nothing",
        "window(1)",
        "window(q, 1)",
        "__import__('os')",
        "causal.__class__",
        "3",
        "-causal",
        "window(1, 0, **{})",
    ],
)
def test_what_is_no_mask_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="^mask is"):
        _expression.mask(text)


@pytest.mark.parametrize("text", ["~" * 3000 + "causal", " | ".join(["causal"] * 3000)])
def test_a_mask_that_is_nested_too_deep_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="^mask "):
        _expression.mask(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mask", "nothing"), "--mask: mask is 'nothing'"),
        (("--budget", "much"), "--budget is 'much'"),
        (("--budget", "longformer=a"), "--budget is 'longformer=a'"),
        (("--budget", "performer=0"), "performer has features 0"),
        (("--budget", "gaussian=2"), "gaussian, which has no budget"),
        (("--budget", "-1"), "cost is -1"),
        (("--rows", "0"), "rows is 0"),
        (("--target", "0"), "target is 0"),
        (("--head", "0,0"), "--head is about the report; it needs --out"),
        (("--target", "0.1", "--budget", "0.5"), "--budget is about the table; leave it out with --target"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    out, said = capsys.readouterr()
    assert out == "" and said.count("\n") == 1 and said.startswith("refattn: ") and message in said


@pytest.mark.parametrize(("head", "message"), [("a", "expected integers"), ("0,2", "the shipped sample, (2, 2)")])
def test_a_head_that_there_is_not_is_refused_before_any_work(
    head: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--head", head, "--out", str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and not (tmp_path / "out").exists()


def test_numbers_of_numpy_are_numbers_in_the_report(tmp_path: Path) -> None:
    budgets = {"longformer": np.array([1, 3]), "performer": np.array([4, 8])}
    table = study.compare(
        Q, K, V, scale=np.float32(0.5), cost=np.float32(2.0), budgets=budgets, methods=[*budgets], trials=20
    )
    study.report(tmp_path, [table])
    data = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))["studies"][0]
    assert data["setting"]["scale"] == 0.5 and data["curves"][0]["budgets"] == [4, 8]


def test_the_command_line_answers_the_budget_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", q=Q, k=K, v=V)
    assert run(str(tmp_path / "a.npz"), "--target", "0.05", "--methods", "longformer") == 0
    out = capsys.readouterr().out
    assert out == str(study.target(Q, K, V, target=0.05, methods=["longformer"], title=str(tmp_path / "a.npz"))) + "\n"


def capture(tmp_path: Path, name: str, **arrays: Any) -> str:
    np.savez(tmp_path / name, **{"q": Q, "k": K, "v": V} | arrays)
    return str(tmp_path / name)


def stopping(verb: Any, after: int) -> Any:
    """Return the verb, interrupted at some step of its progress; by the third call at the latest at its start."""
    calls: list[str] = []

    def stopped(*arrays: Any, progress: Any, **options: Any) -> Any:
        calls.append("")

        def stop(done: int, total: int) -> None:
            progress(done, total)
            if done == after or len(calls) > 1:
                raise KeyboardInterrupt

        return verb(*arrays, progress=stop, **options)

    return stopped


@pytest.mark.parametrize("after", [5, 10**6])
def test_the_command_line_keeps_what_is_done_when_it_is_stopped(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "compare", stopping(study.compare, after))
    files, out = [capture(tmp_path, name) for name in ("a.npz", "b.npz")], tmp_path / "out"
    assert run(*files, "--methods", "longformer", "--out", str(out)) == 130
    assert "longformer" in capsys.readouterr().out
    data = json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert data["command"] == shlex.join(["refattn", "study", *files, "--methods", "longformer", "--out", str(out)])
    studies = data["studies"]
    assert [one["title"] for one in studies] == files[:1]
    assert studies[0]["partial"] == (after == 5)


def test_a_budget_question_that_is_stopped_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "target", stopping(study.target, 1))
    out = tmp_path / "out"
    assert run(capture(tmp_path, "a.npz"), "--target", "0.1", "--methods", "longformer", "--out", str(out)) == 130
    (answer,) = json.loads((out / "study.json").read_text(encoding="utf-8"))["targets"]
    assert answer["notes"] == ["partial: stopped before the end"] and len(answer["rows"]) == 1


def test_a_report_that_is_stopped_leaves_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(_report, "find", stopped)
    assert run(capture(tmp_path, "a.npz"), "--methods", "longformer", "--out", str(tmp_path / "out")) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["study.csv"]


def test_a_later_file_that_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the study ran before its files were looked at")

    monkeypatch.setattr(study, "compare", worked)
    files = capture(tmp_path, "a.npz"), capture(tmp_path, "b.npz", k=K[..., :3])
    assert run(*files) == 2
    assert "b.npz: k has" in capsys.readouterr().err


def test_what_fails_later_does_not_take_away_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = study.compare

    def full(*arrays: Any, title: str, **options: Any) -> Any:
        if "b.npz" in title:
            raise MemoryError("full")
        return compare(*arrays, title=title, **options)

    monkeypatch.setattr(study, "compare", full)
    files, out = [capture(tmp_path, name) for name in ("a.npz", "b.npz")], tmp_path / "out"
    assert run(*files, "--methods", "longformer", "--out", str(out)) == 2
    assert "not enough memory" in capsys.readouterr().err
    assert len(json.loads((out / "study.json").read_text(encoding="utf-8"))["studies"]) == 1
