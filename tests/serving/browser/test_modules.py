"""The page's modules by themselves, in the browser: headers, playback, shots, sticks, recordings."""

import struct

import pytest

from tests.serving.browser import mock

LOAD = """const at = (name) => import(new URL(`static/${name}.js`, location));"""


@pytest.fixture(scope="module")
def page(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    yield page
    context.close()


def run(page, code, *given):
    return page.evaluate(f"async (given) => {{ {LOAD} {code} }}", list(given))


PARSE = """const { parsePicture } = await at("protocol");
try {
  const { payload, ...rest } = parsePicture(new Uint8Array(given[0]).buffer);
  return { ...rest, payload: [...payload] };
} catch (error) { return `${error.name}: ${error.message}`; }"""


def packed(payload=b"abc", magic=0x4C4C, version=1, size=None):
    flags = mock.KEY | mock.CUT
    size = len(payload) if size is None else size
    return mock.HEADER.pack(magic, version, flags, 3, 5, 160, 4_000_000_000, size, 1.5e12) + payload


def test_a_pictures_header(page):
    assert struct.calcsize(mock.HEADER.format) == 32
    assert run(page, PARSE, list(packed())) == {
        "key": True, "first": False, "jpeg": False, "cut": True, "stream": 3, "chunk": 5,
        "index": 160, "event": 4_000_000_000, "time": 1.5e12, "payload": [97, 98, 99],
    }  # fmt: skip


@pytest.mark.parametrize(
    "data, says",
    [
        (b"short", "5 bytes"),
        (packed(magic=0x4C4D), "magic 4c4d"),
        (packed(version=2), "version 2"),
        (packed(size=7), "a picture of 7 bytes came with 3"),
    ],
)
def test_what_is_no_picture_is_refused(page, data, says):
    answer = run(page, PARSE, list(data))
    assert answer.startswith("RangeError") and says in answer


# A viewer: pictures come in bursts of `burst` when they are made; the screen asks 60 times a second.
PLAY = """const { Playback } = await at("playback");
const [{ kind, chunk, fps, burst, until, control }] = given;
const play = new Playback({ kind, fps: 24, chunkFrames: chunk });
const drawn = [], rates = [], leads = [];
let made = 0, event = 0;
for (let now = 0; now < until; now += 1000 / 60) {
  if (control && event === 0 && now >= control) { event = 1; play.control(1); }
  while (made < Math.floor(now * fps / 1000 / burst) * burst) {
    play.push({ index: made, chunk: Math.floor(made / chunk), event });
    made++;
  }
  const picture = play.tick(now);
  if (picture) drawn.push({ now, ...picture });
  rates.push(play.rate); leads.push(play.lead);
}
return { drawn, rates, leads, dropped: play.dropped, underruns: play.underruns, made };"""


def play(page, **case):
    return run(page, PLAY, {"burst": 8, "chunk": 32, "kind": "film", "until": 30_000, **case})


@pytest.mark.parametrize("fps", [23.0, 24.0, 25.5])
def test_a_film_bends_its_rate_to_hold_its_lead(page, fps):
    seen = play(page, fps=fps)
    assert seen["drawn"][0]["now"] >= 1000 * 0.45 * 32 / fps - 20  # waits for the lead
    assert min(seen["rates"]) >= 0.9 and max(seen["rates"]) <= 1.1
    assert seen["dropped"] == seen["underruns"] == 0
    late = seen["leads"][900:]
    assert 4 <= sum(late) / len(late) <= 24
    assert [p["index"] for p in seen["drawn"]] == list(range(len(seen["drawn"])))
    steps = [abs(b - a) for a, b in zip(seen["rates"], seen["rates"][1:])]
    assert max(steps) <= 0.15 / 60 + 1e-9


def test_a_film_that_is_made_too_slowly_waits_and_goes_on(page):
    seen = play(page, fps=12)
    assert seen["underruns"] > 3 and seen["dropped"] == 0
    assert min(seen["rates"]) >= 0.9 and len(seen["drawn"]) > 300


def test_after_a_control_stale_pictures_go(page):
    plain = play(page, fps=24)
    seen = play(page, fps=24, control=10_000)
    assert plain["dropped"] == 0 and seen["dropped"] > 4
    first = lambda s: next(p["now"] for p in s["drawn"] if p["index"] >= 240)  # noqa: E731
    assert first(seen) < first(plain) - 200
    new = next(p for p in seen["drawn"] if p["event"] == 1)
    assert new["now"] - 10_000 < 8 * 1000 / 24 + 4 * 1000 / 24 + 40


def test_a_world_draws_at_once_and_drops_what_is_late(page):
    seen = play(page, kind="world", chunk=8, fps=24)
    assert seen["drawn"][0]["now"] < 8 * 1000 / 24 + 20
    assert max(seen["leads"]) <= 8
    fast = play(page, kind="world", chunk=8, fps=40)
    assert fast["dropped"] > 100 and max(fast["leads"]) <= 12
    index = [p["index"] for p in fast["drawn"]]
    assert index == sorted(index) and fast["made"] - index[-1] <= 20
    slow = play(page, kind="world", chunk=8, fps=10)
    assert slow["dropped"] == 0 and len(slow["drawn"]) == pytest.approx(slow["made"], abs=8)


def test_the_end_of_a_film_plays_without_a_lead(page):
    code = """const { Playback } = await at("playback");
    const play = new Playback({ kind: "film", fps: 24, chunkFrames: 32 });
    for (let index = 0; index < 5; index++) play.push({ index, chunk: 0, event: 0 });
    const before = play.tick(0);
    play.finish();
    let drawn = 0;
    for (let now = 16; now < 1000; now += 16) drawn += play.tick(now) !== null;
    return [before, drawn];"""
    assert run(page, code) == [None, 5]


SCHEDULE = """const { Schedule } = await at("shots");
const sent = [];
const one = new Schedule((shot, at) => { sent.push([one.newest, shot.prompt, at]); return sent.length; });
one.begin("first", 3);
one.ahead = [{ prompt: "B", chunks: 1, cut: true }, { prompt: "C", chunks: 2, cut: false }];
const check = [];
one.seen(0); check.push(sent.length);
one.seen(1); check.push(sent.length);
one.applied(1, 4);
one.seen(2); check.push(sent.length);
one.seen(3); check.push(sent.length);
one.following = false;
one.ahead = [{ prompt: "D", chunks: 1, cut: true }];
one.seen(9); check.push(sent.length);
one.following = true; one.extend();
one.seen(10); check.push(sent.length);
one.seen(11); check.push(sent.length);
return [sent, check];"""


def test_shots_are_sent_two_chunks_before_their_turn(page):
    sent, check = run(page, SCHEDULE)
    assert check == [0, 1, 1, 2, 2, 2, 3]
    # B was applied a chunk late, at 4, so that C comes at 5.
    assert sent == [[1, "B", 3], [3, "C", 5], [11, "D", 13]]


def test_a_list_of_shots_is_that_of_launch_sample(page):
    code = """const { parseShots, shotsText, moved } = await at("shots");
    const shots = parseShots('["A", {"prompt": " B ", "chunks": 3, "cut": false, "image": "b.jpg"}]');
    return [shots, JSON.parse(shotsText(moved(shots, 0, 5)))];"""
    shots, saved = run(page, code)
    assert shots == [
        {"prompt": "A", "chunks": 2, "cut": False},
        {"prompt": "B", "chunks": 3, "cut": False},
    ]
    assert [shot["prompt"] for shot in saved] == ["B", "A"]


@pytest.mark.parametrize(
    "x, y, codes",
    [
        (0.08, 0.08, []),
        (0.1, 0.1, ["KeyS", "KeyD"]),
        (0, -1, ["KeyW"]),
        (0.7, 0.7, ["KeyS", "KeyD"]),
        (-0.9, 0.1, ["KeyA"]),
    ],
)
def test_a_sticks_codes(page, x, y, codes):
    assert run(page, 'return (await at("input")).stickCodes(...given);', x, y) == codes


def test_a_sticks_tilt_begins_at_the_edge_of_its_rest_zone(page):
    tilts = [(0.1, 0), (0.12, 0), (0.56, 0), (0, -1), (1, 1)]
    seen = run(
        page,
        'const { rescaled } = await at("input"); return given.map((t) => rescaled(...t));',
        *tilts,
    )
    expected = [(0, 0), (0, 0), (0.5, 0), (0, -1), (0.5**0.5, 0.5**0.5)]
    for one, wanted in zip(seen, expected):
        assert one == pytest.approx(wanted)


def test_a_world_shows_what_came_before_a_control_in_its_chunk(page):
    """Each picture has an event of its own while the mouse moves: none is stale for that."""
    code = """const { Playback } = await at("playback");
    const play = new Playback({ kind: "world", fps: 24, chunkFrames: 8 });
    for (let event = 1; event <= 8; event++) play.control(event);
    for (let index = 0; index < 8; index++) play.push({ index, chunk: 0, event: index + 1 });
    const lead = play.lead;
    play.push({ index: 8, chunk: 1, event: 8 });
    return [lead, play.lead, play.dropped];"""
    assert run(page, code) == [8, 3, 6]


def test_a_replay_sends_each_action_at_its_picture(page):
    code = """const { Recording, Replay } = await at("record");
    const made = new Recording({ prompt: "A" });
    made.add(0, { type: "keys", codes: ["KeyW"], dx: 0, dy: 0, t: 5 });
    made.add(9, { type: "prompt", text: "B", mode: "continue" });
    const sent = [];
    const replay = new Replay(Recording.parse(made.text()), (message) => sent.push(message));
    const left = [replay.at(0), sent.length, replay.at(8), sent.length, replay.at(12)];
    return [left, sent];"""
    left, sent = run(page, code)
    assert left == [True, 1, True, 1, False]
    assert sent == [
        {"type": "keys", "codes": ["KeyW"], "dx": 0, "dy": 0},
        {"type": "prompt", "text": "B", "mode": "continue"},
    ]


def test_reconnecting_waits_longer_each_time_up_to_a_bound(page):
    code = 'const { backoff } = await at("protocol"); return [0, 1, 2, 30].map(backoff);'
    assert run(page, code) == [250, 500, 1000, 8000]
