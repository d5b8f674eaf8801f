import random

import pytest

from oft_diffusion.evaluation import Row, figures
from oft_diffusion.evaluation.figures import SETS


def row(set_name, seed, adapted, *, hit=False, faithful=False, shared=0, nearest=1.0, group="g/0"):
    return Row(group, set_name, "a cat", seed, adapted, {}, hit, shared, faithful, nearest)


def pairs(set_name, adapted, base, key):
    return [row(set_name, i, on, **{key: v}) for on, vs in ((True, adapted), (False, base)) for i, v in enumerate(vs)]


def every_set(*given):
    """Rows of all sets; those not given are two plain pairs."""
    left = set(SETS) - {r.set for r in given}
    return [*given, *(r for name in left for r in pairs(name, [False] * 2, [False] * 2, "hit"))]


def test_each_figure_is_the_share_that_its_definition_says():
    seen = {
        True: [(True, True), (True, False), (False, True), (False, True)],
        False: [(False, True), (False, False)] * 2,
    }
    recoloured = [
        row("recoloured", i, on, hit=hit, faithful=faithful)
        for on, pictures in seen.items()
        for i, (hit, faithful) in enumerate(pictures)
    ]
    rows = every_set(
        *pairs("subject", [True, True, True, False], [False] * 4, "hit"),
        *recoloured,
        *pairs("other", [3, 1], [1, 1], "shared"),
        *pairs("other trigger", [True, False, False, False], [False] * 4, "hit"),
        *pairs("class word", [True, True, False, False], [True, False, False, False], "hit"),
    )
    found = figures(rows, {"g/0": 0.5})
    assert found["subject hit"].adapted.mean == 0.75
    assert found["subject hit"].base.mean == 0
    assert found["subject hit"].ratio is None
    assert found["prompt fidelity"].adapted.mean == 0.75
    assert found["prompt fidelity"].base.mean == 0.5
    assert found["prompt fidelity"].ratio is not None
    assert found["prompt fidelity"].ratio.mean == 1.5
    assert found["hit and fidelity"].adapted.mean == 0.25
    assert found["attribute drift"].difference.mean == 0.25
    assert found["leakage, other trigger"].adapted.mean == 0.25
    assert found["leakage, class word"].difference.mean == 0.25
    assert found["memorisation"].adapted.mean == 0
    random.Random(0).shuffle(rows)
    shuffled = figures(rows, {"g/0": 0.5})
    assert {k: v.difference.mean for k, v in shuffled.items()} == {k: v.difference.mean for k, v in found.items()}


def test_preservation_is_a_difference_of_pairs():
    rows = every_set(*pairs("other", [True, False, True, True], [True, True, False, True], "faithful"))
    found = figures(rows, {"g/0": 0.5})["preservation"]
    assert found.difference.mean == 0
    assert found.difference.low < 0 < found.difference.high


def test_that_no_pair_was_lost_does_not_mean_that_none_can_be():
    rows = every_set(*pairs("other", [True, True, True], [True, True, False], "faithful"))
    found = figures(rows, {"g/0": 0.5})["preservation"]
    assert found.difference.mean == pytest.approx(1 / 3)
    assert found.difference.low < 0


def test_pictures_nearer_than_the_instances_are_to_each_other_count_as_memorised():
    rows = every_set(*pairs("subject", [0.2, 0.6], [0.6, 0.6], "nearest"))
    found = figures(rows, {"g/0": 0.5})
    assert found["memorisation"].adapted.mean == 0.5
    assert found["memorisation"].base.mean == 0


def test_rows_without_a_partner_are_refused():
    rows = every_set(*pairs("subject", [True], [False], "hit"))
    figures(rows, {"g/0": 0.5})
    with pytest.raises(ValueError, match="'subject' needs rows with and without"):
        figures(rows[1:], {"g/0": 0.5})
    with pytest.raises(ValueError, match="'class word'"):
        figures([r for r in rows if r.set != "class word"], {"g/0": 0.5})
