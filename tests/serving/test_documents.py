"""openapi.json and asyncapi.json against the routes and messages that there are."""

import json
import pathlib
import re

import pytest
from starlette.routing import Route, WebSocketRoute

from longlive_jax import serving
from longlive_jax.serving import messages, models
from longlive_jax.serving.limits import Limits, Refused
from longlive_jax.serving.server import Server
from tests.serving import running

FOLDER = pathlib.Path(serving.__file__).parent
OPEN, ASYNC = (json.loads((FOLDER / f"{n}.json").read_text()) for n in ("openapi", "asyncapi"))
TYPES = {str: "string", int: "integer", bool: "boolean", list: "array", (int, float): "number"}
EXAMPLES = {"string": "a", "integer": 1, "boolean": True, "array": ["KeyW"], "number": 1.5}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    return Server({"shapes": running.model(folder)}, folder / "out")


def test_the_routes(server):
    there = {
        (route.path, method.lower())
        for route in server.app.routes
        if isinstance(route, Route)
        for method in route.methods - {"HEAD"}
    }
    written = {
        (path, method)
        for path, entry in OPEN["paths"].items()
        for method in set(entry) - {"parameters"}
    }
    assert there == written
    (socket,) = (r.path for r in server.app.routes if isinstance(r, WebSocketRoute))
    assert socket == ASYNC["channels"]["stream"]["address"]


def test_what_is_answered(server):
    def fields(name):
        return set(OPEN["components"]["schemas"][name]["properties"])

    model = server.models["shapes"]
    assert isinstance(model, models.Model)
    assert set(model.info()) == fields("Model")
    with pytest.raises(Refused) as refused:
        server.scheduler.get("x")
    assert refused.value.status == 404
    from longlive_jax.serving.streams import Stream, read_request

    request = read_request({"prompt": "a"}, server.models, Limits(), None)
    stream = Stream(model, request, FOLDER, 1)
    assert set(stream.describe(0)) == fields("State")
    assert set(stream.script()) == fields("Script") - {"actions"}  # a film has none
    stats = set(stream.stats(1.0, 1.0))
    assert stats == set(ASYNC["components"]["messages"]["stats"]["payload"]["properties"])
    for name in fields("NewStream"):
        with pytest.raises(Refused) as refused:
            read_request({name: ["wrong"], "x": 1}, server.models, Limits(), None)
    known = set(re.findall(r"\w+", refused.value.message.split(":")[1]))
    assert known == fields("NewStream")


def operation(name):
    return [m["$ref"].split("/")[-1] for m in ASYNC["operations"][name]["messages"]]


def test_the_messages():
    assert set(operation("direct")) == set(messages.UP)
    assert set(operation("show")) == {*messages.DOWN, "picture"}
    for name, fields in messages.UP.items():
        payload = ASYNC["components"]["messages"][name]["payload"]
        written = {k: v for k, v in payload["properties"].items() if k != "type"}
        assert set(written) == set(fields)
        assert set(payload["required"]) == {"type", *(k for k, (_, must) in fields.items() if must)}
        for field, (types, _) in fields.items():
            assert written[field].get("type", "string") == TYPES[types]
        message = {k: EXAMPLES[v["type"]] for k, v in written.items() if "enum" not in v}
        messages.parse(json.dumps({"type": name} | message), Limits())
    modes = ASYNC["components"]["messages"]["prompt"]["payload"]["properties"]["mode"]["enum"]
    assert tuple(modes) == messages.MODES


def test_the_header():
    header = ASYNC["components"]["messages"]["picture"]["x-header"]
    sizes = {"u8": 1, "u16": 2, "u32": 4, "f64": 8}
    ends = [field["offset"] + sizes[field["type"]] for field in header]
    assert [field["offset"] for field in header[1:]] == ends[:-1]
    assert ends[-1] == messages.HEADER.size == messages.HEADER_BYTES == 32
    made = messages.Header(messages.KEY | messages.CUT, 1, 2, 3, 4, 5, 6.5)
    assert messages.unpack(made.pack() + b"12345 and more") == (made, b"12345")
    assert made.pack()[:4] == b"LL\x01\x09"
