import forebay
import httpx
import pytest

from tests.unit.sdk.gateway import DONE, MESSAGES, Pieces, ScriptedGateway, completion, error, frame, stream


def sync_client(gateway: ScriptedGateway, **options: object) -> forebay.Client:
    return forebay.Client("http://gw:1", api_key="k", transport=gateway.transport, **options)  # type: ignore[arg-type]


def async_client(gateway: ScriptedGateway, **options: object) -> forebay.AsyncClient:
    return forebay.AsyncClient(
        "http://gw:1",
        api_key="k",
        transport=gateway.transport,
        **options,  # type: ignore[arg-type]
    )


def test_all_names_the_public_names() -> None:
    public = {name for name in vars(forebay) if not name.startswith("_")}

    assert sorted(forebay.__all__) == forebay.__all__
    assert set(forebay.__all__) == public


def test_the_sync_client_gets_a_typed_answer_with_what_the_gateway_told() -> None:
    gateway = ScriptedGateway(completion("hi"))

    with sync_client(gateway) as client:
        answer = client.chat.create(model="m", messages=MESSAGES, max_tokens=5)

    assert answer.text == "hi"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 3
    assert answer.model_extra == {"engine_extra": {"kept": True}}
    assert answer.forebay == forebay.ResponseMetadata(
        request_id="req_1", model="m", worker="m-0", attempts=2, queue_ms=1.5, overhead_ms=0.25, cache="miss"
    )
    assert gateway.body() == {"model": "m", "messages": MESSAGES, "max_tokens": 5}


async def test_the_async_client_says_the_same_as_the_sync_client() -> None:
    sync, asynchronous = ScriptedGateway(completion()), ScriptedGateway(completion())
    options: forebay.ForebayOptions = {"timeouts": {"first_token": 2.0}, "fallbacks": ["n"], "end_user": "u"}

    with sync_client(sync) as client:
        first = client.chat.create(model="m", messages=MESSAGES, forebay=options, seed=1)
    async with async_client(asynchronous) as aclient:
        second = await aclient.chat.create(model="m", messages=MESSAGES, forebay=options, seed=1)

    assert first == second
    assert sync.body() == asynchronous.body()
    assert sync.body()["forebay"] == options
    assert sync.requests[0].url == asynchronous.requests[0].url == "http://gw:1/v1/chat/completions"
    assert sync.requests[0].headers["authorization"] == "Bearer k"


@pytest.mark.parametrize("base_url", ["http://gw:1", "http://gw:1/", "http://gw:1/v1", "http://gw:1/v1/"])
def test_the_address_may_end_in_v1(base_url: str) -> None:
    gateway = ScriptedGateway(httpx.Response(200, json={"data": [{"id": "a/b"}]}))

    with forebay.Client(base_url, transport=gateway.transport) as client:
        models = client.models.list()

    assert [model.id for model in models.data] == ["a/b"]
    assert gateway.requests[0].url == "http://gw:1/v1/models"


def test_a_prefix_in_the_address_is_kept() -> None:
    gateway = ScriptedGateway(httpx.Response(200, json={"id": "a"}))

    with forebay.Client("https://host/llm/v1", transport=gateway.transport) as client:
        client.models.retrieve("a")

    assert gateway.requests[0].url == "https://host/llm/v1/models/a"


def test_a_model_name_may_have_slashes_and_odd_characters() -> None:
    gateway = ScriptedGateway(httpx.Response(200, json={"id": "org/a b?"}))

    with sync_client(gateway) as client:
        model = client.models.retrieve("org/a b?")

    assert model.id == "org/a b?"
    assert gateway.requests[0].url.raw_path == b"/v1/models/org/a%20b%3F"


async def test_models_are_typed_on_the_async_client_too() -> None:
    listing = httpx.Response(200, json={"object": "list", "data": [{"id": "m", "owned_by": "us"}]})
    gateway = ScriptedGateway(listing, httpx.Response(200, json={"id": "m"}, headers={"x-request-id": "r"}))

    async with async_client(gateway) as client:
        models, model = await client.models.list(), await client.models.retrieve("m")

    assert models.data[0].owned_by == "us"
    assert model.forebay.request_id == "r"


def test_the_key_comes_from_the_environment_if_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_API_KEY", "from-env")
    gateway = ScriptedGateway(completion())

    with forebay.Client("http://gw:1", transport=gateway.transport) as client:
        client.chat.create(model="m", messages=MESSAGES)

    assert gateway.requests[0].headers["authorization"] == "Bearer from-env"


def test_without_a_key_no_authorization_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOREBAY_API_KEY", raising=False)
    gateway = ScriptedGateway(completion())

    with forebay.Client("http://gw:1", transport=gateway.transport) as client:
        client.chat.create(model="m", messages=MESSAGES)

    assert "authorization" not in gateway.requests[0].headers


def test_an_address_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="base_url"):
        forebay.Client("127.0.0.1:8411")


def test_stream_is_a_method_and_not_a_parameter() -> None:
    with sync_client(ScriptedGateway(completion())) as client, pytest.raises(TypeError, match=r"chat\.stream"):
        client.chat.create(model="m", messages=MESSAGES, stream=True)


def test_an_answer_that_is_something_else_is_malformed() -> None:
    gateway = ScriptedGateway(httpx.Response(200, text="<html>welcome</html>"))

    with sync_client(gateway) as client, pytest.raises(forebay.MalformedAnswer, match="ChatCompletion"):
        client.chat.create(model="m", messages=MESSAGES)


def test_headers_that_make_no_sense_are_left_out() -> None:
    headers = {"x-forebay-attempts": "many", "x-forebay-queue-ms": ""}
    gateway = ScriptedGateway(httpx.Response(200, json={"id": "m"}, headers=headers))

    with sync_client(gateway) as client:
        assert client.models.retrieve("m").forebay == forebay.ResponseMetadata()


class TestStream:
    @pytest.mark.parametrize("size", [1, 7, 10_000])
    async def test_chunks_are_whole_however_the_bytes_are_cut(self, size: int) -> None:
        whole = b": ping\n\n" + frame("größ") + frame("er\u2028als").replace(b"\n", b"\r\n") + DONE
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]

        gateway = ScriptedGateway(stream(*pieces))
        async with async_client(gateway) as client, client.chat.stream(model="m", messages=MESSAGES) as chunks:
            texts = [chunk.text async for chunk in chunks]

        assert texts == ["größ", "er\u2028als"]

    def test_the_sync_stream_can_be_read_without_a_context(self) -> None:
        gateway = ScriptedGateway(stream(frame("a"), frame("b"), DONE))

        with sync_client(gateway) as client:
            chunks = client.chat.stream(model="m", messages=MESSAGES)
            texts = [chunk.text for chunk in chunks]

        assert texts == ["a", "b"]
        assert gateway.body()["stream"] is True
        assert chunks.forebay.worker == "m-0"

    def test_nothing_is_asked_before_the_stream_is_entered(self) -> None:
        gateway = ScriptedGateway(stream(DONE))

        with sync_client(gateway) as client:
            chunks = client.chat.stream(model="m", messages=MESSAGES)
            chunks.close()

        assert gateway.requests == []
        assert chunks.forebay == forebay.ResponseMetadata()

    async def test_leaving_the_context_closes_the_connection(self) -> None:
        body = Pieces(frame("a"), frame("b"), DONE)
        gateway = ScriptedGateway(httpx.Response(200, stream=body))

        async with async_client(gateway) as client, client.chat.stream(model="m", messages=MESSAGES) as chunks:
            assert (await anext(chunks)).text == "a"

        assert body.is_closed

    def test_leaving_the_sync_context_unread_closes_the_connection(self) -> None:
        body = Pieces(frame("a"), DONE)

        gateway = ScriptedGateway(httpx.Response(200, stream=body))
        with sync_client(gateway) as client, client.chat.stream(model="m", messages=MESSAGES):
            pass

        assert body.is_closed

    def test_an_error_in_the_stream_comes_after_what_came_before_it(self) -> None:
        fault = b'data: {"error": {"message": "gone", "type": "server_error", "code": "worker_lost"}}\n\n'
        gateway = ScriptedGateway(stream(frame("a") + fault))

        with sync_client(gateway) as client, client.chat.stream(model="m", messages=MESSAGES) as chunks:
            first = next(chunks)
            with pytest.raises(forebay.StreamBroken) as caught:
                next(chunks)

        assert first.text == "a"
        assert (caught.value.code, caught.value.type, caught.value.request_id) == (
            "worker_lost",
            "server_error",
            "req_1",
        )
        assert str(caught.value) == "gone"

    async def test_a_stream_without_its_end_is_broken(self) -> None:
        async with async_client(ScriptedGateway(stream(frame("a")))) as client:
            with pytest.raises(forebay.StreamBroken) as caught:
                [chunk async for chunk in client.chat.stream(model="m", messages=MESSAGES)]

        assert caught.value.code == "stream_truncated"

    async def test_a_lost_connection_breaks_the_stream_and_is_not_repeated(self) -> None:
        gateway = ScriptedGateway(stream(frame("a"), httpx.ReadError("reset")))

        async with async_client(gateway) as client:
            with pytest.raises(forebay.StreamBroken) as caught:
                [chunk async for chunk in client.chat.stream(model="m", messages=MESSAGES)]

        assert caught.value.code == "connection_lost"
        assert len(gateway.requests) == 1

    async def test_a_connection_lost_after_the_end_harms_nothing(self) -> None:
        gateway = ScriptedGateway(stream(frame("a"), DONE, httpx.ReadError("reset")))

        async with async_client(gateway) as client:
            texts = [chunk.text async for chunk in client.chat.stream(model="m", messages=MESSAGES)]

        assert texts == ["a"]

    def test_a_frame_that_is_no_chunk_is_malformed(self) -> None:
        gateway = ScriptedGateway(stream(b"data: {nonsense\n\n"))

        with sync_client(gateway) as client, pytest.raises(forebay.MalformedAnswer):
            list(client.chat.stream(model="m", messages=MESSAGES))

    def test_an_error_status_is_raised_when_the_stream_is_entered(self) -> None:
        with sync_client(ScriptedGateway(error(404, "model_not_found"))) as client:
            chunks = client.chat.stream(model="x", messages=MESSAGES)
            with pytest.raises(forebay.NotFound), chunks:
                pass

    def test_the_usage_chunk_has_no_choices(self) -> None:
        usage = b'data: {"id": "c1", "choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}\n\n'

        with sync_client(ScriptedGateway(stream(frame("a"), usage, DONE))) as client:
            *_, last = client.chat.stream(model="m", messages=MESSAGES, stream_options={"include_usage": True})

        assert last.usage is not None
        assert last.usage.prompt_tokens == 4
        assert last.text == ""


class TestHealth:
    async def test_ready_follows_the_status(self) -> None:
        starting, started = httpx.Response(503, json={"status": "starting"}), httpx.Response(200, json={})

        async with async_client(ScriptedGateway(starting, started)) as client:
            assert await client.health.ready() is False
            assert await client.health.ready() is True

    def test_live_and_ready_ask_their_own_probe_once(self) -> None:
        gateway = ScriptedGateway(httpx.Response(200))

        with sync_client(gateway) as client:
            assert client.health.live()
            assert client.health.ready()

        assert [request.url.path for request in gateway.requests] == ["/health/liveness", "/health/readiness"]

    def test_where_nothing_answers_nothing_is_live(self) -> None:
        gateway = ScriptedGateway(httpx.ConnectError("refused"))

        with sync_client(gateway) as client:
            assert client.health.live() is False

        assert len(gateway.requests) == 1
