"""What every method must obey, run for every method in the table that declares it."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings, target
from hypothesis import strategies as st

from refattn import masks, method, partial, rounding, softmax
from refattn.testing import Ball, assert_within
from refattn.testing.ball import precision
from refattn.testing.strategies import cases

MODULES = method.modules()
LAWS = {}
RATIOS: list[float] = []


def law(applies=lambda module: True):
    """Enter a law into the table, for the methods that declare what it needs."""

    def enter(check):
        LAWS[check.__name__] = (check, applies)
        return check

    return enter


def declares(**wanted):
    return lambda module: all(getattr(module.METHOD, name) in values for name, values in wanted.items())


def within(actual, expected, bound):
    """Judge, where there is something to judge, and remember how close it was."""
    RATIOS.append(assert_within(actual, expected, bound, empty=True))


def allowance(case):
    positional, named = case.arguments()
    return rounding.allowance(case.module.attend, *positional, **named)


def allowances(case):
    positional, named = case.arguments(without=case.method.linear_in)
    out = rounding.allowance(case.module.weights, *positional, **named)
    return out._asdict() if len(case.method.linear_in) > 1 else {case.method.linear_in[0]: out}


def values(case, name):
    """What the weights of an argument multiply: Longformer's global weights fall back on v."""
    return case.arrays.get(name, case.arrays["v"])


def lifted(case, lift=Ball.lift):
    return case.given(**{name: lift(x) for name, x in case.arrays.items()})


@law()
def attend_is_within_rounding_of_ball_arithmetic(module, data):
    case = data.draw(cases(module))
    with precision():
        within(case.attend(), lifted(case).attend(), allowance(case))


@law(lambda module: bool(module.METHOD.linear_in))
def weights_are_within_rounding_of_ball_arithmetic(module, data):
    case = data.draw(cases(module))
    bounds = allowances(case)
    with precision():
        for (name, w), truth in zip(case.weights().items(), lifted(case).weights().values(), strict=True):
            within(w, truth, bounds[name])


@law(lambda module: bool(module.METHOD.linear_in))
def attend_is_weights_times_values(module, data):
    case = data.draw(cases(module))
    bounds, total, room = allowances(case), 0.0, allowance(case)
    for name, w in case.weights().items():
        v = values(case, name)
        total = total + w @ v
        room = room + bounds[name] @ abs(v) + 2 * rounding.gamma(len(v) + 2) * (abs(w) + bounds[name]) @ abs(v)
    within(case.attend(), total, room)


@law(lambda module: module.METHOD.linear_in and module.METHOD.rows in ("stochastic", "sum to 1"))
def rows_of_weights_sum_to_what_is_declared(module, data):
    case = data.draw(cases(module))
    total = sum(w.sum(axis=1) for w in case.weights().values())
    error = sum(b.sum(axis=1) for b in allowances(case).values())
    room = error + rounding.gamma(case.sizes["S"] + 2) * (1 + error)
    seen = sum(abs(w).sum(axis=1) for w in case.weights().values()) > 0
    plain = "sink" not in case.arrays and not case.options.get("eps")
    if plain:
        within(total, seen.astype(float), room)
    assert (total <= 1 + room).all()
    if module.METHOD.rows == "stochastic":
        assert all((w >= 0).all() for w in case.weights().values())


@law(lambda module: bool(module.METHOD.linear_in))
def the_output_is_linear_in_what_is_declared(module, data):
    case = data.draw(cases(module))
    names = [name for name in case.method.linear_in if name in case.arrays]
    other = {name: np.roll(case.arrays[name], 1) for name in names}
    both = case.given(**{name: case.arrays[name] + 2 * other[name] for name in names})
    alone = case.given(**other)
    room = allowance(both) + allowance(case) + 2 * allowance(alone)
    expected = case.attend() + 2 * alone.attend()
    within(both.attend(), expected, room + 2 * rounding.U * abs(expected))


@law()
def leading_axes_are_independent(module, data):
    first = data.draw(cases(module, masked=False))
    second = first.given(**{name: x[::-1] if x.ndim else x + 1 for name, x in first.arrays.items()})
    stack = {name: np.stack([x, second.arrays[name]]) for name, x in first.arrays.items()}
    together = first.given(**stack)
    for alone, answer in zip((first, second), together.attend(), strict=True):
        within(answer, alone.attend(), 2 * allowance(alone))
    do = np.ones_like(together.attend())
    separate = [(case.vjp(do[0]), gradient_allowance(case, do[0])) for case in (first, second)]
    for name, g in together.vjp(do).items():
        for alone, (own, room) in zip(g, separate, strict=True):
            within(alone, own[name], 2 * room[name])


@law()
def grouped_heads_are_repeated_heads(module, data):
    case = data.draw(cases(module, masked=False))
    keyed = [name for name in case.arrays if letters(case, name) and "T" not in letters(case, name)]
    few = {name: np.stack([case.arrays[name], case.arrays[name][::-1]]) for name in keyed}
    many = {name: np.stack([case.arrays[name]] * 4) for name in case.arrays if name not in keyed}
    grouped = case.given(**few, **many)
    repeated = case.given(**{name: np.repeat(x, 2, axis=0) for name, x in few.items()}, **many)
    alone = [case, case.given(**{name: few[name][1] for name in keyed})]
    within(grouped.attend(), repeated.attend(), 2 * sum(map(allowance, alone)))
    do = np.ones_like(grouped.attend())
    whole, parts, rooms = grouped.vjp(do), repeated.vjp(do), [gradient_allowance(x, do[0]) for x in alone]
    for name in keyed:  # a key that two heads share gets what reaches either
        for n, (one, other) in enumerate(zip(parts[name][::2], parts[name][1::2], strict=True)):
            room = 4 * rooms[n][name] + 2 * rounding.gamma(2) * (abs(one) + abs(other) + 2 * rooms[n][name])
            within(whole[name][n], one + other, room)


@law(declares(permutable=(True,)))
def keys_may_be_permuted(module, data):
    case = data.draw(cases(module, masked=False))
    order = data.draw(st.permutations(range(case.sizes["S"])))
    moved = {}
    for name, axes in case.method.arrays.items():
        if name in case.arrays and "S" in axes.rstrip("?").split():
            moved[name] = case.arrays[name].take(np.array(order, int), axis=axes.rstrip("?").split().index("S"))
    within(case.given(**moved).attend(), case.attend(), allowance(case) + allowance(case.given(**moved)))


@law(declares(masks=("any", "prefix")))
def causal_never_looks_ahead(module, data):
    case = data.draw(cases(module, least=1, square=True)).given(mask=masks.causal())
    t = data.draw(st.integers(0, case.sizes["T"] - 1))
    later = np.arange(case.sizes["T"]) > t
    poisoned = poison(case, later, later, later | later[:, None])
    within(poisoned.attend()[: t + 1], case.attend()[: t + 1], 2 * allowance(case)[: t + 1])
    do = np.ones((case.sizes["T"], case.sizes["E"]))
    do[t + 1 :] = 0
    bounds = gradient_allowance(case, do)
    for name, g in poisoned.vjp(do).items():
        if letters(case, name) == ("T", "D"):
            within(g[: t + 1], case.vjp(do)[name][: t + 1], 2 * bounds[name][: t + 1])


@law(declares(rowwise=(True,)))
def some_rows_are_answered_alone(module, data):
    case = data.draw(cases(module, least=1))
    T, S = case.sizes["T"], case.sizes["S"]
    rows = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)))
    some = {name: x[rows] for name, x in case.arrays.items() if letters(case, name)[:1] == ("T",)}
    if case.method.masks == "any" or case.options.get("mask") is not None:
        whole = case.options["mask"] if case.options["mask"] is not None else masks.window(None, None)
        some["mask"] = masks.bind(whole, T, S).pick(rows)
    alone = case.given(**some)
    within(alone.attend(), case.attend()[rows], 2 * allowance(case)[rows])
    if any(claim.verb == "bound" for claim in case.method.claims):
        room = 2 * case.claim_rounding() + 2 * allowance(case)
        within(alone.bound(), case.bound()[rows], room[rows])


@law(declares(masks=("any",)))
def what_is_not_seen_never_matters(module, data):
    case = data.draw(cases(module, least=1, masked=True))
    seen = np.zeros((case.sizes["T"], case.sizes["S"]), bool)
    for w in case.weights().values():
        seen |= w != 0
    pairs = masks.bind(case.options["mask"], case.sizes["T"], case.sizes["S"])
    allowed = pairs.seen(np.arange(pairs.T), np.arange(pairs.S)) if pairs is not None else seen | True
    blind, hidden = ~allowed.any(axis=1), ~allowed.any(axis=0)
    do = np.ones((case.sizes["T"], case.sizes["E"]))
    poisoned = poison(case, blind, hidden, ~allowed)
    assert not np.isnan(poisoned.attend()).any()
    within(poisoned.attend(), case.attend(), 2 * allowance(case))
    bounds = gradient_allowance(case, do)
    for name, g in poisoned.vjp(np.where(blind[:, None], np.nan, do)).items():
        within(g, case.vjp(do)[name], 2 * bounds[name])


@law(declares(masks=("any", "prefix")))
def nan_in_a_row_stays_with_what_the_row_sees(module, data):
    case = data.draw(cases(module, least=1, masked=True))
    row = np.arange(case.sizes["T"]) == data.draw(st.integers(0, case.sizes["T"] - 1))
    with precision():  # balls do not underflow: what is 0 is not seen
        weights = [w[int(row.argmax())].cells for w in lifted(case).weights().values()]
    seen = np.array([any(cell != 0 for cell in cells) for cells in zip(*weights, strict=True)], bool)
    poisoned = poison(case, row, seen & False, row[:, None] & (seen & False))
    within(poisoned.attend()[~row], case.attend()[~row], 2 * allowance(case)[~row])
    do = np.ones((case.sizes["T"], case.sizes["E"]))
    bounds, clean = gradient_allowance(case, do), case.vjp(do)
    for name, g in poisoned.vjp(np.where(row[:, None], np.nan, do)).items():
        apart = {"T": ~row, "S": ~seen}.get("".join(letters(case, name)[:1]))
        if apart is not None and letters(case, name)[1:] != ("S",):
            within(g[apart], clean[name][apart], 2 * bounds[name][apart])


def letters(case, name):
    """Return the axes of an array, by letter; a logit a head has none, and goes with the queries."""
    return tuple(case.method.arrays[name].rstrip("?").split())


def poison(case, rows, keys, pairs):
    """Put NaN into some rows, some keys and some pairs of every array that has them."""
    rotten = {}
    for name, x in case.arrays.items():
        first = letters(case, name)[:2]
        bad = {("T", "S"): pairs, ("T", "D"): rows, ("S", "D"): keys, ("S", "E"): keys}.get(first)
        if bad is not None:
            rotten[name] = x.copy()
            rotten[name][bad] = np.nan
    return case.given(**rotten)


def gradient_allowance(case, do):
    positional, named = case.arguments()
    out = rounding.allowance(case.module.vjp, do, *positional, **named)._asdict()
    return {name: x for name, x in out.items() if name in case.arrays}


@law()
def vjp_is_the_directional_derivative(module, data):
    case = data.draw(cases(module, least=1, most=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    do = rng.integers(-4, 5, (case.sizes["T"], case.sizes["E"])) / 2
    gradients, bounds = case.vjp(do), gradient_allowance(case, do)
    with precision():
        for name, g in gradients.items():
            direction = rng.integers(-2, 3, g.shape).astype(float)
            moved = case.given(**{s: Ball.lift(x) for s, x in case.arrays.items()})
            moved = moved.given(**{name: Ball.along(case.arrays[name], direction)})
            truth = (moved.attend().derivative() * do).sum()
            along = (Ball.lift(g) * direction).sum()
            within(0.0, along - truth, (bounds[name] * abs(direction)).sum() * rounding.EVALUATION)


@law()
def vjp_is_linear_in_the_cotangent(module, data):
    case = data.draw(cases(module))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    a, b = rng.integers(-4, 5, (2, case.sizes["T"], case.sizes["E"])).astype(float)
    parts = [case.vjp(x) for x in (a, b, a + b)]
    rooms = [gradient_allowance(case, x) for x in (a, b, a + b)]
    for name, whole in parts[2].items():
        expected = parts[0][name] + parts[1][name]
        within(whole, expected, sum(room[name] for room in rooms) + rounding.U * abs(expected))


@law()
def inputs_of_any_layout_are_read_and_never_written(module, data):
    case = data.draw(cases(module))
    plain, do = case.attend(), np.ones((case.sizes["T"], case.sizes["E"]))
    layouts = []
    for shape_it in (np.asfortranarray, strided, frozen):
        arrays = {name: shape_it(x) if x.ndim else x for name, x in case.arrays.items()}
        before = {name: x.copy() for name, x in arrays.items()}
        other = case.given(**arrays)
        within(other.attend(), plain, 2 * allowance(case))
        other.vjp(shape_it(do))
        layouts.append(all((arrays[name] == before[name]).all() for name in arrays))
    assert all(layouts)


def strided(x):
    wide = np.full(tuple(2 * n for n in x.shape), np.nan)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def frozen(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@law()
def narrow_inputs_are_widened_exactly(module, data):
    case = data.draw(cases(module))
    for dtype in (np.float32, np.float16):
        narrow = case.given(**{name: x.astype(dtype) for name, x in case.arrays.items()})
        wide = case.given(**{name: x.astype(dtype).astype(float) for name, x in case.arrays.items()})
        within(narrow.attend(), wide.attend(), 2 * allowance(wide))
        assert narrow.attend().dtype == np.float64


@law()
def empty_sizes_are_answered(module, data):
    for T, S in ((0, 0), (0, 3), (3, 0), (1, 1)):
        case = data.draw(cases(module, least=1, most=1, masked=False))
        arrays = {}
        for name, axes in case.method.arrays.items():
            if name in case.arrays:
                letters = axes.rstrip("?").split()
                arrays[name] = np.ones([{"T": T, "S": S, "r": 1}.get(a, 2) for a in letters])
        sizes = {"T": T, "S": S, "D": 2, "E": 2}
        chosen = {name: option.values(sizes)[0] for name, option in case.method.options.items() if name in case.options}
        if set(case.method.drawn) & set(chosen):
            picked = {name: option.values(sizes)[0] for name, option in case.method.draw_options.items()}
            made = module.draw(np.random.default_rng(0), *(arrays[s] for s in "qkv"), **picked)
            chosen |= {s: x for s, x in zip(case.method.drawn, made, strict=True) if s in chosen}
        case = case.given(**arrays, **chosen)
        o = case.attend()
        assert o.shape == (T, 2) and np.isfinite(o).all()
        if S == 0 and case.method.linear_in:
            assert (o == 0).all()
        for name, g in case.vjp(np.ones((T, 2))).items():
            assert g.shape == arrays[name].shape and np.isfinite(g).all()


@law(declares(approximates=("softmax",)))
def every_claim_over_the_arrays_holds(module, data):
    case = data.draw(cases(module))
    o, exact, bound = case.attend(), case.exact(), case.bound()
    room = 2 * allowance(case) + exact_allowance(case)  # õ is in the error and in the claim
    room = room + case.claim_rounding()
    assert (abs(o - exact) <= bound + room + rounding.U * abs(o - exact)).all()


def exact_allowance(case):
    return lifted(case, rounding.Bounded.lift).exact().error * rounding.EVALUATION


@law(lambda module: hasattr(module, "partial"))
def split_and_merge_is_the_whole(module, data):
    case = data.draw(cases(module, least=1, masked=False)).given(order="softcap, bias")
    cuts = sorted(data.draw(st.lists(st.integers(0, case.sizes["S"]), max_size=3)))
    edges = [0, *cuts, case.sizes["S"]]
    arrays, options = case.arrays, {s: x for s, x in case.options.items() if s != "mask"}
    parts, errors = [], []
    for a, b in zip(edges, edges[1:], strict=False):
        bias = {"bias": arrays["bias"][:, a:b]} if "bias" in arrays else {}
        sink = {"sink": arrays["sink"]} if "sink" in arrays and a == 0 and not parts else {}
        piece = arrays["q"], arrays["k"][a:b], arrays["v"][a:b]
        parts.append(module.partial(*piece, **bias, **sink, **options))
        errors.append(rounding.allowance(module.partial, *piece, **bias, **sink, **options))
    within(partial.merge(*parts).o, case.attend(), merged(parts, errors) + allowance(case))


def merged(parts, errors):
    """Return how far the merge of parts that are off by `errors` is from the real number.

    A merge is softmax over the parts, with their lse for logits and their o for values: F1 counts its roundings (one
    subtraction, exponential, product and sum for each part, one division), and carries errors of lse and o as F4 does.
    """
    room = np.zeros(parts[0].o.shape)
    for i in range(len(room)):
        live = [n for n, part in enumerate(parts) if part.lse[i] > -np.inf]
        if live:
            lse, o = (np.array([(parts[n][x][i], errors[n][x][i]) for n in live]) for x in (1, 0))
            keys, outputs = rounding.Bounded(lse[:, :1], lse[:, 1:]), rounding.Bounded(o[:, 0], o[:, 1])
            room[i] = rounding.allowance(softmax.partial, [[1.0]], keys, outputs, scale=1.0).o[0]
    return room


@law(lambda module: hasattr(module, "step"))
def recurrent_chunked_and_parallel_agree(module, data):
    case = data.draw(cases(module, least=1, square=True))
    if module.METHOD.masks != "none":
        case = case.given(mask=masks.causal())
    options = {s: x for s, x in case.options.items() if s != "mask"}
    tokens = {s: "T" in letters(case, s) or "S" in letters(case, s) for s in case.method.required}
    cuts = sorted(data.draw(st.sets(st.integers(1, case.sizes["T"]))) | {case.sizes["T"]})
    for edges in ([0, *cuts], list(range(case.sizes["T"] + 1))):
        state, outputs = None, []
        for a, b in zip(edges, edges[1:], strict=False):
            some = (case.arrays[s][a:b] if long else case.arrays[s] for s, long in tokens.items())
            o, state = module.step(state, *some, **options)
            outputs.append(o)
        within(np.concatenate(outputs), case.attend(), 2 * allowance(case))


CELLS = [(name, rule) for name, module in MODULES.items() for rule, (_, applies) in LAWS.items() if applies(module)]


@pytest.mark.parametrize(("name", "rule"), CELLS)
@settings(max_examples=25)
@given(data=st.data())
def test_law(name, rule, data, cells):
    RATIOS.clear()
    LAWS[rule][0](MODULES[name], data)
    worst = max(RATIOS, default=0.0)
    target(worst, label="error / bound")
    cells[name, rule] = max(worst, cells.get((name, rule), 0.0))


def test_no_cell_is_missing(request, cells):
    asked = [item for item in request.session.items if item.path == request.path and item.originalname == "test_law"]
    if len(asked) < len(CELLS):
        return  # a selection of the tests says nothing about the whole table
    assert set(CELLS) == cells.keys()


OUTSIDE = (-1, -0.5, 0, 0.0, np.nan, np.inf, "no", None, (-1,), object())


@pytest.mark.parametrize("name", MODULES)
def test_values_outside_a_declared_domain_are_refused(name):
    module, q = MODULES[name], np.ones((3, 2))
    declared, lengths = module.METHOD, {"T": 3, "S": 3, "D": 2, "E": 2}
    given_arrays = [np.ones([lengths.get(a, 1) for a in declared.arrays[s].split()]) for s in declared.required]
    needed = {s: option.values({"T": 3, "S": 3, "D": 2, "E": 2})[0] for s, option in declared.options.items()}

    def draws(**options):
        return module.draw(np.random.default_rng(0), q, q, q, **options)

    def attends(**options):
        return module.attend(*given_arrays, **{**needed, **options})

    for verb, options in ((attends, declared.options), (draws, declared.draw_options)):
        wanted = {s: o.values({"T": 3, "S": 3, "D": 2, "E": 2})[0] for s, o in options.items()}
        for option_name, option in options.items():
            for value in OUTSIDE:
                try:
                    inside = option.domain(value)
                except TypeError:
                    inside = False
                if not inside:
                    with pytest.raises((ValueError, TypeError), match=option_name):
                        verb(**{**wanted, option_name: value})


@pytest.mark.parametrize("name", MODULES)
def test_every_signature_is_its_declaration(name):
    module, declared = MODULES[name], MODULES[name].METHOD
    common = {"any": ["mask"], "prefix": ["mask"], "none": []}[declared.masks]
    options = [*declared.optional, *declared.options, *common]
    scale = ["scale"] if "scale" in inspect.signature(module.attend).parameters else []
    wanted = {
        "attend": ([*declared.required], [*options, *scale, "backend"]),
        "weights": (
            [s for s in declared.required if s not in declared.linear_in],
            [s for s in (*options, *scale) if s not in declared.linear_in],
        ),
        "vjp": (["do", *declared.required], [*options, *scale, "backend"]),
    }
    if not declared.linear_in:
        del wanted["weights"]
    if hasattr(module, "partial"):
        wanted["partial"] = wanted["attend"]
        wanted["vjp"][1].insert(0, "dlse")
    if hasattr(module, "step"):
        wanted["step"] = (["state", *declared.required], [*declared.optional, *declared.options, *scale, "backend"])
    if declared.drawn:
        wanted["draw"] = (["rng", "q", "k", "v"], [*declared.draw_options])
    for claim in declared.claims:
        if claim.over == "arrays":
            wanted[claim.verb] = ([*declared.required], [*options, "scale"])
        else:  # what is drawn is not given; how it is drawn is, and which rows are asked for
            given = [s for s in declared.required if s not in declared.drawn]
            wanted[claim.verb] = (given, [*declared.draw_options, *declared.options, "delta", "rows", *common, "scale"])
    for verb, (positional, keyword) in wanted.items():
        parameters = inspect.signature(getattr(module, verb)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional, verb
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == keyword, verb
    for option_name, option in declared.options.items():
        default = inspect.signature(module.attend).parameters[option_name].default
        assert default is inspect.Parameter.empty if option.default is method.REQUIRED else default == option.default
        assert all(option.domain(x) for x in option.values({"T": 64, "S": 64, "D": 8, "E": 8}))
    assert set(declared.drawn) <= {*declared.arrays, *declared.options}
    assert [*inspect.signature(module.cost).parameters][:4] == ["T", "S", "D", "E"]
    assert module.Gradients._fields == tuple(declared.arrays)
    assert module.__name__ == ".".join(filter(None, ("refattn", declared.family, declared.name)))
