import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oft_diffusion.evaluation import Row, figures
from oft_diffusion.evaluation.intervals import bootstrap
from oft_diffusion.evaluation.prompts import (
    OTHER_TRIGGER,
    held_out_prompts,
    leakage_prompts,
    other_prompts,
    recoloured_prompts,
    subject_prompts,
)
from oft_diffusion.pocket.world import BACKGROUNDS, CAPTIONED, COLOURS, PLACES, is_held_out

SEEN = ("beach", "city", "night", "room", "snow")


# Intervals


@given(values=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_an_interval_holds_its_mean_and_stays_within_the_values(values):
    i = bootstrap(values)
    assert min(values) <= i.low <= i.mean + 1e-12
    assert i.mean - 1e-12 <= i.high <= max(values)
    assert i.mean == pytest.approx(np.mean(values))
    assert i.pictures == len(values)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        i = bootstrap((rng.random(150) < 0.3).astype(float).tolist())
        held += i.low <= 0.3 <= i.high
    assert 0.90 <= held / 200 <= 0.99


def test_more_pictures_give_narrower_intervals_and_groups_that_differ_wider_ones():
    rng = np.random.default_rng(1)
    values = (rng.random(400) < 0.5).astype(float)
    few, many = bootstrap(values[:40].tolist()), bootstrap(values.tolist())
    assert many.high - many.low < 0.5 * (few.high - few.low)
    apart = [0.0] * 200 + [1.0] * 200  # two runs, one all wrong and one all right
    grouped = bootstrap(apart, ["a"] * 200 + ["b"] * 200)
    plain = bootstrap(apart)
    assert (grouped.low, grouped.high) == (0.0, 1.0)
    assert plain.high - plain.low < 0.15


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


# Prompts


def test_prompts_say_what_they_name():
    prompts = [
        *held_out_prompts(300), *subject_prompts("mug", "zwx", SEEN, 20), *leakage_prompts("fish", 40),
        *recoloured_prompts("car", "red", "zwx", SEEN, 40), *other_prompts("cat", 100),
    ]  # fmt: skip
    for p in prompts:
        words = p.text.split()
        assert words[0] == ("an" if words[1][0] in "aeiou" else "a")
        for name, values in CAPTIONED.items():
            said = [v for v in values if (PLACES[v] in p.text if name == "background" else v in words)]
            assert said == ([p.named[name]] if name in p.named else []), p


def test_held_out_prompts_are_of_combinations_that_pretraining_never_showed():
    prompts = held_out_prompts(100)
    assert all(set(p.named) == set(CAPTIONED) and is_held_out(**p.named) for p in prompts)
    assert len({p.text for p in prompts}) > 90
    assert len({p.named["object"] for p in prompts}) == len(CAPTIONED["object"])


def test_subject_prompts_avoid_what_the_instance_pictures_show():
    assert {p.named["background"] for p in subject_prompts("mug", "zwx", SEEN, 20)} == set(BACKGROUNDS) - set(SEEN)
    recoloured = recoloured_prompts("mug", "blue", "zwx", SEEN, 60)
    assert {p.named["colour"] for p in recoloured} == set(COLOURS) - {"blue"}
    assert not {p.named["background"] for p in recoloured} & set(SEEN)
    assert all("zwx mug" in p.text for p in recoloured)


def test_other_prompts_and_leakage_prompts_lack_the_trigger():
    others = other_prompts("cat", 100)
    assert sum(p.named["object"] == "cat" for p in others) == 50
    assert len({p.text for p in others}) > 80
    leaks = leakage_prompts("cat", 40)
    assert sum(OTHER_TRIGGER in p.text for p in leaks) == 20
    assert all("zwx" not in p.text for p in (*others, *leaks))


# Figures


def row(set_name, seed, adapted, *, hit=False, faithful=False, nearest=1.0, group="g"):
    return Row(group, set_name, "a cat", seed, adapted, {}, hit, faithful, nearest)


def pairs(set_name, count, adapted, base, key):
    return [
        row(set_name, i, on, **{key: values[i]})
        for on, values in ((True, adapted), (False, base))
        for i in range(count)
    ]


def test_each_figure_is_the_share_that_its_definition_says():
    rows = [
        *pairs("subject", 4, [True, True, True, False], [False] * 4, "hit"),
        *pairs("recoloured", 4, [True, True, False, False], [True, True, True, False], "faithful"),
        *pairs("other", 4, [True, False, True, True], [True, True, False, True], "faithful"),
        *pairs("leakage", 4, [True, False, False, False], [False] * 4, "hit"),
    ]
    found = figures(rows, {"g": 0.5})
    assert found["subject hit"].adapted.mean == 0.75
    assert found["subject hit"].base.mean == 0
    assert found["prompt fidelity"].adapted.mean == 0.5
    assert found["prompt fidelity"].base.mean == 0.75
    assert found["preservation"].difference.mean == 0
    assert found["preservation"].difference.low < 0 < found["preservation"].difference.high
    assert found["leakage"].adapted.mean == 0.25
    assert found["memorisation"].adapted.mean == 0
    random.Random(0).shuffle(rows)
    assert {k: v.difference.mean for k, v in figures(rows, {"g": 0.5}).items()} == {
        k: v.difference.mean for k, v in found.items()
    }


def test_pictures_nearer_than_the_instances_are_to_each_other_count_as_memorised():
    rows = [
        *pairs("subject", 2, [0.2, 0.6], [0.6, 0.6], "nearest"),
        *(r for name in ("recoloured", "other", "leakage") for r in pairs(name, 1, [True], [True], "faithful")),
    ]
    found = figures(rows, {"g": 0.5})
    assert found["memorisation"].adapted.mean == 0.5
    assert found["memorisation"].base.mean == 0


def test_rows_without_a_partner_are_refused():
    rows = [r for name in ("subject", "recoloured", "other", "leakage") for r in pairs(name, 2, [1, 1], [1, 1], "hit")]
    figures(rows, {"g": 0.5})
    with pytest.raises(ValueError, match="'subject' needs rows with and without"):
        figures(rows[1:], {"g": 0.5})
    with pytest.raises(ValueError, match="'leakage'"):
        figures([r for r in rows if r.set != "leakage"], {"g": 0.5})
