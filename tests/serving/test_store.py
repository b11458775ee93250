"""People in a database: what is stored, what is refused, and that nothing of the deleted is left."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sql

from plrhf.serving.store import Judgment, NoConsent, People, Person, TooMany

SEA = Judgment(prompt="Write about the sea.", chosen="Blue, says Zoë.", rejected="Wide.")


@pytest.fixture
def people(tmp_path: Path) -> People:
    return People(f"sqlite:///{tmp_path}/people.db", max_judgments=5)


def revision(people: People, name: str) -> int:
    known = people.get(name)
    assert known is not None
    return known.revision


def test_judgments_are_kept_of_those_who_agreed(people: People) -> None:
    with pytest.raises(NoConsent):
        people.add("zoe", [SEA])
    people.put("zoe", consent=False)
    with pytest.raises(NoConsent):
        people.add("zoe", [SEA])
    people.put("zoe", consent=True)
    talk = [{"role": "user", "content": "And?"}]
    tie = Judgment(prompt=talk, chosen="A", rejected="B", verdict="tie")
    first, second = people.add("zoe", [SEA, tie])
    known = people.get("zoe")
    assert known is not None and known.consent
    assert [one.id for one in known.judgments] == [first, second]
    assert known.judgments[1].prompt == talk
    assert known.pairs() == [SEA.pair()]  # a tie is no pair to fit
    assert people.get("ada") is None


def test_a_vector_is_of_a_model_and_of_all_judgments(people: People) -> None:
    people.put("zoe", consent=True)
    (number,) = people.add("zoe", [SEA])
    assert people.vector("zoe", "f1") is None
    now = revision(people, "zoe")
    assert people.save_vector("zoe", "f1", now, b"1234")
    assert people.vector("zoe", "f1") == b"1234" and people.vector("zoe", "f2") is None
    assert not people.remove("ada", number)  # of somebody else
    assert people.remove("zoe", number) and not people.remove("zoe", number)
    assert people.vector("zoe", "f1") is None
    assert not people.save_vector("zoe", "f1", now, b"old!")  # of judgments as they were
    assert people.save_vector("zoe", "f1", now + 1, b"5678")
    assert people.vector("zoe", "f1") == b"5678"


def test_nothing_of_a_deleted_person_is_left(people: People, tmp_path: Path) -> None:
    for name in ("zoe", "ada"):
        people.put(name, consent=True)
        people.add(name, [SEA, SEA])
        people.save_vector(name, "f", revision(people, name), name.encode() * 9)
    before = revision(people, "zoe")
    assert people.delete("zoe") == {"judgments": 2, "vectors": 1}
    assert people.delete("zoe") is None and people.get("zoe") is None
    assert not people.save_vector("zoe", "f", before, b"late")
    ada = people.get("ada")
    assert ada is not None and len(ada.judgments) == 2
    people.put("ada", consent=False)  # takes back what they agreed to
    ada = people.get("ada")
    assert ada is not None and ada.judgments == [] and people.vector("ada", "f") is None
    people.close()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"zoe" not in content and "Zoë".encode() not in content and b"ada" in content


def test_a_person_has_at_most_so_many_judgments(people: People) -> None:
    for name in ("zoe", "ada"):
        people.put(name, consent=True)
    first, *_ = people.add("zoe", [SEA] * 4)
    before = revision(people, "zoe")
    with pytest.raises(TooMany):
        people.add("zoe", [SEA, SEA])  # all or none
    known = people.get("zoe")
    assert known is not None and len(known.judgments) == 4 and known.revision == before
    people.add("zoe", [SEA])
    people.add("ada", [SEA])  # the others' do not count
    with pytest.raises(TooMany):
        people.add("zoe", [SEA])
    assert people.remove("zoe", first)
    people.add("zoe", [SEA])


def test_that_a_train_user_was_deleted_is_remembered_without_the_name(
    people: People, tmp_path: Path
) -> None:
    people.put("zoe", consent=True)
    assert people.delete("zoe") is not None and not people.is_forgotten("zoe")
    for _ in range(2):
        assert people.delete("zoe", trained=True) is None and people.is_forgotten("zoe")
    assert not people.is_forgotten("ada")
    people.close()
    assert not any(b"zoe" in path.read_bytes() for path in tmp_path.iterdir())


def test_many_write_at_once(people: People) -> None:
    names = [f"p{n}" for n in range(6)]
    for name in names:
        people.put(name, consent=True)
    before = [revision(people, name) for name in names]

    def write(name: str) -> None:
        for _ in range(5):
            people.add(name, [SEA])

    threads = [threading.Thread(target=write, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [people.get(name) for name in names]
    assert [revision(people, name) for name in names] == [5 + one for one in before]
    ids = [judgment.id for one in found if one is not None for judgment in one.judgments]
    assert len(set(ids)) == 30


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/people.db", "nothing", "postgresql://u:secret@h/d"):
        with pytest.raises(ValueError, match=r"^database=.* is not allowed: expected") as caught:
            People(url, max_judgments=5)
        assert "secret" not in str(caught.value)


def test_readers_do_not_wait_for_a_writer(people: People) -> None:
    people.put("zoe", consent=True)
    assert people.save_vector("zoe", "f", revision(people, "zoe"), b"1234")
    with people._transaction() as session:
        session.execute(sql.update(Person).values(consent=False))
        known = people.get("zoe")  # as before; it would wait for 30 seconds
        assert known is not None and known.consent and people.vector("zoe", "f") == b"1234"
