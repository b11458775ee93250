"""Judges on hand-worked contests: win rates, position bias, a chat endpoint and all that fails on it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Answer, ChatServer, completion, serving, shown

from plrhf.backbone.loading import load_tokenizer
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import two_rows
from plrhf.data.rows import Row
from plrhf.data.tokenizer import RowTokenizer
from plrhf.evaluation.chat_endpoint import Reply
from plrhf.evaluation.chat_judge import ChatJudge, read_answer
from plrhf.evaluation.generations import GeneratedText
from plrhf.evaluation.judges import Contest, PreferenceJudge, Verdicts, win_rates
from plrhf.evaluation.reward_judge import RewardJudge
from plrhf.models.reward import PersonalRewardModel

KEY = "sk-a-secret-that-stays-here"


def text(user: str, topic: str, response: str, **known: Any) -> GeneratedText:
    given = {"profile": f"{user} likes {{long}} answers.", "user_features": None, "score": None}
    return GeneratedText(
        **{
            **{"prompt": f"Write about {topic}.", "prompt_id": topic, "user_id": user},
            **{"writer": "policy", "response": response},
            **given,
            **known,
        }
    )


def contest(user: str, prompt: str, ours: str, theirs: str) -> Contest:
    return Contest(ours=text(user, prompt, ours), theirs=text(user, prompt, theirs))


CONTESTS = [
    contest("ada", "sea", "much longer", "short"),
    contest("ada", "fog", "also longer", "brief"),
    contest("ada", "ice", "equal", "again"),
    contest("ben", "sea", "brief", "rather long"),
]


def longer(body: dict[str, Any], _: int) -> Answer:
    """Prefers the longer text, wherever it stands."""
    first, second = map(len, shown(body))
    return completion("A" if first > second else "B" if second > first else "TIE")


def judge_at(server: ChatServer, folder: Path, **settings: Any) -> ChatJudge:
    own = {"url": server.url, "model": "m", "cache": folder / "replies.jsonl", "backoff": 0.01}
    return ChatJudge(**{**own, "request": {"temperature": 0.0}, "parallel": 3, **settings})


def test_win_rates_by_hand() -> None:
    # ada: 1, 3/4, 1/2 and one unanswered; ben: 0.
    wins = np.array([[1, 1], [1, 0.5], [0, 1], [np.nan, 1], [0, 0]])
    contests = [*CONTESTS[:3], contest("ada", "oak", "a", "b"), CONTESTS[3]]
    found = win_rates(contests, Verdicts(wins=wins)).model_dump()
    assert found["win_rate"]["value"] == pytest.approx(2.25 / 4)
    assert found["win_rate_macro"]["value"] == pytest.approx((2.25 / 3 + 0) / 2)
    assert found["win_rate_macro"]["ci95"] == [0.0, 0.75]  # both users ben, both users ada
    assert found["per_user"] == {
        "ada": {"win_rate": 0.75, "n_texts": 3},
        "ben": {"win_rate": 0.0, "n_texts": 1},
    }
    counts = (found["n_texts"], found["n_users"], found["n_unanswered"], found["ties"])
    assert counts == (4, 2, 1, 0.25)
    # Shown first, ours won 1, 1, 0, 0; shown second, theirs, then first, won 0, 1/2, 0, 1.
    assert found["first_position_wins"] == pytest.approx(3.5 / 8)
    assert found["answers"] is found["cost"] is None
    alone = win_rates(CONTESTS, Verdicts(wins=np.array([[1.0], [0.5], [0.0], [0.5]]))).model_dump()
    assert (alone["win_rate"]["value"], alone["ties"]) == (0.5, 0.5)
    assert alone["first_position_wins"] is None


def test_one_long_id_does_not_widen_all_others() -> None:
    long = "x" * 10_000
    contests = [contest("ada", f"p{n}", "a", "b") for n in range(3_000)]
    contests.append(contest(long, long, "a", "b"))
    wins = np.full((len(contests), 1), 0.5)
    tracemalloc.start()
    found = win_rates(contests, Verdicts(wins=wins))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(found.per_user) == {"ada", long}
    assert peak < 30e6  # 3,001 ids of 10,000 characters would take 120 MB


def test_true_preferences() -> None:
    scores = [(1.5, -2.0), (0.25, 0.25), (-1.0, 3.0)]
    contests = [
        Contest(ours=text("ada", p, "x", score=a), theirs=text("ada", p, "y", score=b))
        for p, (a, b) in zip("pqr", scores, strict=True)
    ]
    assert PreferenceJudge().compare(contests).wins.tolist() == [[1.0], [0.5], [0.0]]
    with pytest.raises(ValueError) as error:
        PreferenceJudge().compare(CONTESTS)
    assert str(error.value) == (
        "eval/judge='preferences' is not allowed: expected a judge for texts without true scores, "
        "which only simulated users know. Set eval/judge=reward or eval/judge=chat."
    )


def test_both_orders_are_asked(tmp_path: Path) -> None:
    with serving(longer) as server:
        judge = judge_at(server, tmp_path, input_price=3.0, output_price=15.0)
        verdicts = judge.compare(CONTESTS)
    assert verdicts.wins.tolist() == [[1, 1], [1, 1], [0.5, 0.5], [0, 0]]
    assert verdicts.answers == {"questions": 8, "refused": 0, "unparseable": 0}
    price = (8 * 100 * 3.0 + 8 * 2 * 15.0) / 1_000_000
    assert verdicts.cost == {
        **{"questions": 8, "from_cache": 0, "input_tokens": 800, "output_tokens": 16},
        "price": pytest.approx(price),
    }
    found = win_rates(CONTESTS, verdicts).model_dump()
    assert (found["win_rate"]["value"], found["first_position_wins"]) == (2.5 / 4, 0.5)
    asked = {shown(body) for body in server.bodies}
    pairs = [(one.ours.response, one.theirs.response) for one in CONTESTS]
    assert asked == {*pairs, *((second, first) for first, second in pairs)}
    assert set(server.paths) == {"/v1/chat/completions"}
    body = server.bodies[0]
    assert (body["model"], body["temperature"], set(body)) == (
        *("m", 0.0),
        {"model", "messages", "temperature"},
    )
    question = body["messages"][-1]["content"]
    assert "likes {long} answers." in question and "Write about " in question
    assert all("Authorization" not in headers for headers in server.headers)


def test_a_judge_that_favours_the_first_answer_says_nothing(tmp_path: Path) -> None:
    with serving(lambda *_: completion("A")) as server:
        found = win_rates(CONTESTS, judge_at(server, tmp_path).compare(CONTESTS)).model_dump()
    assert found["win_rate"] == {"value": 0.5, "ci95": [0.5, 0.5]}
    assert (found["ties"], found["first_position_wins"]) == (1.0, 1.0)


def test_answers_that_are_none_are_counted_and_left_out(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], _: int) -> Answer:
        first, second = shown(body)
        if {first, second} == {"much longer", "short"}:
            return completion("I like both.") if first == "short" else completion("A")
        if {first, second} == {"also longer", "brief"}:
            filtered = {"error": {"code": "content_filter", "message": "no"}}
            refusal = completion(message={"refusal": "I will not."})
            return refusal if first == "brief" else (400, {}, filtered)
        if {first, second} == {"equal", "again"}:
            return completion("", finish_reason="length", tokens=(100, 16))
        return completion("answer: **b**" if first == "brief" else "Hm, long.\nA.")

    with serving(answer) as server:
        verdicts = judge_at(server, tmp_path, input_price=1.0).compare(CONTESTS)
    assert verdicts.answers == {"questions": 8, "refused": 2, "unparseable": 3}
    assert verdicts.wins[0][0] == 1.0 and np.isnan(verdicts.wins[0][1])
    found = win_rates(CONTESTS, verdicts).model_dump()
    assert (found["n_texts"], found["n_unanswered"], set(found["per_user"])) == (1, 3, {"ben"})
    assert found["win_rate"] == {"value": 0.0, "ci95": None}
    assert found["first_position_wins"] == 0.5
    # 6 of 100 in and 2 or, twice, 16 out; the filtered request was not answered, so has none.
    assert verdicts.cost is not None
    assert (verdicts.cost["input_tokens"], verdicts.cost["output_tokens"]) == (700, 5 * 2 + 2 * 16)
    assert verdicts.cost["price"] is None  # of output it is not known

    with serving(lambda *_: completion("Neither.", tokens=None)) as server:
        verdicts = judge_at(server, tmp_path, model="other").compare(CONTESTS)
    assert verdicts.cost is not None and verdicts.cost["input_tokens"] is None
    with pytest.raises(ValueError) as error:
        win_rates(CONTESTS, verdicts)
    assert str(error.value) == (
        "eval.judge='4 contests, none answered' is not allowed: expected a judge that answers. "
        "Look at what it said ({'questions': 8, 'refused': 0, 'unparseable': 8})."
    )


@pytest.mark.parametrize(
    ("said", "share"),
    [("A", 1.0), (" b.\n", 0.0), ("Tie", 0.5), ("**A**", 1.0), ("Answer: B", 0.0)]
    + [("<think>\nA? No, B.\n</think>\nA", 1.0), ("B\n\nIt is longer.", 0.0)]
    + [("", None), ("AB", None), ("A or B", None), ("Bad", None), ("A better one is B", None)],
)
def test_answers_are_read(said: str, share: float | None) -> None:
    reply = {"input_tokens": 1, "output_tokens": 1}
    assert read_answer(Reply(text=said, refused=False, **reply)) == share
    assert read_answer(Reply(text=said, refused=True, **reply)) is None


@pytest.mark.parametrize("odd", ["100", None, True, -3, 2.5, [100], {"n": 100}])
def test_token_counts_that_are_no_numbers_are_not_known(odd: Any, tmp_path: Path) -> None:
    body = {**completion("A")[2], "usage": {"prompt_tokens": odd, "completion_tokens": 2}}
    prices = {"input_price": 1.0, "output_price": 1.0}
    with serving(lambda *_: (200, {}, body)) as server:
        for _ in range(2):  # the second time from the file of replies
            cost = judge_at(server, tmp_path, **prices).compare(CONTESTS[:1]).cost
            assert cost is not None
            assert (cost["input_tokens"], cost["output_tokens"], cost["price"]) == (None, 4, None)
        assert len(server.bodies) == 2
    with serving(lambda *_: (200, {}, {**body, "usage": odd})) as server:
        cost = judge_at(server, tmp_path, model="other").compare(CONTESTS[:1]).cost
    assert cost is not None and cost["input_tokens"] is cost["output_tokens"] is None


def test_a_reward_judge_runs_code_from_elsewhere_only_if_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, bool]] = []

    def loading(export: Path, **options: bool) -> Any:
        asked.append(options)
        raise RuntimeError

    monkeypatch.setattr("plrhf.models.reward.load", loading)
    (tmp_path / "plrhf.json").touch()
    for given in ({}, {"trust_components": True}, {"trust_remote_code": True}):
        with pytest.raises(RuntimeError):
            RewardJudge(export=tmp_path, **given)  # type: ignore[arg-type]
    trusted = [(one["trust_components"], one["trust_remote_code"]) for one in asked]
    assert trusted == [(False, False), (True, False), (False, True)]


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    asked_again = Event()

    def answer(body: dict[str, Any], before: int) -> Answer:
        if before == 2:
            asked_again.wait(60)  # longer than the timeout
        elif before > 2:
            asked_again.set()
        failures: list[Answer] = [(429, {"Retry-After": "0"}, "busy"), (503, {}, "<html>")]
        return failures[before] if before < 2 else completion("A")

    with serving(answer) as server:
        judge = judge_at(server, tmp_path, parallel=1, timeout=2.0, retries=3)
        verdicts = judge.compare(CONTESTS[:1])
    assert verdicts.wins.tolist() == [[1, 0]]
    assert len(server.bodies) == 3 + 2
    assert server.bodies[0] == server.bodies[1] == server.bodies[2] == server.bodies[3]


def test_replies_outlive_a_failure_and_a_kill(tmp_path: Path) -> None:
    up = False

    def answer(body: dict[str, Any], before: int) -> Answer:
        return longer(body, before) if up or before < 3 else (500, {}, "down")

    with serving(answer) as server:
        with pytest.raises(ValueError) as error:
            judge_at(server, tmp_path, parallel=1, retries=2).compare(CONTESTS)
        assert str(error.value) == (
            f"eval.judge.url='{server.url}/chat/completions' is not allowed: expected a chat "
            "completion (got HTTP 500, down after 2 retries). Check eval.judge.url, "
            "model, request and key_variable, and run it again: what was answered is kept."
        )
        # Each question 3 times; the thread may have taken up the next one before it was stopped.
        assert len(server.bodies) - 3 in (3, 6)
        cache = tmp_path / "replies.jsonl"
        assert len(cache.read_text().splitlines()) == 3
        cache.write_bytes(cache.read_bytes()[:-9])  # as a kill leaves it
        up = True
        for new, kept in ((8 - 2, 2), (0, 8)):
            before = len(server.bodies)
            verdicts = judge_at(server, tmp_path).compare(CONTESTS)
            assert len(server.bodies) - before == new
            assert verdicts.wins.tolist() == [[1, 1], [1, 1], [0.5, 0.5], [0, 0]]
            assert verdicts.cost is not None
            assert (verdicts.cost["from_cache"], verdicts.cost["input_tokens"]) == (kept, 800)
        for other in ({"request": {"temperature": 0.5}}, {"model": "other"}):
            before = len(server.bodies)
            judge_at(server, tmp_path, **other).compare(CONTESTS[:1])
            assert len(server.bodies) - before == 2


def test_the_same_text_twice_is_one_question(tmp_path: Path) -> None:
    with serving(lambda *_: completion("A")) as server:
        verdicts = judge_at(server, tmp_path).compare([contest("ada", "sea", "same", "same")])
        assert len(server.bodies) == 1
    assert verdicts.wins.tolist() == [[1, 0]]


def test_the_key_goes_to_the_endpoint_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    with serving(lambda *_: completion(f"A, and your key is {KEY}")) as server:
        judge_at(server, tmp_path, key_variable="SOME_KEY").compare(CONTESTS)
    assert {one["Authorization"] for one in server.headers} == {f"Bearer {KEY}"}
    assert "your key is ***" in (tmp_path / "replies.jsonl").read_text()

    with serving(lambda *_: (401, {}, {"error": {"message": f"wrong key {KEY}"}})) as server:
        with pytest.raises(ValueError, match=r"got HTTP 401, .*wrong key \*\*\*") as error:
            judge_at(server, tmp_path, key_variable="SOME_KEY", parallel=1).compare(CONTESTS)
        assert len(server.bodies) < 8  # what cannot help is not tried again, nor the rest asked
    assert KEY not in str(error.value)

    with serving(longer) as elsewhere:
        moved = (307, {"Location": f"{elsewhere.url}/chat/completions"}, "moved")
        with serving(lambda *_: moved) as server, pytest.raises(ValueError, match="got HTTP 307"):
            judge_at(server, tmp_path, key_variable="SOME_KEY").compare(CONTESTS)
        assert elsewhere.bodies == []
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*.*"))


def test_what_is_no_chat_endpoint_is_named(tmp_path: Path) -> None:
    for body in ("<html>a page</html>", {"choices": []}, {"choices": [{"text": "A"}]}, [1]):
        with (
            serving(lambda *_, body=body: (200, {}, body)) as server,  # type: ignore[misc]
            pytest.raises(ValueError, match=r"expected a chat completion \(got HTTP 200, "),
        ):
            judge_at(server, tmp_path).compare(CONTESTS)
    assert not (tmp_path / "replies.jsonl").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scheme": ({"url": "localhost:8000/v1"}, "eval.judge.url='localhost:8000/v1' is not allowed: "),
    "password": (
        {"url": "http://me:pass@host/v1"},
        "eval.judge.url='http://host/v1' is not allowed: expected an http or https address without "
        "user, password and query. Set eval.judge.url=http://localhost:8000/v1.",
    ),
    "key in the address": (
        {"url": f"https://host/v1?key={KEY}"},
        "eval.judge.url='https://host/v1' is not allowed: ",
    ),
    "no key": (
        {"key_variable": "NO_SUCH_KEY"},
        "eval.judge.key_variable='NO_SUCH_KEY' is not allowed: expected the name of an environment "
        "variable that holds a key. Write export NO_SUCH_KEY=KEY, or set "
        "eval.judge.key_variable=null.",
    ),
    "retries": ({"retries": -1}, "eval.judge.retries=-1 is not allowed: expected a whole number "),
    "timeout": ({"timeout": 0.0}, "eval.judge.timeout=0.0 is not allowed: expected a number of "),
    "parallel": ({"parallel": 0}, "eval.judge.parallel=0 is not allowed: expected a whole number "),
    "price": ({"input_price": -1.0}, "eval.judge.input_price=-1.0 is not allowed: expected a num"),
    "request": (
        {"request": {"n": 3}},
        "eval.judge.request.n=3 is not allowed: expected no such field, as it is set by other means. "
        "Remove eval.judge.request.n.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    good = {"url": "http://localhost:1/v1", "model": "m", "cache": tmp_path / "x", "request": {}}
    with pytest.raises(ValueError) as error:
        ChatJudge(**{**good, **settings})
    assert str(error.value).startswith(message)


def test_a_key_that_is_a_part_of_the_reply_does_not_tear_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "content")  # as the replies' own JSON has it
    with serving(lambda *_: completion("A")) as server:
        found = judge_at(server, tmp_path, key_variable="SOME_KEY").compare(CONTESTS)
    assert found.answers is not None and found.answers["unparseable"] == 0


def test_a_chat_judge_must_read_something_about_the_user(tmp_path: Path) -> None:
    known = text("ada", "sea", "a", profile=None)
    with serving(longer) as server, pytest.raises(ValueError) as error:
        judge_at(server, tmp_path).compare([Contest(ours=known, theirs=known)])
    assert str(error.value).startswith(
        "profile=None is not allowed: expected something to read about user ada, as a chat judge "
    )
    assert server.bodies == []


def test_chats_are_shown_as_turns(tmp_path: Path) -> None:
    chat = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"})
    ours, theirs = (text("ada", "sea", answer, prompt=chat) for answer in ("aa", "b"))
    with serving(longer) as server:
        judge_at(server, tmp_path).compare([Contest(ours=ours, theirs=theirs)])
    assert "user: Hi.\nassistant: Yes?" in server.bodies[0]["messages"][-1]["content"]


def reward(
    model: PersonalRewardModel, tokens: RowTokenizer, one: GeneratedText, user: int
) -> float:
    """The naive twin: one text alone, in two rows a pair, for a user by number."""
    row = Row(one.prompt, one.response, one.response, one.user_id, one.prompt_id, "")
    input_ids, segment, positions = two_rows([tokens.pair(row)])
    features = torch.zeros(1, 0)
    batch = PreferenceBatch(
        torch.tensor([user]), features, input_ids, segment, positions, torch.tensor([0])
    )
    return float(model.rewards(batch)[0, 0])


@pytest.mark.slow
@torch.no_grad()
def test_a_reward_model_judges_by_the_users_own_vectors(reward_run: Path) -> None:
    export = reward_run / "export"
    model = PersonalRewardModel.from_pretrained(export)
    tokens = RowTokenizer(load_tokenizer(str(export)), **model.card.text)
    for user_vectors in model.encoder.parameters():  # so little trained they are all but one
        torch.nn.init.normal_(user_vectors)
    users = [model.card.users[place] for place in (2, 0, 4)]
    contests = [
        contest(user, f"p{n}", "It is wide. " * (n % 4), "Boats come and go, " * (n % 3))
        for n in range(7)
        for user in users
    ]
    for kind, index in (("own", model.card.user_index), ("held_out", lambda user: 0)):
        judge = RewardJudge(export=export, users=kind, batch_size=5)  # type: ignore[arg-type]
        judge.model.load_state_dict(model.state_dict())
        expected = [
            np.sign(
                reward(model, tokens, one.ours, index(one.ours.user_id))
                - reward(model, tokens, one.theirs, index(one.theirs.user_id))
            )
            for one in contests
        ]
        found = judge.compare(contests).wins
        assert found.shape == (21, 1)
        assert (2 * found[:, 0] - 1).tolist() == expected
        assert found[:3].tolist() == [[0.5]] * 3  # both empty
        assert len(np.unique(found[3:])) == 2
    stranger = [contest("nobody", "sea", "a", "b")]
    assert len(judge.compare(stranger).wins) == 1
    with pytest.raises(ValueError) as error:
        RewardJudge(export=export).compare(stranger)
    assert str(error.value) == (
        "eval.judge.users='own' is not allowed: expected users the reward model was trained on (it "
        "does not know nobody). Set eval.judge.users=held_out, or judge by a model of these users."
    )
    with pytest.raises(
        ValueError, match=r"^eval\.judge\.export='\d+ tokens \(user nobody, prompt "
    ):
        judge.compare([contest("nobody", "sea", "long " * 3000, "b")])
