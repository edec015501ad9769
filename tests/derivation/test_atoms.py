"""Atoms: what is joined, what follows, and what every rank must have."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_autotp.derivation.atoms import ENTRY, EVERY, OWN, SHARED, WHOLE, Atoms, Ids


def fresh(atoms: Atoms, level: int, count: int) -> Ids:
    return atoms.fresh(np.full(count, level))


def classes(atoms: Atoms, ids: Ids) -> list[int]:
    """The classes of atoms, numbered as they come."""
    found = atoms.find(ids).tolist()
    return [list(dict.fromkeys(found)).index(one) for one in found]


def test_new_atoms_stand_apart_and_whole_ones_are_everywhere() -> None:
    atoms = Atoms()
    a = atoms.fresh(np.array([OWN, WHOLE, OWN]))
    assert len(set(atoms.find(a).tolist())) == 3
    assert (atoms.find(a) == EVERY).tolist() == [False, True, False]
    assert not set(fresh(atoms, OWN, 2).tolist()) & set(a.tolist())


def test_joins_are_transitive_and_the_class_is_its_smallest_atom() -> None:
    atoms = Atoms()
    a = fresh(atoms, OWN, 6)
    atoms.join(a[[4, 1]], a[[3, 2]])
    atoms.join(a[2], a[3])
    assert classes(atoms, a) == [0, 1, 1, 1, 1, 2]
    assert (atoms.find(a[1:5]) == a[1]).all()


def test_joins_broadcast() -> None:
    atoms = Atoms()
    a, b = fresh(atoms, OWN, 3), fresh(atoms, OWN, 2)
    atoms.join(a[:, None], b[None])
    assert len(set(atoms.find(np.concatenate([a, b])).tolist())) == 1


def test_long_chains_are_followed_to_their_end() -> None:
    atoms = Atoms()
    a = fresh(atoms, OWN, 200)
    for at in reversed(range(199)):
        atoms.join(a[at], a[at + 1])
    assert (atoms.find(a) == a[0]).all()


def test_what_is_joined_with_everything_stays_so() -> None:
    atoms = Atoms()
    a, b = fresh(atoms, OWN, 2), fresh(atoms, OWN, 2)
    atoms.everywhere(a[:1])
    atoms.join(a, b)
    assert (atoms.find(b) == EVERY).tolist() == [True, False]
    assert not atoms.has_own(b[:1]) and atoms.has_own(b) and atoms.are_own(b)


def test_atoms_of_one_level_that_meet_are_joined() -> None:
    atoms = Atoms()
    a, b = fresh(atoms, OWN, 3), fresh(atoms, OWN, 3)
    assert atoms.meet(a, b).tolist() == a.tolist()
    assert atoms.find(b).tolist() == a.tolist()
    assert list(atoms.needed()) == []


@pytest.mark.parametrize("other", [SHARED, ENTRY])
@pytest.mark.parametrize("turned", [False, True])
def test_of_two_levels_the_lower_stays_and_needs_the_other(other: int, turned: bool) -> None:
    atoms = Atoms()
    own, follows = fresh(atoms, OWN, 2), fresh(atoms, other, 2)
    kept = atoms.meet(follows, own) if turned else atoms.meet(own, follows)
    assert kept.tolist() == own.tolist()
    assert sorted(atoms.needed()) == [(int(a), int(b)) for a, b in zip(own, follows)]


def test_needs_are_of_classes_and_none_of_its_own() -> None:
    atoms = Atoms()
    own, shared = fresh(atoms, OWN, 4), fresh(atoms, SHARED, 2)
    atoms.meet(own, np.repeat(shared, 2))
    atoms.join(own[0], own[1])
    assert sorted(atoms.needed()) == [
        (int(own[0]), int(shared[0])),
        (int(own[2]), int(shared[1])),
        (int(own[3]), int(shared[1])),
    ]
    atoms.join(own[2], shared[1])
    assert sorted(atoms.needed()) == [(int(own[0]), int(shared[0])), (int(own[3]), int(own[2]))]


def test_what_meets_something_everywhere_is_everywhere() -> None:
    atoms = Atoms()
    own, whole = fresh(atoms, OWN, 2), atoms.fresh(np.array([WHOLE, SHARED]))
    atoms.meet(own, whole)
    assert (atoms.find(own) == EVERY).tolist() == [True, False]
    assert list(atoms.needed()) == [(int(own[1]), int(whole[1]))]


def test_along_a_dim_all_are_joined_and_the_others_stay() -> None:
    atoms = Atoms()
    a = fresh(atoms, OWN, 6).reshape(2, 3)
    kept = atoms.along(a, 1)
    assert kept.shape == (2, 1)
    assert classes(atoms, a.ravel()) == [0, 0, 0, 1, 1, 1]
    assert atoms.along(kept, 1) is kept


def test_along_a_dim_what_is_dealt_out_is_kept_and_needs_the_rest() -> None:
    atoms = Atoms()
    shared, own = fresh(atoms, SHARED, 2), fresh(atoms, OWN, 2)
    kept = atoms.along(np.concatenate([shared, own])[None], 1)
    assert kept.tolist() == [[own[0]]]
    assert atoms.find(own[1]) == own[0]
    assert sorted(atoms.needed()) == [(int(own[0]), int(one)) for one in shared]


def test_marks_tell_apart_what_was_taken_apart() -> None:
    atoms = Atoms()
    a = fresh(atoms, OWN, 6)
    atoms.mark(a[:4], 1)
    atoms.mark(a[2:], 2)
    marks = atoms.marks(a).tolist()
    assert marks[0] == marks[1] and marks[2] == marks[3] and marks[4] == marks[5]
    assert len(set(marks)) == 3


def test_marks_know_the_order_of_signs() -> None:
    atoms = Atoms()
    a, b = fresh(atoms, OWN, 1), fresh(atoms, OWN, 1)
    for sign in (1, 2):
        atoms.mark(a, sign)
        atoms.mark(b, 3 - sign)
    assert atoms.marks(a) != atoms.marks(b)
