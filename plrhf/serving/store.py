"""The store of people: their consent, their judgments, and the vectors fitted to them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sql
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash

Verdict = Literal["prefer", "tie", "skip"]
"""The first response is better, both are equally good, or the person did not want to say."""

MOST_ID = 200  # characters
READS = "plrhf_reads"
"""Option of a connection whose transactions only read."""


class Base(DeclarativeBase):
    """The tables."""


class Person(Base):
    """A person.

    `revision` grows with each change of the person's judgments. It begins anywhere, so that what belongs to
    a person who was deleted never fits the next one of that name.
    """

    __tablename__ = "people"
    id: Mapped[str] = mapped_column(sql.String(MOST_ID), primary_key=True)
    consent: Mapped[bool]
    revision: Mapped[int] = mapped_column(sql.BigInteger, default=lambda: secrets.randbits(48))
    created: Mapped[datetime]


class JudgmentRow(Base):
    """A judgment of a person; ids are never used again."""

    __tablename__ = "judgments"
    __table_args__ = {"sqlite_autoincrement": True}
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(
        sql.ForeignKey("people.id", ondelete="CASCADE"), index=True
    )
    prompt: Mapped[Any] = mapped_column(sql.JSON)
    chosen: Mapped[str] = mapped_column(sql.Text)
    rejected: Mapped[str] = mapped_column(sql.Text)
    verdict: Mapped[str] = mapped_column(sql.String(10))
    created: Mapped[datetime]


class VectorRow(Base):
    """A vector fitted to a person's judgments at a revision, for one model."""

    __tablename__ = "vectors"
    user_id: Mapped[str] = mapped_column(
        sql.ForeignKey("people.id", ondelete="CASCADE"), primary_key=True
    )
    fingerprint: Mapped[str] = mapped_column(sql.String(64), primary_key=True)
    revision: Mapped[int] = mapped_column(sql.BigInteger)
    vector: Mapped[bytes]  # float32, little-endian


class Forgotten(Base):
    """A train user who was deleted, by a hash of the id: other servers have loaded the vector, too."""

    __tablename__ = "forgotten"
    hashed_id: Mapped[str] = mapped_column(sql.String(16), primary_key=True)


PRESENT_VECTOR = (
    sql.select(VectorRow.vector)
    .join(Person, (VectorRow.user_id == Person.id) & (VectorRow.revision == Person.revision))
    .where(Person.id == sql.bindparam("user_id"))
    .where(VectorRow.fingerprint == sql.bindparam("fingerprint"))
)
"""The vector of a person's present judgments; each answer asks for one."""


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What a person said about two responses to a prompt.

    Attributes:
        prompt: text, or messages with role and content. id: in the store; None: not stored yet.
    """

    prompt: Any
    chosen: str
    rejected: str
    verdict: Verdict = "prefer"
    id: int | None = None

    def pair(self) -> dict[str, Any]:
        """Return the judgment as a row of preference data."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class Known:
    """What the store knows about a person."""

    consent: bool
    revision: int
    judgments: list[Judgment]

    def pairs(self) -> list[dict[str, Any]]:
        """Return the judgments that prefer one response, which a person is fitted to."""
        return [one.pair() for one in self.judgments if one.verdict == "prefer"]


class NoConsent(Exception):
    """The person is not in the store, or has not agreed that judgments are kept."""


class TooMany(Exception):
    """The person has as many judgments as are kept."""


class People:
    """The people of a server in a database. Each method is one transaction.

    Args:
        url: of SQLAlchemy, e.g. ``sqlite:///people.db`` or ``postgresql+psycopg://HOST/NAME``.
        max_judgments: most judgments of a person.

    Raises:
        ValueError: the database cannot be opened.
    """

    def __init__(self, url: str, *, max_judgments: int) -> None:
        self.max_judgments = max_judgments
        try:
            self.engine = sql.create_engine(url)
            self._transaction = sessionmaker(self.engine).begin
            self._readers = self.engine.execution_options(**{READS: True})
            self._reading = sessionmaker(self._readers).begin
            if self.engine.dialect.name == "sqlite":
                sql.event.listen(self.engine, "connect", _set_up_sqlite)
                sql.event.listen(self.engine, "begin", _begin)
            Base.metadata.create_all(self.engine)
        except (SQLAlchemyError, ImportError) as error:
            raise bad_value(
                "database",
                _without_password(url),
                f"the URL of a database that can be opened ({type(error).__name__})",
                "Set database=sqlite:///people.db",
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def put(self, user_id: str, *, consent: bool) -> None:
        """Add a person, or change their consent. Without consent all judgments and vectors are removed."""
        with self._transaction() as session:
            person = session.get(Person, user_id)
            if person is None:
                session.add(Person(id=user_id, consent=consent, created=_now()))
                return
            person.consent = consent
            if not consent:
                person.revision += 1
                for table in (JudgmentRow, VectorRow):
                    session.execute(sql.delete(table).where(table.user_id == user_id))

    def get(self, user_id: str) -> Known | None:
        """Return what is known about a person; None if nothing."""
        with self._reading() as session:
            person = session.get(Person, user_id)
            if person is None:
                return None
            query = sql.select(JudgmentRow).where(JudgmentRow.user_id == user_id)
            rows = session.scalars(query.order_by(JudgmentRow.id))
            return Known(person.consent, person.revision, [_judgment(row) for row in rows])

    def add(self, user_id: str, judgments: Sequence[Judgment]) -> list[int]:
        """Store judgments of a person, all or none; return their ids.

        Raises:
            NoConsent: the person is unknown or has not agreed. TooMany: there would be too many.
        """
        with self._transaction() as session:
            self._changing(session, user_id)
            count = sql.select(sql.func.count()).where(JudgmentRow.user_id == user_id)
            if (session.scalar(count) or 0) + len(judgments) > self.max_judgments:
                raise TooMany
            rows = [
                JudgmentRow(**one.pair(), user_id=user_id, verdict=one.verdict, created=_now())
                for one in judgments
            ]
            session.add_all(rows)
            session.flush()
            return [row.id for row in rows]

    def remove(self, user_id: str, judgment_id: int) -> bool:
        """Remove one judgment of a person; return whether there was one.

        Raises:
            NoConsent: the person is unknown or has not agreed.
        """
        with self._transaction() as session:
            row = session.get(JudgmentRow, judgment_id)
            if row is None or row.user_id != user_id:
                return False
            self._changing(session, user_id)
            session.delete(row)
            return True

    def delete(self, user_id: str, *, trained: bool = False) -> dict[str, int] | None:
        """Remove a person with all judgments and vectors; return how many there were, None if unknown.

        Args:
            trained: whether models have a vector from training, which `is_forgotten` then denies.
        """
        with self._transaction() as session:
            if trained:
                session.merge(Forgotten(hashed_id=content_hash(user_id)))
            person = session.get(Person, user_id)
            if person is None:
                return None
            removed = {}
            for name, table in (("judgments", JudgmentRow), ("vectors", VectorRow)):
                found = session.execute(sql.delete(table).where(table.user_id == user_id))
                removed[name] = int(found.rowcount)  # type: ignore[attr-defined]
            session.delete(person)
            return removed

    def vector(self, user_id: str, fingerprint: str) -> bytes | None:
        """Return the vector fitted to all present judgments of a person for a model, if there is one."""
        asked = {"user_id": user_id, "fingerprint": fingerprint}
        with self._readers.connect() as connection:
            return connection.scalar(PRESENT_VECTOR, asked)

    def is_forgotten(self, user_id: str) -> bool:
        """Whether a train user was deleted, by whichever server."""
        with self._reading() as session:
            return session.get(Forgotten, content_hash(user_id)) is not None

    def revisions(self, user_ids: Iterable[str]) -> dict[str, int]:
        """Return the revisions of those of these people that are in the store."""
        query = sql.select(Person.id, Person.revision).where(Person.id.in_([*user_ids]))
        with self._reading() as session:
            return {row.id: row.revision for row in session.execute(query)}

    def save_vector(self, user_id: str, fingerprint: str, revision: int, vector: bytes) -> bool:
        """Store a fitted vector, unless the person is gone or has judged anew; return whether stored.

        Vectors of other models are kept, as several servers may share the database.
        """
        with self._transaction() as session:
            person = session.get(Person, user_id)
            if person is None or person.revision != revision:
                return False
            row = VectorRow(
                user_id=user_id, fingerprint=fingerprint, revision=revision, vector=vector
            )
            session.merge(row)
            return True

    def _changing(self, session: Session, user_id: str) -> None:
        """Note that a person's judgments change.

        Raises:
            NoConsent: the person is unknown or has not agreed.
        """
        person = session.get(Person, user_id, with_for_update=True)
        if person is None or not person.consent:
            raise NoConsent
        person.revision += 1


def _without_password(url: str) -> str:
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url.partition("://")[0]


def _judgment(row: JudgmentRow) -> Judgment:
    verdict: Any = row.verdict
    return Judgment(
        prompt=row.prompt, chosen=row.chosen, rejected=row.rejected, verdict=verdict, id=row.id
    )


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


def _set_up_sqlite(connection: Any, _: object) -> None:
    """Let SQLite check foreign keys, overwrite what is deleted, and wait for other writers."""
    connection.isolation_level = None  # SQLAlchemy begins transactions, see below
    for pragma in ("foreign_keys=ON", "secure_delete=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sql.Connection) -> None:
    """Take SQLite's write lock at once, as two readers that then write would block each other.

    A transaction that only reads takes none: who waits for a lock looks again after up to 0.1 seconds.
    """
    reads = connection.get_execution_options().get(READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
