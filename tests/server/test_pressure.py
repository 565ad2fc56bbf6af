# SPDX-License-Identifier: Apache-2.0
"""When a server is under pressure: the load, its marks over simulated time, and who is asked."""

from __future__ import annotations

import contextlib
import json
import random
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from ficoco_server import cli, resolve
from ficoco_server.load import watch
from ficoco_server.policy import Marks, Policy, PolicyError
from ficoco_server.pressure import Engine, Pressure, load
from ficoco_server.protocol import ChatRequest, take_settings
from ficoco_server.reducer import Reducer
from ficoco_server.resolve import Level
from ficoco_server.serving import ReductionRenderer
from tests.server import conftest
from tests.server.conftest import MODEL, TOKENS, Server, eventually, input_image, turn, user, value
from vllm_ficoco.settings import AutoBudget, Lowered, SettingsError
from vllm_ficoco.vision.geometry import Geometry

MARKS = Marks(0.85, 0.7)


# --- The load -------------------------------------------------------------------------------


def test_the_load_is_what_all_requests_ask_for() -> None:
    # Four run in 60 % of the cache; two more like them want 30 %, four more 60 %.
    assert load([Engine(0.6, 4)], 100, 4) == pytest.approx(0.6)
    assert load([Engine(0.6, 4)], 100, 6) == pytest.approx(0.9)
    assert load([Engine(0.6, 4)], 100, 6, entering=2) == pytest.approx(1.2)
    # A cache with much room: what is short are places.
    assert load([Engine(0.01, 8)], 8, 8) == 1.0
    assert load([Engine(0.01, 8)], 8, 20) == 2.5
    # Two engines: their average, and the requests of both.
    assert load([Engine(0.9, 3), Engine(0.1, 1)], 200, 6) == pytest.approx(0.75)


def test_what_an_idle_engine_told_last_is_old() -> None:
    full = [Engine(0.99, 50)]
    assert load(full, 100, 0) == 0.0
    assert load(full, 100, 0, entering=1) == 0.01, "the first to come is asked for nothing"
    # Their clients left, all but one: the engine has not made a step since.
    assert load(full, 100, 1) < 0.02
    # It has not made its first step yet.
    assert load([Engine()], 100, 5) == 0.05


# --- Hysteresis -----------------------------------------------------------------------------


def over_time(marks: Marks, loads: list[float]) -> list[bool]:
    """Whether pressure is on, look by look."""
    values = iter(loads)
    pressure = Pressure(marks, lambda entering: next(values))
    return [pressure.look() for _ in loads]


def test_it_begins_at_one_mark_and_ends_below_the_other() -> None:
    loads = [0.0, 0.7, 0.84, 0.85, 0.84, 0.7, 0.69, 0.84, 0.7, 3.0, 0.0]
    on = [False, False, False, True, True, True, False, False, False, True, False]
    assert over_time(MARKS, loads) == on


def test_a_load_about_one_mark_does_not_flap() -> None:
    lot = random.Random(1)
    about_high = [0.85 + lot.uniform(-0.1, 0.1) for _ in range(1000)]
    about_low = [1.0] + [0.7 + lot.uniform(-0.1, 0.1) for _ in range(1000)]

    def turns(said: list[bool]) -> int:
        return sum(a != b for a, b in pairwise(said))

    assert turns(over_time(MARKS, about_high)) == 1
    assert turns(over_time(MARKS, about_low)) == 1
    assert turns(over_time(Marks(0.85, 0.85), about_high)) > 300, "with one mark it would"


class Clockwork:
    """A server in simulated seconds: requests come by a clock, wait for room, and hold it a while.

    Its engine tells its figures with its steps, ten a second, and makes none while it has nothing
    to do; requests whose clients leave are forgotten without one.
    """

    ROOM, WHOLE, LOWERED, SECONDS, STEP = 100, 10, 5, 2.0, 0.1

    def __init__(self, marks: Marks) -> None:
        self.now = 0.0
        self.waiting: deque[int] = deque()
        self.running: list[tuple[float, int]] = []
        self.engine = Engine()
        self.pressure = Pressure(marks, self._measure)
        self.looks: list[tuple[float, bool]] = []
        self.sizes: list[tuple[float, int]] = []

    def _measure(self, entering: int) -> float:
        return load([self.engine], 50, len(self.waiting) + len(self.running), entering)

    def _look(self) -> bool:
        on = self.pressure.look()
        self.looks.append((self.now, on))
        return on

    def arrive(self) -> None:
        size = self.LOWERED if self._look() else self.WHOLE
        self.sizes.append((self.now, size))
        self.waiting.append(size)

    def leave(self) -> None:
        """All clients at once."""
        self.waiting.clear()
        self.running.clear()

    def step(self) -> None:
        if not self.waiting and not self.running:
            return
        self.running = [(end, size) for end, size in self.running if end > self.now]
        held = sum(size for _, size in self.running)
        while self.waiting and held + self.waiting[0] <= self.ROOM:
            held += self.waiting[0]
            self.running.append((self.now + self.SECONDS, self.waiting.popleft()))
        self.engine = Engine(held / self.ROOM, len(self.running))
        self._look()

    def run(self, seconds: float, rate: float) -> None:
        """Requests at a rate, evenly."""
        end, due = self.now + seconds, 0.0
        while self.now < end - 1e-9:
            due += rate * self.STEP
            for _ in range(int(due)):
                self.arrive()
            due -= int(due)
            self.now += self.STEP
            self.step()

    def turns(self) -> int:
        said = [on for _, on in self.looks]
        return sum(a != b for a, b in pairwise(said))


def test_a_burst_passes_over_a_simulated_server() -> None:
    """Five requests a second are what whole images allow; a burst brings twice as many."""
    server = Clockwork(MARKS)
    server.run(20, 3)
    assert server.turns() == 0 and {size for _, size in server.sizes} == {server.WHOLE}
    server.run(10, 10)
    burst = [size for at, size in server.sizes if at >= 20]
    assert server.pressure.on and burst.count(server.LOWERED) > 0.8 * len(burst)
    assert burst[0] == server.WHOLE, "nobody knows of a burst before it is there"
    server.run(30, 3)
    assert not server.pressure.on
    assert {size for at, size in server.sizes if at > 50} == {server.WHOLE}
    assert server.turns() == 2, "on once and off once"


def test_clients_that_leave_take_the_pressure_with_them() -> None:
    server = Clockwork(MARKS)
    server.run(5, 20)
    assert server.pressure.on and server.engine.kv_cache_usage > 0.85
    server.leave()  # the engine says no more
    server.now += 3600
    assert not server.pressure.look()
    server.arrive()
    assert server.sizes[-1][1] == server.WHOLE


def test_many_that_come_at_once_see_each_other() -> None:
    """Before an engine has heard of the first one."""
    pressure = Pressure(MARKS, lambda entering: load([Engine()], 10, 0, entering))
    with contextlib.ExitStack() as coming:
        said = []
        for _ in range(12):
            coming.enter_context(pressure.entering())
            said.append(pressure.look())
    assert said == [False] * 8 + [True] * 4
    assert not pressure.look()


# --- Flags ----------------------------------------------------------------------------------


def read(text: str) -> Marks | None:
    return Policy.from_environment({"FICOCO_PRESSURE": text}).pressure


def test_marks() -> None:
    assert read("0.85:0.7") == (0.85, 0.7)
    assert read("0.5") == (0.5, pytest.approx(0.4))
    assert read("1:1") == (1.0, 1.0)
    assert read("") is read("none") is Policy().pressure is None
    assert not Pressure().look() and Pressure().describe() is None


@pytest.mark.parametrize(
    "text",
    ["0.85:0.9", "2", "x", "0", "-0.5", "0.85:", ":0.7", "0.8:0", "nan", "inf", "0.9:0.8:0.7"],
)
def test_marks_that_are_none_stop_the_start(text: str) -> None:
    with pytest.raises(PolicyError) as refused:
        read(text)
    for fragment in (repr(text), "--reduction-pressure", "FICOCO_PRESSURE", "as in 0.85:0.7"):
        assert fragment in str(refused.value)


# --- Whose budgets yield --------------------------------------------------------------------

TINY = Geometry((12, 12), 9, True)
LEVEL = Level()


def lowered(
    request: dict[str, Any], *images: Level, geometry: Geometry = TINY, **policy: Any
) -> list[Any]:
    """Method and budget of every image of 144 tokens under pressure; of an unreduced one, None."""
    level = Level(said=request)
    settled = resolve.settled(Policy(**policy), level, images, geometry, lower=True)
    calm = resolve.settled(Policy(**policy), level, images, geometry)
    found: list[Any] = []
    for image, before in zip(settled, calm, strict=True):
        assert (image.field, image.embeds) == (before.field, before.embeds)
        reduction = image.reduction
        if isinstance(reduction, Lowered):
            found.append((reduction.method, reduction.choices(144)[0]))
        elif isinstance(reduction, AutoBudget):
            found.append((reduction.method, f"auto, {reduction.lower} less"))
        else:
            assert reduction == before.reduction
            found.append(reduction and (reduction.method, reduction.budget))
    return found


def image(**said: Any) -> Level:
    return Level("messages[0].content[0]", said)


def test_a_budget_that_nobody_said_is_a_rung_less() -> None:
    """Of N, N / 3, 2 N / 9, N / 9: 144, 48, 32, 16."""
    for default, less in ((None, 48), (100, 48), (48, 32), (33, 32), (32, 16), (17, 16)):
        assert lowered({}, LEVEL, image(), default_budget=default) == [("score", less)] * 2
    for default in (16, 9):
        assert lowered({}, LEVEL, default_budget=default) == [("score", default)]
    ladder = {"auto_budgets": ("1", "1/2", "24")}
    assert lowered({}, LEVEL, **ladder) == [("score", 72)]
    assert lowered({}, LEVEL, default_budget=72, **ladder) == [("score", 24)]


def test_no_budget_is_below_the_smallest_of_the_policy() -> None:
    assert lowered({}, LEVEL, default_budget=32, min_budget=20) == [("score", 20)]
    assert lowered({}, LEVEL, default_budget=20, min_budget=20) == [("score", 20)]


def test_auto_is_a_rung_less_whoever_said_it() -> None:
    less = ("score", "auto, 1 less")
    assert lowered({}, LEVEL, default_budget="auto") == [less]
    assert lowered({"visual_token_budget": "auto"}, LEVEL) == [less]
    assert lowered({}, image(visual_token_budget="auto")) == [less]
    assert lowered({}, image(reduction={"budget": "auto", "method": "tome"})) == [
        ("tome", "auto, 1 less")
    ]


def test_what_was_said_stays() -> None:
    """A number, no reduction, a detail that says one; on the request or on the image."""
    none = {"method": "none"}
    for default in (None, 100, "auto"):
        policy = {"default_budget": default, "high_budget": 96}
        for said, is_due in (
            ({"visual_token_budget": 100}, ("score", 100)),
            ({"reduction": {"budget": 90, "method": "tome"}}, ("tome", 90)),
            ({"reduction": none}, None),
        ):
            assert lowered(said, LEVEL, image(detail="auto"), **policy) == [is_due] * 2
            assert lowered({}, image(**said), **policy) == [is_due]
        assert lowered({}, image(detail="low"), image(detail="high"), **policy) == [
            ("score", 16),
            ("score", 96),
        ]
    # An image without a number among some that have one; none on the request is no number.
    assert lowered({}, image(visual_token_budget=100), LEVEL) == [
        ("score", 100),
        ("score", 48),
    ]
    assert lowered({"visual_token_budget": 100}, image(reduction={"method": "tome"})) == [
        ("tome", 100)
    ]
    assert lowered({"reduction": none}, image(reduction={"method": "tome"}), default_budget=50) == [
        ("tome", 48)
    ]


def test_tokens_by_stage_stay() -> None:
    staged = TINY._replace(decoder_layers=6, starts=(2, 4))
    said = {"reduction": {"method": "k-norm", "options": {"tokens": [80, 40]}}}
    assert lowered(said, LEVEL, geometry=staged, default_budget=90) == [("k-norm", None)]


def test_a_method_without_a_budget_is_lowered_with_it() -> None:
    said = {"reduction": {"method": "tome"}}
    for request, one in ((said, LEVEL), ({}, image(**said))):
        assert lowered(request, one, default_budget=100) == [("tome", 48)]
        with pytest.raises(SettingsError, match="no default budget"):  # as ever
            lowered(request, one)


def test_what_cannot_be_reduced_or_found_again_stays() -> None:
    embeds, named = Level("a", embeds=True), Level("b", named=True)
    assert lowered({}, embeds, named, LEVEL, default_budget=100) == [
        None,
        ("score", 100),
        ("score", 48),
    ]
    assert lowered({}, LEVEL, geometry=Geometry.none("no images")) == [None]
    parts = [{"type": "image_url", "image_url": {"url": "a"}, "uuid": "b"}, {"type": "text"}]
    _, asked = take_settings({"messages": [{"role": "user", "content": parts}]}, "messages")
    assert [one.named for one in asked.images] == [True]


def test_a_model_that_cannot_reduce_does_not_start_under_pressure() -> None:
    with pytest.raises(PolicyError, match=r"--reduction-pressure.*no images"):
        Policy(pressure=MARKS).check_model(Geometry.none("no images"))


# --- What vLLM tells ------------------------------------------------------------------------


class Client:
    """Of vLLM's engine client, what is looked at."""

    def __init__(self, log_stats: bool = True, servers: int = 1, elastic: bool = False) -> None:
        self.requests = 0
        self.logger_manager: Any = None
        if log_stats:
            self.logger_manager = SimpleNamespace(engine_indexes=[0, 1], stat_loggers=[])
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(_api_process_count=servers, enable_elastic_ep=elastic),
            scheduler_config=SimpleNamespace(max_num_seqs=8),
        )
        self.output_processor = self

    def get_num_unfinished_requests(self) -> int:
        return self.requests

    def tell(self, engine: int, usage: float, running: int) -> None:
        told = SimpleNamespace(kv_cache_usage=usage, num_running_reqs=running, num_waiting_reqs=0)
        [logger] = self.logger_manager.stat_loggers
        logger.record(told, None, mm_cache_stats=None, engine_idx=engine)
        logger.record(None, None, mm_cache_stats=None, engine_idx=engine)


def test_two_engines_are_one_server() -> None:
    client = Client()
    pressure = watch(client, Policy(pressure=MARKS))
    client.requests = 4
    client.tell(0, 0.9, 2)
    assert pressure.load == pytest.approx(0.9) and pressure.on, "two have what four want"
    client.tell(1, 0.1, 2)
    assert pressure.load == pytest.approx(0.5) and not pressure.on
    client.requests = 24
    assert pressure.look() and pressure.load == pytest.approx(3.0)
    client.requests = 8
    client.tell(0, 0.0, 0)
    client.tell(1, 0.0, 0)
    assert pressure.load == pytest.approx(0.5), "of the 16 places of both"


def test_without_the_flag_vllm_is_left_alone() -> None:
    client = Client(log_stats=False, servers=4, elastic=True)
    assert not watch(client, Policy()).look()
    client = Client()
    watch(client, Policy())
    assert client.logger_manager.stat_loggers == []


@pytest.mark.parametrize(
    ("how", "flag"),
    [
        ({"log_stats": False}, "--disable-log-stats"),
        ({"servers": 2}, "--api-server-count"),
        ({"elastic": True}, "--enable-elastic-ep"),
    ],
)
def test_a_server_that_cannot_know_its_load_does_not_start(how: dict[str, Any], flag: str) -> None:
    with pytest.raises(PolicyError, match="--reduction-pressure") as refused:
        watch(Client(**how), Policy(pressure=MARKS))
    assert flag in str(refused.value)


# --- Over HTTP ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a KV cache of 79 blocks of 32 tokens, and low marks."""
    log = tmp_path_factory.mktemp("small") / "log"
    pool = ["--block-size=32", "--num-gpu-blocks-override=80", "--max-num-seqs=64"]
    flags = ["--reduction-pressure=0.4:0.2", "--reduction-default-budget=100"]
    command = ["ficoco_server.cli", "serve", MODEL, *pool, *flags]
    with conftest.running(command, log, VLLM_ENABLE_RESPONSES_API_STORE="1") as started:
        yield started


@contextlib.contextmanager
def crowded(server: Server) -> Iterator[None]:
    """While a long answer about four whole images is on its way: a quarter of the cache and more,
    as much again for whoever comes."""
    body = {
        "model": MODEL,
        "messages": user(*[conftest.image(seed) for seed in range(4)]),
        "reduction": {"method": "none"},
        "max_tokens": 1400,
        "ignore_eos": True,
        "stream": True,
    }
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        chunks = answer.iter_lines()
        assert '"error"' not in next(chunks)
        yield
        gauge = value(server.metrics(), "vllm:num_requests_running")
        assert gauge, "the long answer has ended before the test did"


def chat(server: Server, *parts: dict[str, Any], **said: Any) -> list[dict[str, Any]]:
    """The reports of a request's images."""
    body = {"model": MODEL, "messages": user(*parts), "max_tokens": 2, **said}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if said.get("stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        reports = [r for line in lines[:-1] if (r := json.loads(line).get("reduction"))]
        assert reports and all(report == reports[0] for report in reports)
        images = reports[0]["images"]
    else:
        images = answer.json()["reduction"]["images"]
    return images


def respond(server: Server, items: list[Any], **said: Any) -> dict[str, Any]:
    body = {"model": MODEL, "input": items, "max_output_tokens": 2, **said}
    answer = server.http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    if not said.get("stream"):
        return answer.json()
    lines = [x.removeprefix("data: ") for x in answer.text.splitlines() if x.startswith("data: ")]
    return json.loads(lines[-1])["response"]


def held(images: list[dict[str, Any]]) -> list[tuple[int, str | None]]:
    assert all(image["visual_tokens_kept"] == (image["budget"] or TOKENS) for image in images)
    return [(image["visual_tokens_kept"], image.get("lowered_by")) for image in images]


LESS, USUAL = (48, "pressure"), (100, None)


@pytest.mark.server
def test_a_crowded_server_gives_less_and_says_so(small: Server) -> None:
    def lowered() -> float:
        return value(small.metrics(), "vllm_ficoco_lowered_total", method="score")

    assert held(chat(small, conftest.image(10))) == [USUAL]
    about = small.http.get("/v1/reduction").json()["pressure"]
    assert (about["high"], about["low"], about["on"]) == (0.4, 0.2, False)
    before = lowered()
    with crowded(small):
        assert held(chat(small, conftest.image(11), conftest.image(12))) == [LESS] * 2
        assert held(chat(small, conftest.image(13), stream=True)) == [LESS]
        first = respond(small, turn(input_image(14)))
        assert held(first["reduction"]["images"]) == [LESS]
    with crowded(small):  # by another long answer: the first one may soon be over
        streamed = respond(small, turn(input_image(15)), stream=True)
        assert held(streamed["reduction"]["images"]) == [LESS]
    with crowded(small):
        # Images of earlier turns follow the request.
        more = respond(small, turn(input_image(16)), previous_response_id=first["id"])
        assert held(more["reduction"]["images"]) == [LESS] * 2
        about = small.http.get("/v1/reduction").json()["pressure"]
        assert about["on"] is True and about["load"] >= 0.2
        series = small.metrics("vllm_ficoco")
        assert value(series, "vllm_ficoco_pressure") == 1
        assert value(series, "vllm_ficoco_pressure_load") >= 0.2
        assert lowered() - before == 5, "requests, of however many images"
    # Its client has gone, and the engine, idle now, says no more.
    assert eventually(lambda: value(small.metrics(), "vllm_ficoco_pressure") == 0)
    assert value(small.metrics(), "vllm_ficoco_pressure_load") == 0
    assert held(chat(small, conftest.image(11))) == [USUAL]
    again = respond(small, turn(input_image(16)), previous_response_id=first["id"])
    assert held(again["reduction"]["images"]) == [USUAL] * 2
    assert lowered() - before == 5


@pytest.mark.server
def test_whoever_says_a_budget_gets_it(small: Server) -> None:
    with crowded(small):
        assert held(chat(small, conftest.image(20), visual_token_budget=90)) == [(90, None)]
        none = {"method": "none"}
        assert held(chat(small, conftest.image(21), reduction=none)) == [(TOKENS, None)]
        details = [conftest.image(22, detail=one) for one in ("high", "low", "auto")]
        assert held(chat(small, *details)) == [(TOKENS, None), (16, None), LESS]
        [image] = chat(small, conftest.image(23), reduction={"method": "topk"})
        assert held([image]) == [LESS] and image["method"] == "topk"
        # What is refused is refused as ever.
        body = {"model": MODEL, "messages": user({"type": "image_url", "image_url": {"url": "x"}})}
        assert small.http.post("/v1/chat/completions", json=body).status_code == 400


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("0.85:0.9", "as in 0.85:0.7"), ("2", "not above 1"), ("x", "--reduction-pressure")],
)
def test_a_wrong_mark_is_one_line(
    wrong: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for name in ("FICOCO_PRESSURE", "VLLM_PLUGINS", "HF_HUB_OFFLINE", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")  # all that the command sets, to be restored behind it
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(SystemExit):
        cli.main(["serve", MODEL, "--reduction-pressure", wrong])
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run-batch", "--reduction-pressure", "0.85", "-i", "a", "-o", "b"])
    assert "is for servers" in capsys.readouterr().err


async def test_nothing_is_refused_for_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method inside the decoder does not go with prompt_logprobs; unreduced images do."""
    policy = Policy(default_method="fastv", pressure=MARKS)
    reducer = Reducer.__new__(Reducer)
    reducer.policy, reducer.geometry = policy, TINY._replace(decoder_layers=6, starts=(2,))
    reducer.pressure = Pressure(MARKS, lambda entering: 1.0)
    renderer = ReductionRenderer.__new__(ReductionRenderer)
    renderer.reducer = reducer
    lowers = []

    async def settle_only(request: Any, messages: Any) -> Any:
        lowers.append(request._lowers)
        return reducer.settle(request, messages)

    monkeypatch.setattr(renderer, "_preprocess", settle_only)
    body = {"model": MODEL, "messages": user(conftest.image(1))}
    for more, settings, tried in (
        ({}, [Lowered], [True]),
        ({"prompt_logprobs": 1}, [type(None)], [True, False]),
    ):
        lowers.clear()
        request = ChatRequest.model_validate(body | more)
        settled = await renderer.preprocess_chat(request, request.messages)
        assert [type(one) for one in settled] == settings and lowers == tried
    said = {"reduction": {"method": "fastv", "budget": 100}, "prompt_logprobs": 1}
    lowers.clear()
    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        request = ChatRequest.model_validate(body | said)
        await renderer.preprocess_chat(request, request.messages)
    assert lowers == [True], "once is enough: it was not lowered"
